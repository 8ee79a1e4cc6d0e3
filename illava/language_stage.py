"""What the decoder holds between two merges.

Notation for tensor shapes: B rows, n slots held now.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Stage:
    """What the decoder holds from one layer on.

    Attributes:
        first_layer: the first layer that sees it.
        positions: `[B, n]` the caller's position of each slot, -1 for padding on the left.
        entry: `[B, n]` which slot of the first stage each one was.
        row_lengths: real slots per row, known on the host.
        sizes: `[B, n]` how many visual tokens each slot stands for; `None` while that is one.
        origin: `[B, n]` which slot of the stage before each one was; `None` for the first.
    """

    first_layer: int
    positions: Tensor
    entry: Tensor
    row_lengths: tuple[int, ...]
    sizes: Tensor | None = None
    origin: Tensor | None = None

    def slot_sizes(self) -> Tensor:
        """`[B, n]` how many visual tokens each slot stands for."""
        return torch.ones_like(self.positions, dtype=torch.float32) if self.sizes is None else self.sizes

    @property
    def ragged(self) -> bool:
        return min(self.row_lengths) < self.positions.shape[1]
