"""Tables and plots of accuracy.py's CSV: what was measured, and nothing else."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from accuracy_measure import unpack
from rich.console import Console
from rich.table import Table

from illava.evaluate.statistics import wilson
from readers import tasks

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

matplotlib.rcParams["svg.hashsalt"] = "illava"  # names in a file follow from the curves alone

Row = dict[str, str]
IMAGE_TASKS = tuple(task for task in tasks.TASKS if task != "video")
DRAWS = 2000  # of the bootstrap


def kept(
    rows: Sequence[Row], unpatched: Sequence[Row], beyond: Sequence[Row] = ()
) -> tuple[float, float, float] | None:
    """Mean over tasks of the accuracy kept, with its 95 % interval.

    The interval is a bootstrap over items, the same items drawn for all, since all answered the same.

    Args:
        rows, unpatched: a method's rows and the unpatched model's, one a task.
        beyond: another method's rows, for how much more is kept than by that one.

    Returns:
        Share of the unpatched accuracy, its lower and upper end; `None` unless every task is there.
    """
    others = [beyond] if beyond else []
    if any(len(own) != len(unpatched) for own in (rows, *others)) or not rows:
        return None
    if any(row["note"] for own in (rows, *others) for row in own):
        return None
    rng, shares, whole = np.random.default_rng(0), [], []
    for task, (row, base) in enumerate(zip(rows, unpatched, strict=True)):
        asked = [row, *(other[task] for other in others), base]
        count = min(int(one["items"]) for one in asked)
        ours, *less, theirs = (unpack(one["bits"], int(one["items"]))[:count].astype(float) for one in asked)
        ours = ours - sum(less)  # of the items that both answered
        drawn = rng.integers(count, size=(DRAWS, count))
        shares.append(ours[drawn].mean(1) / np.maximum(theirs[drawn].mean(1), 1 / count))
        whole.append(ours.mean() / max(theirs.mean(), 1 / count))
    low, high = np.quantile(np.mean(shares, axis=0), (0.025, 0.975))
    return float(np.mean(whole)), float(low), float(high)


def groups(rows: Sequence[Row]) -> dict[tuple[str, str, str, str], dict[str, dict[str, Row]]]:
    """Rows by (reader, split, budget, reduction), then method, then task."""
    found: dict = {}
    for row in rows:
        key = (row["reader"], row["split"], row["budget"], row["reduction"])
        found.setdefault(key, {}).setdefault(row["method"], {})[row["task"]] = row
    return dict(sorted(found.items()))


def read(path: Path) -> list[Row]:
    """The rows of a CSV; none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def lines(rows: Sequence[Row], prefills: Sequence[Row] = ()) -> list[tuple[str, list[str], list[list[str]]]]:
    """Every table: its title, its header and its rows, best method first, but none that could do nothing.

    Args:
        rows: of accuracy.py.
        prefills: of accuracy_prefill.py; tables of the test split they know of have two columns more.
    """
    grouped, made = groups(rows), []
    saved: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in prefills:
        saved.setdefault((row["reader"], row["budget"], row["reduction"]), {})[row["method"]] = row
    for (reader, split, budget, reduction), methods in grouped.items():
        base = grouped.get((reader, split, "tokens", "0.0000"), {}).get("unpatched", {})
        if float(reduction) == 0 or not base:
            continue
        shown = [t for t in tasks.TASKS if t in base and any(t in found for found in methods.values())]
        of = [base[task] for task in shown]
        asked = f"{float(reduction):.1%} removed"
        asked = f"the compute of {asked} by the paper's rule" if budget == "compute" else asked
        title = f"{reader}, {split} split, {asked}"
        header = ["method", *shown, "kept", "left", "compute"]
        body = [(np.inf, ["unpatched", *(_share(row) for row in of), "100", "1.00", "1.00"])]
        timed = saved.get((reader, budget, reduction), {}) if split == "test" else {}
        if timed:
            header += ["operations", "first token"]
            body[0][1].extend(["1.00", "1.00x"])
        for method, found in methods.items():
            if all(row["note"] for row in found.values()):
                continue
            share = kept([found[t] for t in shown if t in found], of)
            cells = [_share(found[t]) if t in found else "" for t in shown]
            text = "" if share is None else f"{share[0]:.1%} ({share[1]:.1%} to {share[2]:.1%})"
            means = [
                np.mean([float(row[name]) for row in found.values() if row[name]])
                for name in ("final_ratio", "area")
            ]
            cells = [method, *cells, text, *(f"{mean:.2f}" for mean in means)]
            if timed:
                own = timed.get(method)
                cells += ["", ""] if own is None else [_two(own["operations"]), _two(own["speedup"]) + "x"]
            body.append((-np.inf if share is None else share[0], cells))
        made.append((title, header, [cells for _, cells in sorted(body, key=lambda x: -x[0])]))
    return made


