"""The plot of `bench`: how many times faster each plan is, beside what its operations allow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from illava.errors import DataError
from illava.evaluate.speed import Bench
from illava.extras import required

_SHOWN = {
    "ttft_ms": "time to the first token",
    "llm_ms": "prefill of the language model",
    "encoder_ms": "encoder and projector",
    "kv_bytes": "key-value cache",
    "peak_bytes": "peak memory",
    "decode_tokens_per_s": "decoding",
}


def plot(result: Bench, path: str | Path) -> Path:
    """Write a plot, as PNG, SVG or PDF by the path's suffix.

    Raises:
        MissingExtraError: matplotlib is not installed.
        DataError: a suffix matplotlib cannot write, or nothing was measured beside the unpatched model.
    """
    path = Path(path)
    figure = required("matplotlib.figure", "evaluate").Figure(figsize=(8, 4.2), layout="constrained")
    rows = [row for row in result.rows[1:] if row.figures]
    names = [name for name in _SHOWN if any(_ratio(row, name) is not None for row in rows)]
    if not names:
        raise DataError(f"nothing to draw in {path}: no plan was measured beside the unpatched model")
    axis: Any = figure.subplots()
    width = 0.8 / len(names)
    for number, name in enumerate(names):
        at = [place + (number - (len(names) - 1) / 2) * width for place in range(len(rows))]
        found = [row.figures[name].ratio if name in row.figures else None for row in rows]
        heights = [ratio.value if ratio else 0 for ratio in found]
        spread = [
            [ratio.value - ratio.low if ratio else 0 for ratio in found],
            [ratio.high - ratio.value if ratio else 0 for ratio in found],
        ]
        axis.bar(at, heights, width, yerr=spread, label=_SHOWN[name], error_kw={"linewidth": 0.8})
        for place, row in zip(at, rows, strict=True):
            bound = row.figures[name].bound if name in row.figures else None
            if bound is not None:
                axis.hlines(bound, place - width / 2, place + width / 2, color="black", linestyle="--")
    axis.axhline(1, color="0.4", linewidth=0.8)
    axis.set_xticks(range(len(rows)), [row.name for row in rows])
    axis.set_ylabel("times better than unpatched")
    about = result.environment
    axis.set_title(
        f"{Path(about['model']).name}, {about['device']}, {about['dtype']}; dashed: the plan's bound",
        fontsize=9,
    )
    axis.legend(fontsize=8)
    try:
        figure.savefig(path, dpi=130)
    except ValueError as error:
        raise DataError(f"{path}: {error}; give a path that ends in .png, .svg or .pdf") from error
    return path


def _ratio(row: Any, name: str) -> Any:
    return row.figures[name].ratio if name in row.figures else None
