"""Results as tables for people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from illava.evaluate.answers import Comparison
from illava.evaluate.architectures import Architecture
from illava.evaluate.found import BEST, DEFAULT, Choice, Found
from illava.evaluate.quality import Fidelity
from illava.evaluate.speed import OK, Bench, Figure
from illava.evaluate.statistics import Estimate
from illava.families.about import About

_GIB, _MIB = 2**30, 2**20


def bench_table(result: Bench, shown: str) -> Table:
    """Figures under each plan, ratios to the unpatched model and bounds."""
    about = result.environment
    weights = ", random weights" if about["random_weights"] else ""
    table = Table(
        title=f"{Path(about['model']).name} on {about['device']}, {about['dtype']}{weights}: {shown}",
        caption=f"median of {result.rounds} rounds, all in turns; quartiles of the ratio in brackets",
        title_justify="left", caption_justify="left",
    )  # fmt: skip
    table.add_column("reduction or plan")
    for name in ("visual\ntokens", "first\ntoken", "times\nfaster", "bound", "encoder", "language\nmodel"):
        table.add_column(name, justify="right")
    decoded = any("decode_tokens_per_s" in row.figures for row in result.rows)
    counted = any("peak_bytes" in row.figures for row in result.rows)
    if decoded:
        table.add_column("decoding\ntokens/s", justify="right")
    table.add_column("KV cache", justify="right")
    if counted:
        table.add_column("peak\nmemory", justify="right")
    for row in result.rows:
        if row.status != OK:
            table.add_row(row.name, "", Text(row.status, style="yellow"))
            continue
        tokens = f"{row.tokens:,}" + (f" to {row.final_tokens:,}" if row.final_tokens != row.tokens else "")
        first = row.figures["ttft_ms"]
        cells = [row.name, tokens if row.tokens else "", f"{first.value.value:,.0f} ms", _ratio(first)]
        cells.append(f"{first.bound:.2f}x" if first.bound else "")
        cells += [_times(row.figures[name]) for name in ("encoder_ms", "llm_ms")]
        if decoded:
            figure = row.figures.get("decode_tokens_per_s")
            cells.append(f"{figure.value.value:,.0f}" if figure else "")
        cells.append(_size(row.figures["kv_bytes"]))
        if counted:
            cells.append(_size(row.figures["peak_bytes"]) if "peak_bytes" in row.figures else "")
        table.add_row(*cells)
    return table


def _ratio(figure: Figure) -> str:
    ratio = figure.ratio
    return "" if ratio is None else f"{ratio.value:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})"


def _times(figure: Figure) -> str:
    ratio = "" if figure.ratio is None else f" {figure.ratio.value:.2f}x"
    return f"{figure.value.value:,.0f} ms{ratio}"


def _size(figure: Figure) -> str:
    held, ratio = figure.value.value, figure.ratio
    shown = f"{held / _GIB:.2f} GiB" if held >= _GIB else f"{held / _MIB:.1f} MiB"
    return shown if ratio is None else f"{shown} {ratio.value:.2f}x"


def comparison_table(found: Comparison) -> Table:
    """Both answers, how long the first token took, and what it cost."""
    table = Table(caption="the same answer" if found.equal else "different answers", caption_justify="left")
    for name in ("", "visual\ntokens", "first\ntoken", "times\nfaster", "answer"):
        table.add_column(name, justify="left" if name in ("", "answer") else "right")
    report = found.patched.report
    tokens = ("", "") if report is None else (f"{report.tokens:,}", f"{report.final_tokens:,}")
    for said, row, left in zip((found.unpatched, found.patched), found.speed.rows, tokens, strict=True):
        first = row.figures.get("ttft_ms")
        time = "" if first is None else f"{first.value.value:,.0f} ms"
        ratio = "" if first is None or first.ratio is None else f"{first.ratio.value:.2f}x"
        table.add_row(row.name, left, time, ratio, Text(said.text))
    return table


def fidelity_table(found: Fidelity, model: str) -> Table:
    """Agreement with the unpatched model under each plan."""
    first = next(iter(found.agreement.values()))
    skipped = f", {len(found.skipped)} left out" if found.skipped else ""
    table = Table(
        title=f"{Path(model).name} against itself unpatched: {first.items} items{skipped}",
        caption="95 % intervals in brackets", title_justify="left", caption_justify="left",
    )  # fmt: skip
    table.add_column("reduction or plan")
    for name in (
        "same\nanswer",
        "but for\nspelling",
        "equal tokens\n(teacher forced)",
        "KL divergence\nnats",
    ):
        table.add_column(name, justify="right")
    for name, of in found.agreement.items():
        kl = f"{of.kl.value:.4f} ({of.kl.low:.4f} to {of.kl.high:.4f})"
        table.add_row(name, _share(of.exact), _share(of.normalised), _share(of.equal_tokens), kl)
    return table


def _share(estimate: Estimate) -> str:
    return f"{estimate.value:.1%} ({estimate.low:.1%} to {estimate.high:.1%})"


def plan_table(found: Found) -> Table:
    """The plan that was found, beside the default and the unpatched model."""
    seen = "that had no part in the search" if found.unseen else "that it was chosen on"
    table = Table(
        title=f"{found.tried} runs of plans; agreement on {found.items} answers {seen}",
        caption="95 % intervals, and quartiles of times, in brackets; times are of one alternating run",
        title_justify="left", caption_justify="left",
    )  # fmt: skip
    for name in ("", "same answer", "visual\ntokens", "fewer\noperations", "first\ntoken", "times\nfaster"):
        table.add_column(name, justify="right" if name else "left")
    measured: dict[str, Figure] = {}
    if found.speed is not None:
        measured = {row.name: row.figures["ttft_ms"] for row in found.speed.rows if row.figures}
    table.add_row("unpatched", "100 %", f"{found.largest:,}", "1.00x", *_time(measured.get("unpatched")))
    if found.as_strong is not None:
        table.add_row(*_choice(DEFAULT, found.as_strong, None))
        if found.default is None:
            table.add_row(f"{DEFAULT}, fewer removed", Text("none agrees as asked for", style="yellow"))
        else:
            table.add_row(*_choice(DEFAULT, found.default, measured.get(DEFAULT)))
    table.add_row(*_choice(BEST, found.best, measured.get(BEST)), style="bold")
    return table


def _choice(name: str, choice: Choice, time: Figure | None) -> list[str]:
    reduction = "" if choice.plan.reduction is None else f", {100 * choice.plan.reduction:.3g} % removed"
    return [
        name + reduction, _share(choice.agreement), f"{choice.final_tokens:,}", f"{choice.bound:.2f}x",
        *_time(time),
    ]  # fmt: skip


def _time(figure: Figure | None) -> tuple[str, str]:
    return ("", "") if figure is None else (f"{figure.value.value:,.0f} ms", _ratio(figure))


def models_table(rows: Mapping[str, About], versions: Mapping[str, Any]) -> Table:
    """Every architecture."""
    table = Table(
        title=", ".join(f"{name} {version}" for name, version in versions.items()),
        caption='layers are where merge="recycle" merges, from 0; the default does at a quarter to three '
        "quarters of any encoder, a quarter and half of any decoder; `illava models MODEL` shows where",
        title_justify="left", caption_justify="left",
    )  # fmt: skip
    for name in (
        "model_type",
        "models",
        "one merge unit",
        "encoder blocks",
        "decoder layers",
        "transformers",
    ):
        table.add_column(name, overflow="fold")
    for name, about in rows.items():
        versions_run = ", ".join(about.transformers)
        table.add_row(
            name, about.title, about.merge_unit, about.encoder_blocks, about.decoder_layers, versions_run
        )
    return table


def architecture_table(found: Architecture) -> Table:
    """One checkpoint's default plan."""
    table = Table(title=f"{found.name}: {found.about.title}", title_justify="left", show_header=False)
    plan = found.plan
    table.add_row("model_type", found.model_type)
    table.add_row("one merge unit", found.about.merge_unit)
    table.add_row("encoder blocks that merge", f"{list(plan.vit_layers)} of {plan.vit_depth}")
    if found.windowed:
        table.add_row("blocks that attend in windows", str(list(found.windowed)))
    table.add_row("decoder layers that merge", f"{list(plan.llm_layers)} of {plan.llm_depth}")
    table.add_row("rule", f"{plan.settings.merge}; the encoder removes {plan.encoder_share:.0%} of what goes")
    for side in (256, 1024, 4096):
        one = plan.segment(1, side)
        table.add_row(
            f"a picture of {side:,} tokens",
            f"{one.encoder_tokens:,} leave the encoder, {one.final_tokens:,} the last merge",
        )
    return table
