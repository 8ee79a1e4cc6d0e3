"""Where the time of one prefill goes: torch's profiler, told apart by whose work it is.

`speed.py --profile` profiles the unpatched model, and illava's arms where they remove most, once each, after
their warm-up: nothing of it is in the figures. Time is the device's own where it has its own (kernels), else
the CPU's (operations, and what Python does between them in illava's code).
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from speed_measure import Side
from speed_ranges import Ranges

OWNERS = "illava", "model"  # the names of `Ranges`
COLUMNS = "owner", "what", "calls", "ms", "share"
LEAST_SHARE = 1e-3  # of what is listed by name
OTHERS, PYTHON = "others", "Python between operations"
NAME_LENGTH = 100  # of a kernel's name, template arguments and all


@dataclass(frozen=True)
class Spent:
    """What one kernel, or one operation, took in a prefill.

    Attributes:
        owner: `"illava"`, or `"model"` for what would run unpatched as well.
        what: its name; `OTHERS` for all of the owner's below `LEAST_SHARE`.
        calls: how often it ran.
        ms: in all.
        share: of the time of all that ran.
    """

    owner: str
    what: str
    calls: int
    ms: float
    share: float


@torch.inference_mode()
def profile(side: Side) -> list[Spent]:
    """One prefill of a warm model; longest first. Patch it while `Ranges` are installed."""
    kinds = torch.profiler.ProfilerActivity
    ranges = Ranges(side.clock)
    with torch.profiler.profile(
        activities=[kinds.CPU, *([kinds.CUDA] if side.clock.cuda else [])]
    ) as profiler:
        ranges.listening = True
        side.prefill()
        ranges.listening = False
        side.clock.wait()
    return spent(profiler.events(), side.clock.cuda)


def spent(events: Iterable[Any], cuda: bool) -> list[Spent]:
    """The profiler's events by owner and name."""
    ms, calls = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # the operations that launched them say the same, and whose they are
        ran = (
            [(k.name, k.duration) for k in event.kernels]
            if cuda
            else [(event.name, event.self_cpu_time_total)]
        )
        for name, us in ran:
            key = _owner(event), PYTHON if name in OWNERS else name[:NAME_LENGTH]
            ms[key] += us / 1e3
            calls[key] += 1
    total = sum(ms.values())
    named = {key: key if time >= LEAST_SHARE * total else (key[0], OTHERS) for key, time in ms.items()}
    together, often = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for key, name in named.items():
        together[name] += ms[key]
        often[name] += calls[key]
    return [Spent(*key, often[key], time, time / total) for key, time in together.most_common()]


def _owner(event: Any) -> str:
    """Of the innermost range around an event."""
    while event is not None:
        if event.name in OWNERS:
            return str(event.name)
        event = event.cpu_parent
    return "model"


def write(path: Path, key: dict[str, str], rows: Sequence[Spent]) -> None:
    """Append one prefill's rows to a CSV, with what tells it from others."""
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, (*key, *COLUMNS), lineterminator="\n")
        if fresh:
            writer.writeheader()
        for row in rows:
            figures = {"calls": row.calls, "ms": f"{row.ms:.4g}", "share": f"{row.share:.4f}"}
            writer.writerow(key | {"owner": row.owner, "what": row.what} | figures)


def show(console: Console, title: str, rows: Sequence[Spent], most: int = 12) -> None:
    """illava's own work by what took longest."""
    own = [row for row in rows if row.owner == "illava"]
    total = sum(row.ms for row in rows)
    table = Table(title=f"{title}: illava's own {sum(r.ms for r in own):.2f} ms of {total:.2f} ms")
    for name in ("kernel or operation", "calls", "ms", "share"):
        table.add_column(name, justify="left" if name.startswith("kernel") else "right")
    for row in own[:most]:
        table.add_row(row.what, str(row.calls), f"{row.ms:.3f}", f"{row.share:.2%}")
    console.print(table)
