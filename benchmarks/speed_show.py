"""The tables of speed.py, on the console and for the README: what was measured, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table
from speed_cases import EARLY, OURS, RECYCLE, RIVALS, SMALLER_MODEL
from speed_models import MODELS
from speed_rows import OK

Row = dict[str, str]
NOT_MEASURED = "not measured"
_CASE = ("model", "attn", "content", "count", "asked_tokens", "batch", "text", "new_tokens")


def arms(rows: Sequence[Row]) -> dict[tuple[str, ...], dict[tuple[str, str], dict[str, Row]]]:
    """Rows by case, by arm and reduction, by figure."""
    found: dict[tuple[str, ...], dict[tuple[str, str], dict[str, Row]]] = {}
    for row in rows:
        case = tuple(row[name] for name in _CASE)
        found.setdefault(case, {}).setdefault((row["arm"], row["reduction"]), {})[row["figure"]] = row
    return found


def tables(console: Console, rows: Sequence[Row]) -> None:
    """One table for each case."""
    for case, measured in arms(rows).items():
        named = dict(zip(_CASE, case, strict=True))
        count = "" if named["count"] == "1" else f"{named['count']} x "
        table = Table(
            title=f"{MODELS[named['model']].title}, {count}{named['content']}, {named['asked_tokens']} "
            f"tokens asked for, batch {named['batch']}, {named['attn']}: value (times better than unpatched)"
        )
        table.add_column("arm")
        for column in (
            "gone", "tokens", "encoder ms", "LLM ms", "first token ms", "bound", "of bound", "own",
            "tokens/s", "requests/s", "cache MB", "peak GB",
        ):  # fmt: skip
            table.add_column(column, justify="right")
        for (arm, reduction), figures in measured.items():
            table.add_row(arm, *_cells(reduction, figures))
        console.print(table)
    shown = {row["arm"] for row in rows}
    for name, rival in RIVALS.items():
        if name in shown:
            console.print(f"{name}: {rival.what}. {rival.note}".rstrip(), style="dim", highlight=False)


def _cells(reduction: str, figures: dict[str, Row]) -> list[str]:
    any_row = next(iter(figures.values()))
    gone = f"{float(reduction):.1%}"
    if any_row["status"] != OK:
        return [gone, any_row["status"]]
    first = figures.get("ttft_ms", {})
    return [
        gone,
        f"{any_row['tokens']} > {any_row['final_tokens']}",
        *(_cell(figures.get(name)) for name in ("encoder_ms", "llm_ms", "ttft_ms")),
        f"{float(first['bound']):.2f}x" if first.get("bound") else "-",
        f"{float(first['share_of_bound']):.2f}" if first.get("share_of_bound") else "-",
        f"{float(figures['own_share']['value']):.1%}" if "own_share" in figures else "-",
        *(_cell(figures.get(name)) for name in ("decode", "requests")),
        _cell(figures.get("kv_cache"), 1e6),
        _cell(figures.get("peak_memory"), 1e9),
    ]


def _cell(row: Row | None, unit: float = 1.0) -> str:
    if row is None:
        return "-"
    value = float(row["value"]) / unit
    text = f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    return f"{text} ({float(row['ratio']):.2f}x)" if row["ratio"] else text


# For the README -----------------------------------------------------------------------------------


def markdown(own: Sequence[Row], every: Sequence[Row]) -> str:
    """The README's block: targets, filled from rows of a GPU or "not measured", and tables of a CPU run.

    Args:
        own: rows of the run the tables show.
        every: rows of all devices.
    """
    gpu = [row for row in every if row["device"] == "cuda" and row["size"] == "full" and row["status"] == OK]
    lines = [
        "## Speed at true sizes",
        "",
        "`python benchmarks/speed.py --device cuda` builds Qwen2.5-VL 3B and 7B, InternVL-2.5 8B and 26B and",
        "LLaVA-OneVision 7B at their true sizes with random weights and measures encoder, prefill, first",
        "token, decoding and memory, patched and unpatched in turn; `benchmarks/gpu.sh FOLDER` runs all GPU",
        "checks and tables in under ten minutes.",
        "",
        "| figure | target | measured on a GPU |",
        "|---|---|---|",
        *(f"| {name} | {target} | {value(gpu) or NOT_MEASURED} |" for name, target, value in TARGETS),
        "",
    ]
    cpu = [row for row in own if row["device"] == "cpu" and row["status"] == OK]
    return "\n".join(lines + (_cpu_block(cpu) if cpu else [])) + "\n"


def _cpu_block(rows: Sequence[Row]) -> list[str]:
    first = rows[0]
    lines = [
        f"The same command on a CPU, models at reduced sizes ({first['gpu']}, {first['threads']} thread(s), "
        f"torch {first['torch']}, transformers {first['transformers']}, {first['dtype']}, "
        f"{_rounds(rows)} rounds). **Noisy**: the machine was shared with other work. It shows that the "
        "benchmark runs and what illava's own code costs, not what a real model gains.",
        "",
        "One picture, 88.9 % of the visual tokens gone; time to the first token:",
        "",
        "| model (reduced) | visual tokens | bound | measured (quartiles) | encoder | LLM | KV cache |",
        "|---|---|---|---|---|---|---|",
    ]
    found = {case: value for case, value in arms(rows).items() if case[2] == "picture" and case[5] == "1"}
    for case, measured in found.items():
        figures = measured.get((OURS, "0.889"), {})
        if "ttft_ms" in figures:
            row = figures["ttft_ms"]
            others = (figures[n]["ratio"] for n in ("encoder_ms", "llm_ms", "kv_cache"))
            cells = " | ".join(f"{float(x):.2f}x" for x in others)
            lines.append(
                f"| {MODELS[case[0]].title} | {int(row['tokens']):,} to {row['final_tokens']} | "
                f"{float(row['bound']):.2f}x | {_spread(row)} | {cells} |"
            )
    case = max(found, key=lambda c: (c[0] == "qwen2.5-vl-7b", int(c[4])), default=None)
    if case is None:
        return lines
    lines += [
        "",
        f"Beside other ways to the same number of final tokens, {MODELS[case[0]].title} (reduced), "
        f"{int(case[4]):,} visual tokens; times faster to the first token than unpatched:",
        "",
        "| | visual tokens | bound | measured (quartiles) |",
        "|---|---|---|---|",
    ]
    for name in (OURS, *RIVALS):
        figures = found[case].get((name, "0" if name == SMALLER_MODEL else "0.889"), {})
        if "ttft_ms" in figures:
            row = figures["ttft_ms"]
            bound = f"{float(row['bound']):.2f}x" if row["bound"] else ""
            lines.append(
                f"| {name} | {int(row['tokens']):,} to {row['final_tokens']} | {bound} | {_spread(row)} |"
            )
    notes = [f"- **{name}**: {r.what}. {r.note}".rstrip() for name, r in RIVALS.items() if r.note]
    return [*lines, "", *notes]


def _rounds(rows: Sequence[Row]) -> str:
    counts = sorted({int(row["n"]) for row in rows if row["figure"] == "ttft_ms"})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _spread(row: Row) -> str:
    text = f"{float(row['ratio']):.2f}x"
    if row["ratio_p25"]:
        text += f" ({float(row['ratio_p25']):.2f} to {float(row['ratio_p75']):.2f})"
    return text


def _pick(rows: Sequence[Row], figure: str, **wanted: str) -> list[Row]:
    return [r for r in rows if r["figure"] == figure and all(r[k] == v for k, v in wanted.items())]


def _both(say: Callable[[str], str]) -> str:
    """What is said of the default and of the paper's rule, which needs statistics of attention besides."""
    return ", ".join(f"{said} ({arm})" for arm in (OURS, RECYCLE) if (said := say(arm)))


