"""What merging could save of Qwen2.5-VL's prefill at its true sizes, by arithmetic alone.

    python benchmarks/bounds.py                      # some seconds, on any machine
    python benchmarks/bounds.py --tokens 16384

The bound is how many times fewer operations a prefill of one picture and a short prompt needs, counted as
`handle.report.flops` counts them. The models have no weights (torch's meta device); nothing is run or timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import transformers
from prefill_models import build_config
from rich.console import Console
from rich.table import Table
from speed_models import MODELS

import illava
from illava.families import family_of
from illava.families.seams import Seams
from illava.flops import count_flops, measure

SHOWN = ("qwen2.5-vl-3b", "qwen2.5-vl-7b")
UNIT = 4  # patches of a merge unit
Bound = Callable[[illava.Plan, int, int], float]


def bound_of(name: str) -> tuple[Seams, Bound]:
    """A model of `speed_models` at its true size, and the bound of a plan on it.

    Returns:
        The model's parts, and a function of a plan, a picture's visual tokens, and the prompt's text tokens.
    """
    family = MODELS[name].full
    with torch.device("meta"):
        kind = getattr(transformers, f"{family.name}ForConditionalGeneration")
        model = kind(build_config(family, family.shape))
    seams = family_of(model.config.model_type, kind.__name__).find_seams(model)
    shape = measure(seams)

    def bound(plan: illava.Plan, tokens: int, text: int) -> float:
        settled = seams.settle(plan)
        segment = settled.segment(1, tokens)
        return count_flops(settled, shape, [(segment, UNIT)], [(text, [segment])]).speedup_bound

    return seams, bound


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--tokens", type=int, default=1024, help="visual tokens of the picture")
    add("--text", type=int, default=32, help="text tokens")
    add("--reduction", type=float, nargs="+", default=[0.667, 0.778, 0.889])
    options = parser.parse_args()
    table = Table(
        title="Bound on a prefill's speed-up",
        caption=f"{options.tokens:,} visual tokens, {options.text} of text",
    )
    for column in ("model", "removed", "the default", 'merge="recycle"', "Plan.paper()"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name in SHOWN:
        _, bound = bound_of(name)
        for reduction in options.reduction:
            ranked = illava.Plan(reduction=reduction, merge="recycle")
            plans = [illava.Plan(reduction=reduction), ranked, illava.Plan.paper(reduction)]
            cells = [f"{bound(plan, options.tokens, options.text):.2f}x" for plan in plans]
            table.add_row(MODELS[name].title, f"{reduction:.1%}", *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
