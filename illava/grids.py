"""Places in rows and on grids, for many of them at once; what the host knows, on the CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def numbered(counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """`[N]` each: of things that come in lots of `counts`, the number of the lot and their own within it."""
    sizes, total = torch.tensor(counts, dtype=torch.long), sum(counts)
    lot = torch.arange(len(sizes)).repeat_interleave(sizes, output_size=total)
    return lot, torch.arange(total) - (sizes.cumsum(0) - sizes)[lot]


def row_places(counts: Sequence[int], width: int) -> Tensor:
    """`[N]` the places of the first `counts` of each row of `width`, rows end to end."""
    if len(set(counts)) == 1:  # one picture, or all of a size: the common case, in a third of the operations
        return torch.arange(len(counts) * width).view(-1, width)[:, : counts[0]].flatten()
    row, place = numbered(counts)
    return row * width + place


def grid_places(grids: Sequence[tuple[int, int, int]]) -> Tensor:
    """`[N, 3]` frame, row and column of each place of grids `(frames, height, width)`, one after another."""
    grid, place = numbered([math.prod(sides) for sides in grids])
    _, height, width = torch.tensor(grids, dtype=torch.long).view(-1, 3)[grid].unbind(dim=1)
    return torch.stack((place // (height * width), place // width % height, place % width), dim=1)