def _share_of_bound(rows: Sequence[Row], least: int, most: int) -> str:
    def say(arm: str) -> str:
        found = [
            r for r in _pick(rows, "ttft_ms", model="qwen2.5-vl-7b", arm=arm, dtype="bfloat16")
            if r["content"] == "picture" and r["attn"].startswith("flash")
            and r["share_of_bound"] and float(r["reduction"]) > 0 and least <= int(r["tokens"]) <= most
        ]  # fmt: skip
        return f"{min(float(r['share_of_bound']) for r in found):.2f} at least" if found else ""

    return _both(say)


def _own_share(rows: Sequence[Row]) -> str:
    def say(arm: str) -> str:
        found = _pick(rows, "own_share", model="qwen2.5-vl-7b", arm=arm)
        return f"{max(float(r['value']) for r in found):.1%} at most" if found else ""

    return _both(say)


def _nothing(rows: Sequence[Row]) -> str:
    found = [r for r in _pick(rows, "ttft_ms", arm=OURS, reduction="0") if r["ratio"]]
    return f"{max(abs(1 / float(r['ratio']) - 1) for r in found):.1%} at most" if found else ""


def _peak(rows: Sequence[Row]) -> str:
    found = [r for r in _pick(rows, "peak_memory", arm=OURS) if r["share_of_bound"]]
    return f"{max(1 / float(r['share_of_bound']) - 1 for r in found):+.1%} at most" if found else ""