def _two(figure: str) -> str:
    return f"{float(figure):.2f}"


def _share(row: Row) -> str:
    if row["note"]:
        return "cannot"
    right, items = int(row["right"]), int(row["items"])
    low, high = wilson(right, items)
    return f"{100 * right / items:.1f} ± {50 * (high - low):.1f}"


def tables(console: Console, rows: Sequence[Row], prefills: Sequence[Row] = ()) -> None:
    """Every table on the console."""
    for title, header, body in lines(rows, prefills):
        table = Table(title=title)
        table.add_column(header[0])
        for name in header[1:]:
            table.add_column(name, justify="right")
        for cells in body:
            table.add_row(*cells)
        console.print(table)
    for note in sorted({f"{row['method']}: {row['note']}" for row in rows if row["note"]}):
        console.print(note, style="dim", highlight=False)


def plots(rows: Sequence[Row], stem: Path) -> None:
    """Accuracy kept on the picture tasks against the reduction, a figure for each reader and budget."""
    grouped = groups([row for row in rows if row["task"] != "video"])
    for reader, split, budget in sorted({key[:3] for key in grouped}):
        curves: dict[str, list[tuple[float, float, float, float]]] = {}
        base = grouped.get((reader, split, "tokens", "0.0000"), {}).get("unpatched", {})
        for key, methods in grouped.items():
            for method, found in methods.items() if key[:3] == (reader, split, budget) else ():
                asked = [t for t in IMAGE_TASKS if t in base and any(t in m for m in methods.values())]
                share = kept([found[t] for t in asked if t in found], [base[t] for t in asked])
                if share and float(key[3]) > 0:
                    curves.setdefault(method, []).append((float(key[3]), *share))
        if max((len(points) for points in curves.values()), default=0) < 2:
            continue  # one reduction alone makes no curve
        figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
        colors = plt.get_cmap("tab20").colors  # the ten usual ones, a pale one after each
        axes.set_prop_cycle(color=colors[::2] + colors[1::2])
        best = sorted(curves.items(), key=lambda x: -x[1][-1][1])
        for (method, points), marker in zip(best, "osv^<>DPX*hdp+x1234|_" * 3, strict=False):
            x, y, low, high = np.array(sorted(points)).T
            ours = method.startswith("illava")
            axes.errorbar(
                100 * x, 100 * y, 100 * np.maximum([y - low, high - y], 0), label=method, marker=marker,
                capsize=2, linewidth=2.5 if ours else 1, alpha=1 if ours else 0.7,
            )  # fmt: skip
        matched = "compute" if budget == "compute" else "final tokens"
        axes.set(xlabel="visual tokens removed, %", ylabel="accuracy kept, % of unpatched, picture tasks")
        axes.set_title(f"{reader}, {split} split, the same {matched}")
        figure.legend(fontsize="small", loc="outside right upper")
        for kind, metadata in (("svg", {"Date": None}), ("png", None)):
            path = stem.with_name(f"{stem.name}_{reader}_{split}_{budget}.{kind}")
            figure.savefig(path, dpi=120, metadata=metadata)
        plt.close(figure)
