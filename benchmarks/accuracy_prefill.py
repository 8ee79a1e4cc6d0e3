"""What the methods of accuracy.py save on the readers: operations, and time to the first token.

    python benchmarks/accuracy_prefill.py                    # some twenty minutes on a CPU
    python benchmarks/accuracy.py --show --readme            # puts both beside the accuracies

Batches of held-out items are prefilled by the unpatched model, by every method in turn at the strength at
which its accuracy was measured, and by the unpatched model again; a ratio is the mean of a round's
unpatched times by the method's. A reader's encoder is wide beside its language model and its matrices are
small, so that both figures say how the methods compare here, not what a 7B gains (`prefill.py`,
`speed.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accuracy import REDUCTIONS, RESULTS, ROOT, VIDEO_REDUCTIONS, append
from accuracy_ablations import PLANS
from accuracy_measure import BUDGETS, Cell, Method, Reader, load, prepared, ready, versions
from accuracy_show import read
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import illava
from illava import Plan
from illava.evaluate.statistics import middle
from illava.evaluate.timing import Side
from readers import tasks
from rivals import RIVALS

TASKS = {"find": 8, "video": 4}  # items of a batch: one picture of 192 px each, a clip of eight frames
COLUMNS = (
    "reader", "method", "reduction", "budget", "task", "batch", "rounds", "operations", "speedup", "p25",
    "p75", "time_unpatched_ms", "illava", "torch", "transformers", "device", "threads",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Arm:
    """A method and what it shows the model: whole pictures, or smaller ones."""

    method: Method
    side: Side

    def ms(self) -> float:
        """To the first token, once."""
        with self.method.patch():
            return self.side.prefill().ttft_ms

    def operations(self) -> float:
        """Of a prefill."""
        with self.method.patch() as handle:
            if handle is not None:
                self.side.prefill()
                return _total(handle.report.flops, "with_")
        # The method leaves the model alone: a report of any merging tells what the unpatched model does.
        with illava.patch(self.side.model, plan=Plan(vit_layers=(), reduction=0.5)) as handle:
            self.side.prefill()
        return _total(handle.report.flops, "without")


def _total(flops: Any, which: str) -> float:
    return getattr(flops.vision, which) + getattr(flops.language, which)


def arms(
    reader: Reader, reduction: float, budget: str, task: str, methods: Iterable[str] = RIVALS
) -> dict[str, Arm]:
    """Those of the methods that can do what is asked for, and unpatched first."""
    items = [tasks.held_out_item(task, "test", number) for number in range(TASKS[task])]
    found = {}
    for name in ("unpatched", *(name for name in methods if name != "unpatched")):
        method = ready(reader, Cell(reader.name, name, reduction, budget, task, "test"), items[0], PLANS)
        if isinstance(method, str):
            continue
        shown = [prepared(item, method) for item in items]
        inputs = reader.composer.prompts(shown, [item.questions[0].text for item in items])
        found[name] = Arm(method, Side(reader.model, inputs.to(reader.model.device)))
    return found


def compare(found: dict[str, Arm], rounds: int, progress: Callable[[], None]) -> list[dict[str, Any]]:
    """Time the arms against the first of them, in turns: a row for each of the others.

    Args:
        found: as `arms` makes them.
        rounds: timed calls of each.
        progress: called after every call.
    """
    base, *others = found
    operations = {}
    for name, arm in found.items():
        operations[name] = arm.operations()  # which warms it up, too
        progress()

    def timed(name: str) -> float:
        ms = found[name].ms()
        progress()
        return ms

    unpatched, ratios = [], defaultdict(list)
    for _ in range(rounds):
        before = timed(base)
        spent = {name: timed(name) for name in others}
        unpatched.append((before + timed(base)) / 2)
        for name, ms in spent.items():
            ratios[name].append(unpatched[-1] / ms)
    rows = []
    for name in others:
        ratio = middle(ratios[name])
        rows.append({
            "method": name, "rounds": rounds, "operations": f"{operations[name] / operations[base]:.4f}",
            "speedup": f"{ratio.value:.4f}", "p25": f"{ratio.low:.4f}", "p75": f"{ratio.high:.4f}",
            "time_unpatched_ms": f"{statistics.median(unpatched):.1f}",
        })  # fmt: skip
    return rows


def groups(readers: list[str]) -> list[tuple[str, str, float, str]]:
    """What is timed in one run of turns: reader, budget, reduction and task."""
    return [
        (reader, budget, reduction, task)
        for reader in readers
        for budget in BUDGETS
        for task, shares in (("find", REDUCTIONS), ("video", VIDEO_REDUCTIONS))
        for reduction in shares
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--readers", nargs="+", default=sorted(p.parent.name for p in ROOT.glob("checkpoints/*/config.json")))
    add("--folder", type=Path, default=ROOT / "checkpoints", help="where the readers' folders lie")
    add("--rounds", type=int, default=3, help="of timing every method")
    add("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    add("--out", type=Path, default=RESULTS / "accuracy_prefill.csv")
    return parser.parse_args()


def run(options: argparse.Namespace, console: Console) -> None:
    """Measure what is not in the CSV yet, the methods of a group in turns with the unpatched model."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    there = {(r["reader"], r["budget"], r["reduction"], r["task"], r["method"]) for r in read(options.out)}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    left = groups(options.readers)
    with Progress(*columns, console=console) as bar:
        whole = bar.add_task("", total=len(left))
        for name, budget, reduction, task in left:
            bar.update(whole, description=f"{name} {reduction:.1%} of {task}, the same {budget}")
            about = (name, budget, f"{reduction:.4f}", task)
            reader = load(options.folder / name, device)
            lacking = [method for method in RIVALS if (*about, method) not in there]
            found = arms(reader, reduction, budget, task, lacking)
            if len(found) == 1:  # what is lacking is what no method can do
                bar.advance(whole)
                continue
            calls = bar.add_task("calls", total=len(found) + options.rounds * (len(found) + 1))
            made = compare(found, options.rounds, partial(bar.advance, calls))
            bar.remove_task(calls)
            asked = dict(zip(("reader", "budget", "reduction", "task"), about, strict=True))
            asked |= {"batch": TASKS[task], "threads": torch.get_num_threads(), **versions()}
            append(options.out, *(row | asked for row in made), columns=COLUMNS)
            bar.advance(whole)


def main() -> None:
    options, console = parse(), Console()
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        run(options, console)
    except KeyboardInterrupt:
        console.print(f"stopped; {options.out} holds what was measured, the same command goes on")
        sys.exit(130)


if __name__ == "__main__":
    main()
