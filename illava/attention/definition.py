"""What the statistics of attention are, in full matrices. The streaming code must agree with this."""

from __future__ import annotations

import torch
from torch import Tensor


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Give every query head its own copy of its key head: `[B, K, L, D]` to `[B, H, L, D]`."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def attention_probabilities(q: Tensor, k: Tensor, *, scale: float, visible: Tensor | None = None) -> Tensor:
    """Softmax of the scaled scores (paper, eq. 3).

    Args:
        q: `[B, H, Q, D]`.
        k: `[B, K, L, D]`, `K` dividing `H`.
        scale: factor on the scores.
        visible: `[B, Q, L]` bool, which keys a query sees; `None` for all.

    Returns:
        `[B, H, Q, L]` in fp32 (all of these in fp64 for fp64 inputs). The row of a query that sees
        nothing is zero.
    """
    scores = _scores(q, k, scale)
    if visible is None:
        return scores.softmax(dim=-1)
    return scores.masked_fill(~visible[:, None], float("-inf")).softmax(dim=-1).nan_to_num()


def attention_received(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    visible: Tensor | None = None,
) -> Tensor:
    """S_avg: attention received by each key, averaged over heads and over the queries that see it.

    Args:
        q, k, scale, visible: as for `attention_probabilities`.

    Returns:
        `[B, L]` in fp32; a key that no query sees receives 0.
    """
    received = attention_probabilities(q, k, scale=scale, visible=visible).mean(dim=1).sum(dim=1)
    if visible is None:
        return received / q.shape[2]
    return received / visible.sum(dim=1).clamp(min=1)


def log_sum_exp(q: Tensor, k: Tensor, *, scale: float, visible: Tensor | None = None) -> Tensor:
    """L_i of each query: `[B, H, Q]` in fp32. A statistic of the query, not of the key."""
    scores = _scores(q, k, scale)
    if visible is not None:
        scores = scores.masked_fill(~visible[:, None], float("-inf"))
    return torch.logsumexp(scores, dim=-1)


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.to(wide) @ repeat_heads(k, q.shape[1]).to(wide).transpose(-1, -2) * scale
