"""What merges in the vision encoder read of a block's attention.

Notation for tensor shapes: N packed tokens, U units, H heads, D head size, F frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
