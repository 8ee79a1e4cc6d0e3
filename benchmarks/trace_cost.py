"""What `trace=True` costs, and `trace=False` does not: `python benchmarks/trace_cost.py`.

One alternating run, in processor seconds of one thread: illava without the code of the records, taken
out of its source, twice, so that the ratio of both is the machine's noise; `trace=False`; `trace=True`; and
`trace=True` with `report.provenance` put together. That `trace=False` runs no operation, hook or line of the
records' code is what tests/test_trace_cost.py shows; no timing could.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import random
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import illava
from illava import language_entry
from illava.hooks import EncoderHooks
from illava.hooks import language as language_hooks
from illava.language import LanguageCall
from illava.vision import VisionCall

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from readers import batches, tasks  # noqa: E402

READER = ROOT / "checkpoints" / "qwen2_5_vl"
WITHOUT, TOGETHER = "without the records' code", "trace=True, report.provenance put together"
RATIOS = (f"{WITHOUT}, again", "trace=False", "trace=True", TOGETHER)


# Where a call asks whether it is traced.
ASKING: tuple[tuple[Any, str], ...] = (
    (VisionCall, "__init__"),
    (VisionCall, "merge"),
    (language_entry, "enter"),
    (LanguageCall, "merge"),
    (EncoderHooks, "leave_projector"),
    (EncoderHooks, "pack"),
    (language_hooks, "build_report"),
)


class _Untraced(ast.NodeTransformer):
    """Takes out what only a traced call does, and the question whether it is one."""

    taken = 0

    def visit_If(self, node: ast.If) -> ast.AST:
        if any(isinstance(part, ast.Attribute) and part.attr == "trace" for part in ast.walk(node.test)):
            self.taken += 1
            return ast.Pass()
        return self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        if isinstance(node.test, ast.Name) and node.test.id == "traced":
            self.taken += 1
            return node.orelse
        return self.generic_visit(node)


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, compiled anew from its source without what is there for traced calls."""
    plain, cut = inspect.unwrap(function), _Untraced()
    tree = cut.visit(ast.parse(textwrap.dedent(inspect.getsource(plain))))
    if not cut.taken:
        raise ValueError(f"{plain.__qualname__} asks for no trace; bring ASKING up to date")
    made: dict[str, Any] = {}
    code = compile(ast.fix_missing_locations(tree), inspect.getfile(plain), "exec")
    exec(code, plain.__globals__, made)
    return made[plain.__name__]


@contextmanager
def without_records() -> Iterator[None]:
    """Illava as if tracing had never been written, whoever asks for it."""
    before = [(place, name, getattr(place, name)) for place, name in ASKING]
    try:
        for place, name, function in before:
            setattr(place, name, untraced(function))
        yield
    finally:
        for place, name, function in before:
            setattr(place, name, function)


def quartiles(ratios: list[float]) -> str:
    """The median, and quartiles in brackets."""
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def interval(ratios: list[float], draws: int = 4000) -> str:
    """95 % interval of the median, by drawing rounds anew."""
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(draws))
    return f"{medians[draws // 40]:.3f} to {medians[-1 - draws // 40]:.3f}"


def measure(rounds: int, side: int, reduction: float) -> dict[str, list[float]]:
    """Processor seconds of each round's prefill, by how illava ran."""
    model = AutoModelForImageTextToText.from_pretrained(READER, use_safetensors=True).float().eval()
    composer = batches.Composer(model, AutoProcessor.from_pretrained(READER))
    item = tasks.held_out_item("find", "test", 0, side=side)
    inputs = composer.prompt(item, item.questions[0].text)
    seconds: dict[str, list[float]] = {name: [] for name in (WITHOUT, *RATIOS)}
    chance = random.Random(0)
    with torch.inference_mode():
        for number in range(rounds + 1):
            for name in chance.sample(sorted(seconds), len(seconds)):
                with (
                    without_records() if name.startswith(WITHOUT) else nullcontext(),
                    illava.patch(model, reduction=reduction, trace=name.startswith("trace=True")) as handle,
                ):
                    start = time.process_time()
                    model(**inputs)
                    if name == TOGETHER:
                        handle.report.provenance  # noqa: B018 - made when asked for
                    taken = time.process_time() - start
                if number:  # the first round warms up
                    seconds[name].append(taken)
    return seconds


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--side", type=int, default=192, help="pixels of the picture's side: 96, 128 or 192")
    parser.add_argument("--reduction", type=float, default=2 / 3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    seconds = measure(options.rounds, options.side, options.reduction)
    base = seconds[WITHOUT]
    print(f"{WITHOUT}: {1000 * statistics.median(base):.1f} ms, {options.rounds} alternating rounds")
    print("ratios to that: median (quartiles), 95 % interval of the median")
    for name in RATIOS:
        ratios = [mine / other for mine, other in zip(seconds[name], base, strict=True)]
        print(f"{name}: {quartiles(ratios)}, {interval(ratios)}")


if __name__ == "__main__":
    main()
