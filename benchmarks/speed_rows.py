"""The CSV of speed.py: one row per figure of an arm, appended as soon as it is measured.

An arm that has rows, or one row that says why it has none, is not measured again under the same versions.
"""

from __future__ import annotations

import csv
import io
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers
from speed_cases import Arm, Case

import illava

DRIVER = "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
OK, OOM, LIMIT, ABSENT = "ok", "out of memory", "time limit", "no such input"

ENVIRONMENT = ("device", "gpu", "driver", "cuda", "torch", "transformers", "illava", "dtype", "size")
CASE = (
    "model",
    "attn",
    "content",
    "count",
    "asked_tokens",
    "batch",
    "text",
    "new_tokens",
    "arm",
    "reduction",
)
KEY = ENVIRONMENT + CASE
COLUMNS = (
    "date", "commit", "threads", *KEY, "tokens", "final_tokens", "layers", "status",
    "figure", "unit", "value", "p25", "p75", "n", "unpatched", "ratio", "ratio_p25", "ratio_p75",
    "bound", "share_of_bound",
)  # fmt: skip


def environment(device: str, dtype: str, size: str) -> dict[str, str]:
    """What a figure depends on besides its case."""
    from prefill import device_name

    cuda = device.startswith("cuda")
    return {
        "device": device.split(":")[0],
        "gpu": device_name(device),
        "driver": _first_line(*DRIVER) if cuda else "",
        "cuda": (torch.version.cuda or "") if cuda else "",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "illava": illava.__version__,
        "dtype": dtype,
        "size": size,
    }  # fmt: skip


def origin() -> dict[str, str]:
    """What else a row says of its origin."""
    here = str(Path(__file__).parent)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _first_line("git", "-C", here, "describe", "--always", "--dirty"),
        "threads": str(torch.get_num_threads()),
    }


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else ""


def identity(case: Case, arm: Arm, text: int, new_tokens: int) -> dict[str, str]:
    """The columns that tell one arm of one case from the others."""
    return {
        "model": case.model,
        "attn": case.attn,
        "content": case.shown.content,
        "count": str(case.shown.count),
        "asked_tokens": str(case.shown.tokens),
        "batch": str(case.rows),
        "text": str(text),
        "new_tokens": str(new_tokens),
        "arm": arm.name,
        "reduction": f"{arm.reduction:g}",
    }


def figure(
    name: str,
    unit: str,
    values: Sequence[float],
    unpatched: float | None = None,
    ratios: Sequence[float] = (),
    bound: float | None = None,
) -> dict[str, str]:
    """A figure's columns: medians, and quartiles where there are several values.

    Args:
        name, unit: of the figure.
        values: as measured.
        unpatched: the unpatched model's, measured in turn.
        ratios: how many times better than it: above 1 is faster, or smaller.
        bound: of the ratio, by the plan's arithmetic.
    """
    low, middle, high = quartiles(values)
    row = {"figure": name, "unit": unit, "value": _number(middle), "n": str(len(values))}
    row |= {"p25": _number(low), "p75": _number(high)} if len(values) > 1 else {}
    if unpatched is not None:
        row["unpatched"] = _number(unpatched)
    if ratios:
        low, middle, high = quartiles(ratios)
        row["ratio"] = f"{middle:.4f}"
        row |= {"ratio_p25": f"{low:.4f}", "ratio_p75": f"{high:.4f}"} if len(ratios) > 1 else {}
        if bound is not None:
            row |= {"bound": f"{bound:.4f}", "share_of_bound": f"{middle / bound:.4f}"}
    return row


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """25 %, the median, 75 %."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _number(x: float) -> str:
    return f"{x:.6g}" if abs(x) < 1e6 else f"{x:.0f}"


class Rows:
    """A CSV file of figures.

    Args:
        path: created with its header if it does not exist. A line that a killed run left unfinished is
            taken off.

    Raises:
        ValueError: a file with other columns.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, []  # type: Path, list[dict[str, str]]
        if path.exists() and path.stat().st_size:
            text = path.read_text()
            whole = text[: text.rfind("\n") + 1]
            if whole != text:
                path.write_text(whole)
            reader = csv.DictReader(io.StringIO(whole))
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise ValueError(f"{path} has other columns; name another file with --csv")
            self.rows = list(reader)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(",".join(COLUMNS) + "\n")

    def done(self, key: dict[str, str]) -> bool:
        """Whether an arm has rows of this environment and case."""
        return any(all(row[name] == key[name] for name in KEY) for row in self.rows)

    def add(self, key: dict[str, Any], figures: Iterable[dict[str, str]], **more: str) -> None:
        """Append an arm's figures, in one piece."""
        new = [dict.fromkeys(COLUMNS, "") | origin() | key | more | row for row in figures]
        text = io.StringIO()
        csv.DictWriter(text, COLUMNS, lineterminator="\n").writerows(new)
        with self.path.open("a") as file:
            file.write(text.getvalue())
        self.rows += new
