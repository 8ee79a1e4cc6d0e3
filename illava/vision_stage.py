"""What the vision encoder holds between two merges.

Notation for tensor shapes: N tokens held now (packed), U units held now, g tokens per unit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from illava.attention import Spans
from illava.families.layout import Layout, Survivors
from illava.grids import row_places
from illava.transfer import on


@dataclass
class BlockInputs:
    """How a stage's blocks' arguments are shortened. Made when the stage begins: torch.compile traces
    what is done with it in each block.

    Attributes:
        tokens: `[N]` the surviving tokens, numbered over the whole call, ascending.
        before: `[total + 1]` how many survive before each token of the whole call.
        real: `[rows, width]` bool, which tokens are no padding; `None` where all are real.
    """

    tokens: Tensor
    before: Tensor
    real: Tensor | None
    _memo: dict[tuple[int, bool], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def select(self, x: Tensor) -> Tensor:
        """Rows of survivors from something with a row per token of the full packing."""
        return self._once(x, False, lambda: x[self.tokens.to(x.device)])

    def recount(self, cu_seqlens: Tensor, keep_empty: bool) -> Tensor:
        """Span boundaries by counting the survivors of each original span, which may be none.

        Args:
            cu_seqlens: the original boundaries.
            keep_empty: leave empty spans in, as flash attention and illava's own may have them. Taking
                them out asks the device how many there are; Hugging Face's loop over spans does so anyway.
        """

        def count() -> Tensor:
            bounds = self.before.to(cu_seqlens.device)[cu_seqlens.long()].to(cu_seqlens.dtype)
            return bounds if keep_empty else bounds.unique_consecutive()

        return self._once(cu_seqlens, keep_empty, count)

    def padding_mask(self, mask: Tensor | None) -> Tensor | None:
        """A mask of this stage's widths, in the form of the caller's: `[B, 1, n, n]` added, `[B, n]` bool."""
        if mask is None or self.real is None:
            return None
        real = self.real.to(mask.device)
        if mask.ndim == 2:
            return real
        added = mask.new_zeros(real.shape).masked_fill(~real, torch.finfo(mask.dtype).min)
        return added[:, None, None].expand(-1, 1, real.shape[1], -1)

    def _once(self, source: Tensor, how: bool, make: Callable[[], Tensor]) -> Tensor:
        """Every block is handed the same few tensors; each is shortened once per stage.

        In a compiled graph each block does it anew: its compiler sees that it is the same.
        """
        if torch.compiler.is_compiling():
            return make()
        key = id(source), how
        if key not in self._memo:
            self._memo[key] = (source, make())  # holding the source keeps its id its own
        return self._memo[key][1]


@dataclass
class Stage:
    """What the encoder holds from one block on.

    Attributes:
        first_block: the first block that sees it.
        layout: of the full grid at this depth.
        units: `[U]` the surviving units, numbered over the whole call, ascending.
        tokens: `[N]` the surviving tokens, likewise.
        members: `[U, g]` where each unit's tokens stand among the survivors.
        frame_counts: units of each frame, known on the host.
        regrids: whether a module has joined patches just before it.
        sizes: `[U]` how many of the first units each stands for; `None` while that is one.
    """

    first_block: int
    layout: Layout
    units: Tensor
    tokens: Tensor
    members: Tensor
    frame_counts: tuple[int, ...]
    regrids: bool = False
    sizes: Tensor | None = None
    _spans: dict[int | None, tuple[Tensor | None, Spans]] = field(default_factory=dict)

    @property
    def frame_tokens(self) -> tuple[int, ...]:
        """Tokens of each frame."""
        return tuple(self.layout.prefix + n * self.layout.unit_tokens for n in self.frame_counts)

    def unit_sizes(self, device: torch.device) -> Tensor:
        """`[U]` how many of the first units each stands for."""
        if self.sizes is None:
            return torch.ones(sum(self.frame_counts), device=device)
        return self.sizes.to(device)

    def token_sizes(self, device: torch.device) -> Tensor:
        """`[N]` the same for each token; 1 for those of no unit."""
        sizes = torch.ones(len(self.tokens), device=device)
        members = self.members.to(device)
        return sizes.index_put((members,), self.unit_sizes(device)[:, None].expand(members.shape))

    @property
    def width(self) -> int:
        """Tokens per row, where frames are rows: at first the caller's own, then the longest's."""
        if self.first_block == 0 and self.layout.row_tokens is not None:
            return self.layout.row_tokens
        return max(self.frame_tokens)

    def by_unit(self, x: Tensor) -> Tensor:
        """`[N, ...]` to `[U, g, ...]`, a view where units stand as they are wanted."""
        if self.layout.consecutive:
            return x.unflatten(0, (-1, self.layout.unit_tokens))
        return x[self.members.to(x.device)]

    def pack(self, x: Tensor) -> Tensor:
        """`[rows, width, ...]` to `[N, ...]`, without padding."""
        flat = x.flatten(0, 1)
        return flat if self._full else flat[on(x.device, self._places)]

    def unpack(self, x: Tensor) -> Tensor:
        """`[N, ...]` to `[rows, width, ...]`, padded at the end of each row with zeros."""
        if self.layout.row_tokens is None:
            return x[None]
        rows = len(self.frame_counts)
        if self._full:
            return x.unflatten(0, (rows, self.width))
        table = x.new_zeros((rows * self.width, *x.shape[1:]))
        return table.index_copy(0, on(x.device, self._places), x).unflatten(0, (rows, self.width))

    @property
    def _full(self) -> bool:
        return self.layout.row_tokens is None or min(self.frame_tokens) == self.width

    @cached_property
    def _places(self) -> Tensor:
        return row_places(self.frame_tokens, self.width)

    def block_inputs(self) -> BlockInputs:
        """What this stage's blocks are given."""
        alive = torch.zeros(self.layout.total_tokens + 1, dtype=torch.int32, device=self.tokens.device)
        alive[self.tokens + 1] = 1
        real = None
        if self.layout.padded and not self._full:
            real = on(alive.device, torch.arange(self.width) < torch.tensor(self.frame_tokens)[:, None])
        return BlockInputs(self.tokens, alive.cumsum(0, dtype=torch.int32), real)

    def spans(self, cu_seqlens: Tensor | None, window: int = 0) -> Spans:
        """What this stage's tokens attend within: spans of these boundaries, `None` for whole frames.

        Args:
            window: the most tokens that a span had before anything left, 0 if nobody says.
        """
        key = None if cu_seqlens is None else id(cu_seqlens)
        if key not in self._spans:
            made = (
                Spans.from_lengths(self.frame_tokens, self.tokens.device)
                if cu_seqlens is None
                else Spans.from_cu_seqlens(cu_seqlens, min(window, max(self.frame_tokens)) or None)
            )
            self._spans[key] = (cu_seqlens, made)  # holding the source keeps its id its own
        return self._spans[key][1]

    def forget(self) -> None:
        """Let go of what was laid out for this call."""
        self._spans.clear()

    def survivors(self) -> Survivors:
        return Survivors(self.layout, self.units, self.tokens, self.members, self.frame_counts)
