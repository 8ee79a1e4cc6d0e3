"""The plot of speed.py: speed-up against reduction beside its bound, and rivals at the same final tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speed_cases import OURS, RIVALS
from speed_models import MODELS

Row = dict[str, str]


def plot(rows: Sequence[Row], path: Path) -> list[Path]:
    """Write `path`.png and .svg: a column for each model, of the cases with one picture and batch 1.

    Returns:
        What was written: nothing if no such case was measured.
    """
    found = [
        row for row in rows
        if row["figure"] == "ttft_ms" and row["ratio"] and row["content"] == "picture" and row["batch"] == "1"
    ]  # fmt: skip
    models = [name for name in MODELS if any(row["model"] == name for row in found)]
    if not models:
        return []
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "illava"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        2, len(models), figsize=(3.6 * len(models) + 1.2, 6.6), squeeze=False, layout="constrained"
    )
    for column, name in enumerate(models):
        own = [row for row in found if row["model"] == name]
        _lines(axes[0][column], [row for row in own if row["arm"] == OURS])
        _bars(axes[1][column], own)
        axes[0][column].set_title(MODELS[name].title)
    axes[0][0].set_ylabel("time to first token, times faster")
    first = found[0]
    size = "" if first["size"] == "full" else f" ({first['size']} sizes)"
    figure.suptitle(f"{first['gpu']}, {first['dtype']}{size}: unpatched / patched; dashed: the plan's bound")
    written = []
    for suffix, metadata in ((".png", None), (".svg", {"Date": None})):
        target = path.parent / f"{path.name}{suffix}"
        figure.savefig(target, dpi=130, metadata=metadata)
        written.append(target)
    plt.close(figure)
    return written


def _lines(axis: Any, rows: Sequence[Row]) -> None:
    series = sorted({(row["attn"], int(row["asked_tokens"])) for row in rows}, key=lambda s: (s[0], s[1]))
    for number, (attn, tokens) in enumerate(series):
        points = sorted(
            (float(row["reduction"]), float(row["ratio"]), float(row["bound"] or "nan"))
            for row in rows
            if row["attn"] == attn and int(row["asked_tokens"]) == tokens
        )
        x = [100 * reduction for reduction, _, _ in points]
        label = f"{tokens:,} tokens" + ("" if attn == "sdpa" else f", {attn}")
        axis.plot(x, [y for _, y, _ in points], "o-", color=f"C{number}", markersize=3.5, label=label)
        axis.plot(x, [y for _, _, y in points], "--", color=f"C{number}", linewidth=1, alpha=0.7)
    axis.axhline(1, color="0.7", linewidth=0.8)
    axis.set_xlabel("reduction, %")
    if series:
        axis.legend(fontsize=7)


def _bars(axis: Any, rows: Sequence[Row]) -> None:
    """Of the largest case with rivals, at their largest reduction."""
    rivals = [row for row in rows if row["arm"] in RIVALS]
    axis.set_axis_off()
    if not rivals:
        return
    axis.set_axis_on()
    tokens = max(int(row["asked_tokens"]) for row in rivals)
    reduction = max(float(row["reduction"]) for row in rivals)
    attn = rivals[0]["attn"]
    order = [OURS, *RIVALS]
    shown = {
        row["arm"]: row for row in rows
        if int(row["asked_tokens"]) == tokens and row["attn"] == attn
        and (float(row["reduction"]) == reduction or (row["arm"] in RIVALS and float(row["reduction"]) == 0))
    }  # fmt: skip
    names = [name for name in order if name in shown][::-1]
    ratios = [float(shown[name]["ratio"]) for name in names]
    axis.barh(names, ratios, color=["C1" if name == OURS else "0.75" for name in names])
    for place, name in enumerate(names):
        if shown[name]["bound"]:
            bound = float(shown[name]["bound"])
            axis.plot([bound, bound], [place - 0.4, place + 0.4], "--", color="0.2", linewidth=1)
    axis.axvline(1, color="0.4", linewidth=0.8)
    axis.tick_params(labelsize=7)
    axis.set_xlabel(f"times faster, {tokens:,} tokens, {100 * reduction:.1f} % gone", fontsize=8)
