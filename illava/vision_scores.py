"""What merges in the vision encoder read of a block's attention.

Notation for tensor shapes: N packed tokens, U units, H heads, D head size, F frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from illava.attention import Spans, varlen_attention_received
from illava.transfer import on
from illava.vision_stage import Stage

# Channels that carry a token's size along: kernels take heads of a multiple of 8.
EXTRA_CHANNELS = 8


@dataclass(frozen=True)
class BlockAttention:
    """One block's attention.

    Attributes:
        queries, keys: `[N, H, D]` as they meet; their first `channels` are the block's own.
        lse: `[N, H]` log-sum-exp of each query.
        spans: which tokens attend to each other.
        scale: factor on the products.
    """

    queries: Tensor
    keys: Tensor
    lse: Tensor
    spans: Spans
    scale: float
    channels: int

    def of_units(self, stage: Stage, lse: bool) -> dict[str, Any]:
        """What `Candidates` tell of it.

        Args:
            lse: whether the query statistic stands in for attention received.
        """

        def from_class() -> Tensor:
            starts = on(self.queries.device, [*accumulate(stage.frame_tokens, initial=0)][:-1])
            return stage.by_unit(self.received_from(starts, stage.frame_tokens)).mean(dim=1)

        return dict(
            queries=stage.by_unit(self.queries)[..., : self.channels],  # [U, g, H, D]
            keys=stage.by_unit(self.keys)[..., : self.channels],
            scale=self.scale,
            _attention=lambda: self.received(stage, lse),
            _class_attention=from_class if stage.layout.prefix else None,
        )

    def received(self, stage: Stage, lse: bool = False) -> Tensor:
        """`[U]` attention each unit of this stage receives, or the query statistic `lse`."""
        if lse:
            return stage.by_unit(self.lse.mean(dim=1)).mean(dim=1)
        # Where units stand side by side the kernel averages over them itself.
        unit = stage.layout.unit_tokens if stage.layout.consecutive else 1
        received = varlen_attention_received(
            self.queries, self.keys, self.lse, self.spans, scale=self.scale, unit=unit
        )
        return received if stage.layout.consecutive else stage.by_unit(received).mean(dim=1)

    def received_from(self, asking: Tensor, lengths: Sequence[int]) -> Tensor:
        """`[N]` attention each token receives from one token of its frame.

        Args:
            asking: `[F]` the place of that token.
            lengths: tokens of each frame.
        """
        who = asking.repeat_interleave(on(asking.device, lengths), output_size=sum(lengths))  # [N]
        scores = (self.queries[who].float() * self.keys.float()).sum(dim=-1) * self.scale  # [N, H]
        return (scores - self.lse[who].float()).exp().mean(dim=1)


def weigh(q: Tensor, k: Tensor, v: Tensor, sizes: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values `[N, H, D + 8]` whose scores have the logarithm of the key's size added.

    A further channel carries it, so that every attention kernel can; the values' further ones are 0.
    """
    further = q.new_zeros((3, len(q), 1, EXTRA_CHANNELS))  # [3, N, 1, 8]
    further[0, ..., 0] = 1
    further[1, :, 0, 0] = sizes.log() / scale
    # One pass over each: `pad` on CUDA would fill, and copy then.
    q, k, v = (
        torch.cat((x, more.expand(-1, x.shape[1], -1)), dim=-1)
        for x, more in zip((q, k, v), further, strict=True)
    )
    return q, k, v
