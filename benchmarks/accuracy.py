"""Accuracy of merging and of its rivals on the readers: `python benchmarks/accuracy.py`.

The readers (`checkpoints/`, small real models that see; see their cards) answer held-out questions by
`generate`, unpatched and by every method at each reduction: once with as many tokens left after the last
stage (`--budget tokens`), once with as much visual-token compute (`--budget compute`). Answers count if they
are right word for word. Everything measured is appended to a CSV at once, one row a task, with right and
wrong of every item; what is there already is not measured again, so a stopped run goes on where it stopped.

    python benchmarks/accuracy.py --items 40 --out sample.csv            # minutes on a CPU
    python benchmarks/accuracy.py                                        # the README's tables: a GPU, or days
    python benchmarks/accuracy.py --methods ablations --split validation # the choice of defaults
    python benchmarks/accuracy.py --show                                 # tables and plots of what is there
    python benchmarks/accuracy_prefill.py                                # time and operations, for its tables

Defaults are chosen on the validation split; tables of methods are of the test split.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from accuracy_ablations import GROUPS, PLANS
from accuracy_measure import BUDGETS, Cell, Reader, load, measure, pack, ready, versions
from accuracy_page import BEGIN, END, page, readme_block
from accuracy_show import plots, read, tables
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from readers import tasks
from rivals import RIVALS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
REDUCTIONS = (2 / 3, 7 / 9, 8 / 9)
VIDEO_REDUCTIONS = (0.9, 0.95)
COLUMNS = (
    "reader", "method", "reduction", "budget", "task", "split", "items", "right", "final_ratio", "area",
    "seconds", "note", "weights", "illava", "torch", "transformers", "device", "bits",
)  # fmt: skip


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--readers", nargs="+", default=sorted(p.parent.name for p in ROOT.glob("checkpoints/*/config.json")))
    add("--folder", type=Path, default=ROOT / "checkpoints", help="where the readers' folders lie")
    add("--methods", nargs="+", default=["rivals"], help="names, 'rivals', 'ablations' or a group of those")
    add("--budget", nargs="+", default=list(BUDGETS), choices=BUDGETS)
    add("--tasks", nargs="+", default=list(tasks.TASKS), choices=tasks.TASKS)
    add("--reduction", nargs="+", type=float, help="default: 66.7, 77.8, 88.9 %%; 90 and 95 %% for video")
    add("--split", default="test", choices=("test", "validation"))
    add("--items", type=int, default=2000, help="of each task")
    add("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    add("--out", type=Path, default=RESULTS / "accuracy.csv")
    add("--readme", action="store_true", help="write the tables into README.md and docs/accuracy.md")
    add("--show", action="store_true", help="only tables and plots of what the CSV holds")
    return parser.parse_args(arguments)


def methods(names: list[str]) -> list[str]:
    """The methods that names and groups stand for, unpatched first."""
    groups = {"rivals": list(RIVALS), "ablations": ["illava", "illava recycle", "illava paper", *PLANS]}
    groups |= {group: list(plans) for group, plans in GROUPS.items()}
    chosen = ["unpatched"]
    for name in names:
        if name not in groups and name not in RIVALS and name not in PLANS:
            known = ", ".join([*groups, *RIVALS, *PLANS])
            raise SystemExit(f"--methods {name!r} is not known; choose from {known}")
        chosen += groups.get(name, [name])
    return list(dict.fromkeys(chosen))


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """Everything asked for, readers and reductions outermost, so that early rows compare all methods."""
    for reader in options.readers:
        for task in options.tasks:
            yield Cell(reader, "unpatched", 0.0, "tokens", task, options.split)
        for budget in options.budget:
            reductions = options.reduction or (*REDUCTIONS, *VIDEO_REDUCTIONS)
            for reduction in reversed(reductions):
                for method in methods(options.methods)[1:]:
                    for task in options.tasks:
                        suits = VIDEO_REDUCTIONS if task == "video" else REDUCTIONS
                        if options.reduction or reduction in suits:
                            yield Cell(reader, method, reduction, budget, task, options.split)


def done(path: Path) -> dict[tuple[str, ...], dict[str, str]]:
    """The rows of a CSV by what they measure; of several, the one of most items."""
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for row in read(path):
        key = tuple(row[name] for name in COLUMNS[:6])
        if key not in found or int(row["items"]) >= int(found[key]["items"]):
            found[key] = row
    return found


def run(options: argparse.Namespace, console: Console) -> None:
    """Measure what is not there yet, row by row."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = done(options.out)
    left = [
        cell
        for cell in cells(options)
        if int(known.get(cell.key, {}).get("items", -1)) < options.items
        and not known.get(cell.key, {}).get("note")
    ]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    reader: Reader | None = None
    with Progress(*columns, console=console) as bar:
        shown = bar.add_task("", total=len(left) * options.items)
        for cell in left:
            bar.update(shown, description=f"{cell.reader} {cell.method} {cell.reduction:.1%} {cell.task}")
            if reader is None or reader.name != cell.reader:
                reader = load(options.folder / cell.reader, device)
            row = {**dict(zip(COLUMNS[:6], cell.key, strict=True)), **versions()}
            row |= {"weights": reader.fingerprint}
            began = time.perf_counter()
            method = ready(reader, cell, tasks.held_out_item(cell.task, cell.split, 0), PLANS)
            if isinstance(method, str):
                row |= {"items": 0, "note": method}
                bar.advance(shown, options.items)
            else:
                right = measure(reader, method, cell, range(options.items), lambda n: bar.advance(shown, n))
                row |= {"items": len(right), "right": sum(right), "bits": pack(right)}
                row |= {"final_ratio": f"{method.final_ratio:.4f}", "area": f"{method.area:.4f}"}
            append(options.out, row | {"seconds": f"{time.perf_counter() - began:.1f}"})


def append(path: Path, *rows: dict, columns: Sequence[str] = COLUMNS) -> None:
    """Add rows to a CSV, and its header if they are the first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if fresh:
            writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    options, console = parse(), Console()
    if options.threads:
        torch.set_num_threads(options.threads)
    if not options.readers:
        raise SystemExit(f"there is no reader in {options.folder}: train one (benchmarks/readers/train.py)")
    try:
        if not options.show:
            run(options, console)
    except KeyboardInterrupt:
        console.print(f"stopped; {options.out} holds what was measured, the same command goes on")
        sys.exit(130)
    rows = list(done(options.out).values())
    prefills = read(options.out.with_name(f"{options.out.stem}_prefill.csv"))
    tables(console, rows, prefills)
    if options.readme:
        text = (ROOT / "README.md").read_text()
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        (ROOT / "README.md").write_text(before + readme_block(rows, prefills) + after)
        (ROOT / "docs/accuracy.md").write_text(page(rows, prefills))
    plots(rows, options.out.with_suffix(""))


if __name__ == "__main__":
    main()
