"""A traced encoder call seen from one of its pictures: which patches and units are its own.

Notation for tensor shapes: V merge units of the part in raster order, g patches of a unit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from illava.sparse import diagonal, entries, one_each, sparse, take
from illava.tracing import EncoderTrace, follow


@dataclass(frozen=True, eq=False)
class UnitsLeft:
    """The units of a part after one merge.

    Attributes:
        kept, recycled: which are left, and which of them took in others.
        sources: `[V, V]` sparse, of which first units each is made.
        importance: `[V]`, NaN for those that were not ranked.
    """

    kept: Tensor
    recycled: Tensor
    sources: Tensor
    importance: Tensor


class Encoded:
    """One encoder call, its units called by raster order."""

    def __init__(self, call: EncoderTrace) -> None:
        self.layout, self.reads = call.layout, call.reads
        self.patches, self.token_units = call.layout.patches(), call.layout.token_units()
        raster = call.layout.raster_units()
        self.left: dict[int, UnitsLeft] = {}
        for record, made in zip(call.merges, follow(call.merges, call.layout.total_units), strict=True):
            rows, columns, values = entries(made)
            importance = torch.full((call.layout.total_units,), float("nan"))
            importance[raster[record.ranked]] = record.importance
            self.left[record.layer] = UnitsLeft(
                raster[record.kept],
                raster[record.recycled],
                sparse(raster[rows], raster[columns], values, made.shape),
                importance,
            )


class Part:
    """One of a picture's grids in its encoder call.

    Args:
        encoded: the call.
        frame: the first of its frames that is the grid's.
        frames: how many are.

    Attributes:
        frames: `(height, width)` in patches of each frame.
        side: patches along one side of a unit.
        patches: `[V, g]` the patches of each unit, from 0.
    """

    def __init__(self, encoded: Encoded, frame: int, frames: int) -> None:
        layout = encoded.layout
        bounds = [*accumulate(layout.frame_units, initial=0)]
        self._encoded, self.side = encoded, layout.side
        self._first, self._end = bounds[frame], bounds[frame + frames]
        self.frames = layout.frames[frame : frame + frames]
        own = encoded.patches[self._first : self._end]
        self.patches = own - own.min()

    @cached_property
    def reads(self) -> Tensor:
        """`[rows, V]` sparse: by which weights its units are read into visual tokens."""
        encoded, first, end = self._encoded, self._first, self._end
        if not encoded.reads:
            return one_each(encoded.token_units[first:end] - first, end - first)
        starts = accumulate((x.shape[1] for x in encoded.reads), initial=0)
        return diagonal([x for x, at in zip(encoded.reads, starts, strict=False) if first <= at < end])

    def after(self, layer: int) -> UnitsLeft | None:
        """What an encoder block's merge left of it; `None` where the call merged nothing there."""
        left = self._encoded.left.get(layer)
        if left is None:
            return None
        own = torch.arange(self._first, self._end)
        kept, recycled = (x[(x >= self._first) & (x < self._end)] for x in (left.kept, left.recycled))
        return UnitsLeft(
            kept - self._first, recycled - self._first, take(left.sources, own, own), left.importance[own]
        )


class Unknown:
    """A picture whose features came from the caller: its visual tokens are all there is."""

    side = 1

    def __init__(self, tokens: int) -> None:
        self.frames = ((1, tokens),)
        self.patches = torch.arange(tokens)[:, None]
        self.reads = one_each(torch.arange(tokens), tokens)

    def after(self, layer: int) -> None:
        return None
