"""What accuracy.py measured, as Markdown: the README's tables, and all of them as docs/accuracy.md."""

from __future__ import annotations

from collections.abc import Sequence

from accuracy_ablations import GROUPS
from accuracy_show import Row, lines

from readers.card import WEAK_BELOW

BEGIN, END = "<!-- accuracy tables -->", "<!-- end of accuracy tables -->"
SHOWN = ("0.8889", "0.9500")  # of pictures and of video
COLUMNS = (
    "`kept` is the mean over the tasks of accuracy over unpatched accuracy, with its 95 % interval; `left` "
    "the share of the visual tokens left after the last merge; `compute` the area under visual tokens x "
    "layers, of the unpatched model's: equal compute is not equal time."
)
MISSING = "A method that is missing from a table cannot compute so little: [why](docs/accuracy.md)."
BESIDE = ("illava", "illava recycle", "illava paper")  # stand in each ablation's table, where measured
INTRO = """\
# Do answers stay the same

Made by `python benchmarks/accuracy.py --show --readme` from
[what was measured](../benchmarks/results/accuracy.csv); do not edit it.

The models are the readers of [`checkpoints/`](../checkpoints): small genuine models of the families named,
trained on drawn pictures. What they show is whether a way of dropping tokens keeps what such an architecture
needs for its answers, not how large a model's scores are. `kept` is the mean over the tasks of accuracy over
unpatched accuracy, with its 95 % interval (bootstrap over items); `left` is the share of the visual tokens
after the last merge; `compute` is the area under visual tokens x layers, of the unpatched model's, each tile
and frame losing whole tokens. Tables of one compute hold every method to what the paper's rule (`illava
recycle`) spends, at the share removed that they name, on as many tokens in one piece; no method passes it,
and each leaves as many tokens as it can for that. Equal compute is not equal time. Each method is a short
file in [`benchmarks/rivals`](../benchmarks/rivals) that names its source.
"""
# Titles of the ablations' groups, and the paper's tables they answer to.
TITLES = {
    "where": "Encoder, language model, or both (table 4)",
    "rule": "Merging rule (table 5; tables 4 and 7 of the first version)",
    "encoder share": "Share of the removed tokens that the encoder removes (figure 6)",
    "layers": "Which layers",
    "bipartite": "Bipartite merging: where, and how much",
    "likeness": "Bipartite merging, neighbours first: where, of pictures and of videos",
    "distance": "Neighbours before others, or not",
    "recycled": "Recycled tokens, as a share of those kept (P^c)",
    "members": "Tokens merged into each recycled one (M)",
    "score": "Score",
    "selection": "Which units stay",
    "queries": "Whose attention counts in the language model",
}


def markdown(rows: Sequence[Row], prefills: Sequence[Row] = ()) -> str:
    """A table for each reader, split, budget and reduction."""
    parts = []
    for title, header, body in lines(rows, prefills):
        parts += [f"**{title}**", ""]
        parts += [f"| {' | '.join(header)} |", "|---" + "|---:" * (len(header) - 1) + "|"]
        parts += [f"| {' | '.join(cells)} |" for cells in body] + [""]
    return "\n".join(parts)


def measured_with(rows: Sequence[Row]) -> str:
    """Items, versions and device, in a sentence."""
    counts = {int(row["items"]) for row in rows if not row["note"]}
    versions = {f"torch {row['torch']}, transformers {row['transformers']}, {row['device']}" for row in rows}
    items = f"{min(counts):,}" if len(counts) == 1 else f"{min(counts):,} to {max(counts):,}"
    return f"{items} items a task, ± half of the 95 % interval; {'; '.join(sorted(versions))}."


def weak(rows: Sequence[Row]) -> list[str]:
    """A paragraph on the tasks that a reader is weak at before anything is removed, if there are any."""
    found = {
        f"{row['task']} ({row['reader']}: {int(row['right']) / int(row['items']):.1%} right unpatched)"
        for row in rows
        if row["method"] == "unpatched" and int(row["right"]) < WEAK_BELOW * int(row["items"])
    }
    if not found:
        return []
    said = f"**The reader itself is weak at** {', '.join(sorted(found))}."
    return [
        f"{said} What a method keeps of that says little, though `kept` counts it as much as any task.",
        "",
    ]


