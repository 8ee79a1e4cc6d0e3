"""What `trace=True` costs, and `trace=False` does not: `python benchmarks/trace_cost.py`.

One alternating run, in processor seconds of one thread: `trace=False` twice, whose ratio is the machine's
noise, `trace=True`, and `trace=True` with `report.provenance` put together. That `trace=False` runs no
operation, hook or line of the records' code is what tests/test_trace_cost.py shows; no timing could.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import illava

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from readers import batches, tasks  # noqa: E402

READER = ROOT / "checkpoints" / "qwen2_5_vl"


def quartiles(ratios: list[float]) -> str:
    """The median, and quartiles in brackets."""
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def measure(rounds: int, side: int, reduction: float) -> dict[str, list[float]]:
    """Processor seconds of each round's prefill, by what it was patched with."""
    model = AutoModelForImageTextToText.from_pretrained(READER, use_safetensors=True).float().eval()
    composer = batches.Composer(model, AutoProcessor.from_pretrained(READER))
    item = tasks.held_out_item("find", "test", 0, side=side)
    inputs = composer.prompt(item, item.questions[0].text)
    seconds: dict[str, list[float]] = {"off": [], "off again": [], "on": [], "on, put together": []}
    with torch.inference_mode():
        for number in range(rounds + 1):
            for name in sorted(seconds, reverse=bool(number % 2)):
                with illava.patch(model, reduction=reduction, trace=name.startswith("on")) as handle:
                    start = time.process_time()
                    model(**inputs)
                    if name == "on, put together":
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
    off = seconds["off"]
    print(f"trace=False: {1000 * statistics.median(off):.1f} ms, {options.rounds} alternating rounds")
    for name in ("off again", "on", "on, put together"):
        ratios = [mine / base for mine, base in zip(seconds[name], off, strict=True)]
        print(f"{name} / off: {quartiles(ratios)}")


if __name__ == "__main__":
    main()
