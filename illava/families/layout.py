"""How a vision encoder lays out its tokens: where the members of each merge unit stand, and what is left.

Notation for tensor shapes: U units, g tokens per unit, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from illava.grids import grid_places, numbered, row_places


@dataclass(frozen=True)
class Layout:
    """The tokens of one encoder call.

    A *frame* is what the encoder attends over at once: a video frame, a picture, or a tile of one.

    Attributes:
        grids: `(frames, height, width)` in patches of every picture or tile.
        side: patches along one side of a merge unit.
        raster: whether a frame's patches lie in raster order; otherwise they lie unit by unit.
        prefix: tokens ahead of each frame's patches that belong to no unit and always stay (CLS).
        row_tokens: tokens per row, padding included, where frames are rows of a batch; `None` where
            they are packed end to end.
        window_side: merge units along one side of the windows by which a frame's units are ordered; 0
            where they come in raster order.
        by_columns: whether the visual tokens made of a frame come column by column.
    """

    grids: tuple[tuple[int, int, int], ...]
    side: int
    raster: bool = False
    prefix: int = 0
    row_tokens: int | None = None
    window_side: int = 0
    by_columns: bool = False

    @property
    def unit_tokens(self) -> int:
        """g."""
        return self.side**2

    @cached_property
    def frames(self) -> tuple[tuple[int, int], ...]:
        """`(height, width)` in patches of every frame."""
        return tuple((h, w) for t, h, w in self.grids for _ in range(t))

    @cached_property
    def frame_units(self) -> tuple[int, ...]:
        return tuple(h * w // self.unit_tokens for h, w in self.frames)

    @cached_property
    def frame_tokens(self) -> tuple[int, ...]:
        return tuple(self.prefix + h * w for h, w in self.frames)

    @property
    def total_units(self) -> int:
        return sum(self.frame_units)

    @property
    def total_tokens(self) -> int:
        """Padding included."""
        if self.row_tokens is not None:
            return len(self.frames) * self.row_tokens
        return sum(self.frame_tokens)

    @property
    def padded(self) -> bool:
        return self.total_tokens > sum(self.frame_tokens)

    def tokens(self) -> Tensor:
        """`[N]` the places of real tokens among all, ascending; on the CPU."""
        if not self.padded or self.row_tokens is None:
            return torch.arange(self.total_tokens)
        return row_places(self.frame_tokens, self.row_tokens)

    def members(self) -> Tensor:
        """`[U, g]` where each unit's tokens stand among the real ones; on the CPU."""
        if not self.raster:
            places = torch.arange(self.total_units * self.unit_tokens)
            return places.view(-1, self.unit_tokens)
        starts = torch.tensor([*accumulate(self.frame_tokens, initial=self.prefix)][:-1])
        within = {size: _unit_places(*size, self.side) for size in set(self.frames)}
        if len(within) == 1:  # tiles of one size, the common case
            return (starts[:, None, None] + within[self.frames[0]]).flatten(0, 1)
        return torch.cat([start + within[size] for start, size in zip(starts, self.frames, strict=True)])

    @property
    def consecutive(self) -> bool:
        """Whether units' tokens stand side by side, unit by unit: then nothing need be gathered."""
        return self.prefix == 0 and (self.side == 1 or not self.raster)

    def raster_units(self) -> Tensor:
        """`[U]` each unit's number in raster order, frame by frame; on the CPU."""
        if not self.window_side:
            return torch.arange(self.total_units)
        return self._by_frame(lambda rows, columns: _window_order(rows, columns, self.window_side))

    @cached_property
    def places(self) -> Tensor:
        """`[U, 3]` frame, counted over the whole call, row and column of each unit; on the CPU."""
        grids = [(1, h // self.side, w // self.side) for h, w in self.frames]
        frame, _ = numbered(self.frame_units)
        places = torch.cat((frame[:, None], grid_places(grids)[:, 1:]), dim=1)
        return places[self.raster_units()]

    def token_units(self) -> Tensor:
        """`[U]` for each visual token the unit it is made of, in raster order; on the CPU."""
        if not self.by_columns:
            return torch.arange(self.total_units)
        return self._by_frame(lambda rows, columns: torch.arange(rows * columns).view(rows, -1).T.flatten())

    def patches(self) -> Tensor:
        """`[U, g]` the patches of each unit, both in raster order, frame by frame; on the CPU."""
        return replace(self, raster=True, prefix=0, row_tokens=None).members()

    def _by_frame(self, order: Callable[[int, int], Tensor]) -> Tensor:
        """One frame's order of units after another, given its rows and columns of units."""
        orders = {(h, w): order(h // self.side, w // self.side) for h, w in set(self.frames)}
        return _shifted([orders[size] for size in self.frames], self.frame_units)

    def halved(self) -> Layout:
        """The layout after a module inside the encoder has joined 2 x 2 patches."""
        grids = tuple((t, h // 2, w // 2) for t, h, w in self.grids)
        return replace(self, grids=grids, side=self.side // 2)


def _unit_places(height: int, width: int, side: int) -> Tensor:
    """`[U, g]` the raster places of each unit's patches, slot by slot in raster order."""
    grid = torch.arange(height * width)
    grid = grid.view(height // side, side, width // side, side)  # rows, slot rows, columns, slot columns
    return grid.transpose(1, 2).reshape(-1, side * side)


def _window_order(rows: int, columns: int, side: int) -> Tensor:
    """`[U]` the raster places of a frame's units, window by window."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    window = row // side * columns + column // side  # fewer than `columns` windows in a row
    return window.flatten().argsort(stable=True)


@dataclass(frozen=True)
class Survivors:
    """What is alive at one seam of the encoder.

    Attributes:
        layout: of the tokens at that place.
        units: `[U]` surviving units, numbered over the whole call.
        tokens: `[N]` surviving tokens, likewise.
        members: `[U, g]` where each unit's tokens stand among the survivors.
        frame_counts: units of each frame, known on the host.
    """

    layout: Layout
    units: Tensor
    tokens: Tensor
    members: Tensor
    frame_counts: tuple[int, ...]

    def followed_by(self, others: Sequence[Survivors]) -> Survivors:
        """These and those of further encoder calls, as if all had been one."""
        every = [self, *others]
        if not others:
            return self
        grids = tuple(g for alive in every for g in alive.layout.grids)
        return Survivors(
            replace(self.layout, grids=grids),
            _shifted([a.units for a in every], [a.layout.total_units for a in every]),
            _shifted([a.tokens for a in every], [a.layout.total_tokens for a in every]),
            _shifted([a.members for a in every], [len(a.tokens) for a in every]),
            tuple(n for alive in every for n in alive.frame_counts),
        )

    def squeeze(self, x: Tensor) -> Tensor:
        """Survivors' rows of something with a row per unit or per token: `[..., d]` to `[1, n, d]`."""
        flat = x.flatten(0, -2)  # [rows, d]
        chosen = self.units if flat.shape[0] == self.layout.total_units else self.tokens
        return flat[chosen.to(x.device)][None]

    def spread(self, rows: Tensor) -> Tensor:
        """`[U, d]` rows of surviving units to all of them; those merged away are -inf."""
        rows = never_dead(rows)
        full = rows.new_full((self.layout.total_units, rows.shape[-1]), float("-inf"))
        return full.index_copy(0, self.units.to(rows.device), rows)


def never_dead(rows: Tensor) -> Tensor:
    """Features with those that overflowed to the mark of a dead row made NaN, which marks nothing.

    Without it an encoder whose numbers run out (fp16) could pass for one that merged rows away.
    """
    return rows.masked_fill(torch.isneginf(rows.amax(dim=-1, keepdim=True)), float("nan"))


def spread_tiles(output: Tensor, alive: Survivors) -> Tensor:
    """A projector's `[1, U, d]` of survivors to `[tiles, units, d]`."""
    return alive.spread(output[0]).unflatten(0, (len(alive.layout.frames), -1))


def _shifted(numbers: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    starts = accumulate(sizes, initial=0)
    return torch.cat([x + start for x, start in zip(numbers, starts, strict=False)])