def _first_token(rows: Sequence[Row]) -> str:
    parts = []
    for arm in (OURS, RECYCLE, EARLY):
        found = _pick(rows, "ttft_ms", model="qwen2.5-vl-7b", arm=arm, reduction="0.889",
                      asked_tokens="16384", content="picture", batch="1")  # fmt: skip
        parts += [f"{r['ratio']}x ({arm}, {r['attn']})" for r in found if r["ratio"]]
    return ", ".join(parts)


def _against_smaller(rows: Sequence[Row], model: str) -> str:
    """Requests per second, patched at 88.9 %, over the smaller model's unpatched ones, both over the same."""
    same = ("attn", "content", "asked_tokens", "batch")
    smaller = {tuple(r[n] for n in same): r for r in _pick(rows, "requests", model=model, arm=SMALLER_MODEL)}
    found = [
        (r, smaller[tuple(r[n] for n in same)])
        for r in _pick(rows, "requests", model=model, arm=OURS, reduction="0.889")
        if tuple(r[n] for n in same) in smaller
    ]
    return ", ".join(
        f"{float(a['value']) / float(b['value']):.2f}x ({a['asked_tokens']} tokens, batch {a['batch']}, "
        f"{a['attn']})"
        for a, b in found
    )


TARGETS: tuple[tuple[str, str, Callable[[Sequence[Row]], str]], ...] = (
    (
        "prefill speed-up / bound, 7B bf16, 4,096 visual tokens and more, flash",
        ">= 0.90",
        lambda rows: _share_of_bound(rows, 4096, 10**9),
    ),
    ("the same at 1,024", ">= 0.80", lambda rows: _share_of_bound(rows, 1024, 1024)),
    ("all merging work, share of prefill", "<= 3 %", _own_share),
    ("column-sum kernel over a whole attention layer", "<= 40 %", lambda rows: ""),
    ("column-sum kernel, share of its own floor", ">= 60 %", lambda rows: ""),
    ("`reduction=0` against unpatched", "within 1 %", _nothing),
    ("peak memory above the plan's arithmetic", "<= 2 %", _peak),
    ("time to first token, 88.9 %, 7B, 16,384 tokens", ">= 2.2x, and >= 4x (illava early)", _first_token),
    (
        "InternVL-2.5 26B patched (88.9 %) against 8B unpatched, throughput",
        ">= 1x",
        lambda rows: _against_smaller(rows, "internvl2.5-26b"),
    ),
    (
        "Qwen2.5-VL 7B patched (88.9 %) against 3B unpatched, throughput",
        ">= 1x",
        lambda rows: _against_smaller(rows, "qwen2.5-vl-7b"),
    ),
)