def notes(rows: Sequence[Row]) -> list[str]:
    """What could not be measured, and why: a line a reason, with all that was asked."""
    found: dict[str, set[str]] = {}
    for row in rows:
        if row["note"]:
            reason, _, asked = row["note"].partition("; asked ")
            found.setdefault(f"- {row['method']}: {reason}", set()).update([asked] if asked else [])
    return [f"{said}; asked {', '.join(sorted(of))}" if of else said for said, of in sorted(found.items())]


def timed_with(prefills: Sequence[Row]) -> list[str]:
    """A paragraph on the batches, rounds and threads of the times, if there are any."""
    if not prefills:
        return []
    batches = sorted({f"{row['batch']} items of {row['task']}" for row in prefills})
    rounds, threads = ({int(row[name]) for row in prefills} for name in ("rounds", "threads"))
    at_once = f"{max(threads)} thread{'s' if max(threads) > 1 else ''}"
    said = (
        f"`operations` are of a prefill's matrix products, `first token` is how many times sooner it comes, "
        f"the median of {max(rounds)} rounds in turns ({' or '.join(batches)} a batch, {at_once}, float32; "
        "quartiles are in `benchmarks/results/accuracy_prefill.csv`)."
    )
    return [said, ""]


def readme_block(rows: Sequence[Row], prefills: Sequence[Row] = ()) -> str:
    """What stands between the README's markers, both included: the test split at equal compute.

    The reductions in `SHOWN` are there to see, the others fold out.
    """
    test = [row for row in rows if row["split"] == "test"]
    unpatched = [row for row in test if float(row["reduction"]) == 0]
    asked = [row for row in test if row["budget"] == "compute"]
    if not asked:
        return "\n".join([BEGIN, "Not measured yet.", END])
    shown = [row for row in asked if row["reduction"] in SHOWN]
    parts = [BEGIN, measured_with([*unpatched, *asked]), "", COLUMNS, ""]
    parts += [*timed_with(prefills), *weak(unpatched)]
    parts.append(markdown([*unpatched, *shown], prefills))
    if folded := [row for row in asked if row not in shown]:
        removed = ", ".join(f"{float(share):.1%}" for share in sorted({row["reduction"] for row in folded}))
        parts += [f"<details><summary>The compute of {removed} removed</summary>", ""]
        parts += [markdown([*unpatched, *folded], prefills), "</details>", ""]
    return "\n".join([*parts, MISSING, END])


def page(rows: Sequence[Row], prefills: Sequence[Row] = ()) -> str:
    """docs/accuracy.md: the test split at both budgets, then the ablations on the validation split."""
    test = [row for row in rows if row["split"] == "test"]
    validation = [row for row in rows if row["split"] == "validation"]
    parts = [INTRO]
    if test:
        parts += ["## Methods", "", measured_with(test), "", *timed_with(prefills), *weak(test)]
        parts.append(markdown(test, prefills))
        parts += [*notes(test), ""] if notes(test) else []
    if validation:
        parts += [
            "## Ablations",
            "",
            f"The validation split, on which plans are chosen. {measured_with(validation)}",
            "",
            *weak(validation),
        ]
    for group, plans in GROUPS.items():
        own = [row for row in validation if row["method"] in plans]
        if own:
            asked = {(row["reader"], row["budget"], row["reduction"]) for row in own}
            beside = [
                row
                for row in validation
                if row["method"] == "unpatched"
                or (row["method"] in BESIDE and (row["reader"], row["budget"], row["reduction"]) in asked)
            ]
            parts += [f"### {TITLES[group]}", "", markdown([*beside, *own])]
    return "\n".join(parts).rstrip() + "\n"
