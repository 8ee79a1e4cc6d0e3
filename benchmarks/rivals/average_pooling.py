"""Average pooling of the projected features, before the language model: cells of the grid become their mean.

Cells of k x k tokens reach only 1/4, 1/9, ...; here a frame is cut into exactly as many near-square cells as
the final ratio allows: bands of rows, each cut into as equal a number of columns as possible. A cell stands
at its token nearest to the middle.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from illava import Candidates, Plan
from illava.families.seams import Seams
from rivals.common import Rival, chosen, gathered


def cells(c: Candidates, segment: int) -> list[list[int]]:
    """The units of each cell of a segment."""
    frames: dict[int, list[tuple[int, int, int]]] = {}
    for unit, (frame, row, column) in enumerate(c.place[segment, : c.counts[segment]].tolist()):
        frames.setdefault(frame, []).append((row, column, unit))
    total, found = c.keep_counts[segment], []
    for number, units in enumerate(frames.values()):
        share = (number + 1) * total // len(frames) - number * total // len(frames)
        if share:
            found += frame_cells(units, share)
    return found


def frame_cells(units: list[tuple[int, int, int]], number: int) -> list[list[int]]:
    """A frame's `(row, column, unit)` in `number` cells."""
    height, width = max(r for r, _, _ in units) + 1, max(c for _, c, _ in units) + 1
    bands = round(math.sqrt(number * height / width))
    bands = min(max(bands, 1, math.ceil(number / width)), height, number)
    columns = [number // bands + (band < number % bands) for band in range(bands)]
    groups: dict[tuple[int, int], list[int]] = {}
    for row, column, unit in units:
        band = (2 * row + 1) * bands // (2 * height)
        groups.setdefault((band, (2 * column + 1) * columns[band] // (2 * width)), []).append(unit)
    return list(groups.values())


def middle(c: Candidates, segment: int, cell: list[int]) -> int:
    """The unit of a cell that is nearest to its middle."""
    place = c.place[segment, cell, 1:].float()
    return cell[int((place - place.mean(dim=0)).square().sum(dim=1).argmin())]


def score(c: Candidates) -> Tensor:
    return chosen(c, [[middle(c, s, cell) for cell in cells(c, s)] for s in range(len(c.counts))])


def merge(c: Candidates, kept: Tensor) -> Tensor:
    owner = torch.full(c.index.shape, -1)
    for s in range(len(c.counts)):
        for cell in cells(c, s):
            owner[s, cell] = middle(c, s, cell)
    return gathered(kept, owner.to(kept.device), torch.ones_like(c.real, dtype=torch.float32))


def plan(seams: Seams, final_ratio: float) -> Plan:
    return Plan((), ("input",), llm_shares=(final_ratio,), score=score, merge=merge)


RIVAL = Rival(
    "average pooling",
    "as in LLaVA-OneVision's videos and many others, on the projected features",
    "encoder output",
    "Cells need not be squares of one size, so that any number of tokens can be reached.",
    plan,
)
