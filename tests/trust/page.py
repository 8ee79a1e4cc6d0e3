"""The page "What works, what does not, how we know", made of the tables that the tests wrote.

    python tests/trust/page.py    # writes docs/trust.md

The tables lie in `results/`, one for each version of transformers (`claims.py` says how they are written);
`results/soak.csv` holds the last run of what is run by hand, `results/peers.json` how many of transformers'
own tests that were.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

from packaging.version import Version

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trust.claims import RESULTS  # noqa: E402

PAGE = Path(__file__).resolve().parents[2] / "docs/trust.md"
INTRO = """\
# What works, what does not, how we know

Made by `python tests/trust/page.py` from what the tests in `tests/trust` found; do not edit it.

Each line is a claim about a patched model, tested on small models of every family whose parts are those of
the real ones ({families}), on transformers {versions}. **Works** means that it gives what its plain
definition gives. **Refused** means that the call ends with an error that says the value, the reason and what
to do instead. **Not known** means that its test could run nowhere. Where a claim was not tested, or not for a
family, the note says why. Models merge by attention here (`merge="recycle"`) unless a claim says otherwise.
The contract (bit-identical after removal and at `reduction=0`, equal to the reference otherwise), whose tests
run by attention and by likeness, has a table of its own in the README.
"""
PEERS = """\
They are those of {mixins} in the source package of transformers {version}: {total} for each family.
These pass unpatched and are held against the patched model: {counts}.
The others are skipped, most for want of an accelerator, flash attention or DeepSpeed, or fail unpatched, most
for want of the inputs or the attention they ask for. **Not run**: GenerationTesterMixin and
ExportTesterMixin, whose files that package lacks (decoding has its own tests, above; of torch.export nothing
is claimed), and the mixins for pipelines, training and several devices.
"""
TOPICS = ("Decoding", "Assisted decoding", "Outputs", "Caches", "Calls", "Odd inputs", "Faults", "Threads")


def read() -> list[dict[str, str]]:
    """The rows of all tables."""
    rows = []
    for path in sorted(RESULTS.glob("*.csv")):
        with path.open(newline="") as file:
            rows += csv.DictReader(file)
    return rows


def render() -> str:
    """The page as Markdown."""
    rows = read()
    versions = sorted({row["transformers"] for row in rows}, key=Version, reverse=True)
    families = list(dict.fromkeys(row["family"] for row in rows if row["family"] != "any"))
    named = ", ".join(f"`{family}`" for family in families)
    parts = [INTRO.format(families=named, versions=" and ".join(versions))]
    topics = dict.fromkeys([*TOPICS, *sorted({row["topic"] for row in rows})])
    for topic in topics:
        if own := [row for row in rows if row["topic"] == topic]:
            parts.append(section(topic, own, versions))
    parts.append(peers())
    return "\n".join(parts)


def peers() -> str:
    """Which of transformers' own tests were run, below their table, which comes last."""
    parts = []
    for version, found in json.loads((RESULTS / "peers.json").read_text()).items():
        tests = found["tests"]
        counts = ", ".join(f"`{family}` {kinds['passed']}" for family, kinds in tests.items())
        (total,) = {sum(kinds.values()) for kinds in tests.values()}
        mixins = " and ".join(found["mixins"])
        parts.append(PEERS.format(version=version, mixins=mixins, total=total, counts=counts))
    return "\n".join(parts)


def section(topic: str, rows: list[dict[str, str]], versions: list[str]) -> str:
    """One topic: a table of its claims, and the notes on them."""
    notes: list[str] = []
    lines = [f"## {topic}", "", "| claim | | tested on | how we know |", "|---|---|---|---|"]
    for claim in dict.fromkeys(row["claim"] for row in rows):
        own = [row for row in rows if row["claim"] == claim]
        verdict, how = own[0]["verdict"], own[0]["how we know"]
        if any(row["outcome"] == "failed" for row in own):
            verdict = f"**fails** (should be: {verdict})"
        elif all(map(skipped, own)):
            verdict = f"**not known** (should be: {verdict})"
        lines.append(f"| {claim} | {verdict} | {tested(own, versions, notes)} | {how} |")
    numbered = [f"{number}. {note}" for number, note in enumerate(notes, start=1)]
    return "\n".join([*lines, "", *numbered, *([""] if numbered else [])])


def tested(rows: list[dict[str, str]], versions: list[str], notes: list[str]) -> str:
    """How many families ran, on which versions, and the numbers of the notes that say why others did not."""
    ran = {v: {row["family"] for row in of(rows, v) if not skipped(row)} for v in versions}
    counts = {v: "no family" if families == {"any"} else many(len(families)) for v, families in ran.items()}
    said = {v: count for v, count in counts.items() if ran[v]}
    if not said:
        text = "not run"
    elif len(said) == len(versions) and len(set(said.values())) == 1:
        text = next(iter(said.values())).replace("no family", "yes")
    else:
        text = "; ".join(f"{v}: {count}".replace(": no family", "") for v, count in said.items())
    reasons: dict[str, dict[str, list[str]]] = {}
    for row in filter(skipped, rows):
        reason = row["outcome"].removeprefix("skipped: ")
        reasons.setdefault(reason, {}).setdefault(row["transformers"], []).append(row["family"])
    numbers = []
    for reason, where in reasons.items():
        note = f"{places(where, versions)}: {reason}."
        if note not in notes:
            notes.append(note)
        numbers.append(str(notes.index(note) + 1))
    return f"{text} ({', '.join(numbers)})" if numbers else text


def of(rows: list[dict[str, str]], version: str) -> list[dict[str, str]]:
    """The rows of one version."""
    return [row for row in rows if row["transformers"] == version]


def skipped(row: dict[str, str]) -> bool:
    """Whether nothing was tested."""
    return row["outcome"].startswith("skipped")


def many(count: int) -> str:
    """`1 family`, `9 families`."""
    return f"{count} famil{'y' if count == 1 else 'ies'}"


def places(where: dict[str, list[str]], versions: list[str]) -> str:
    """Families and versions in words; a version is left out where all are alike."""
    named = {version: ", ".join(families) for version, families in where.items()}
    if set(named) == set(versions) and len(set(named.values())) == 1:
        return next(iter(named.values())).replace("any", "everywhere")
    return "; ".join(f"{version}: {families}".replace(": any", "") for version, families in named.items())


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(render())
