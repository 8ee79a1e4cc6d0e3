"""The same statistics in one pass over blocks of queries: no matrix of size N x N is ever held."""

from __future__ import annotations

import torch
from torch import Tensor

# Score elements of one block of queries, all heads together: 4 MiB in fp32, which stays in a cache.
BLOCK_ELEMENTS = 2**20


def attention_received(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    lse: Tensor | None = None,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
) -> Tensor:
    """S_avg, as `definition.attention_received`, streamed over blocks of queries.

        S_avg[j] = 1/(H n_j) sum_h sum_{i sees j} exp(q_i k_j scale - L_i)

    Args:
        q: `[B, H, Q, D]`, the queries that count.
        k: `[B, K, L, D]`, `K` dividing `H`. All keys the queries see, unless `lse` is given: then
            the keys asked for are enough.
        scale: factor on the scores.
        lse: `[B, H, Q]` log-sum-exp of each query from the attention kernel; `None` to compute it.
        q_positions, k_positions: `[B, Q]` and `[B, L]`; a query sees a key whose position is not
            after its own. A negative position marks padding, which sees and is seen by nothing.
            `None` when every query sees every key.

    Returns:
        `[B, L]` in fp32; a key that no query sees receives 0.
    """
    batch, heads, length, _ = q.shape
    received = q.new_zeros((batch, k.shape[2]), dtype=torch.float32)
    seen_by = torch.zeros_like(received)
    keys = k.float().transpose(-1, -2)  # [B, K, D, L]
    for start, stop in _blocks(batch, heads, length, k.shape[2]):
        scores = _scores(q[:, :, start:stop], keys, scale)  # [B, H, q, L]
        visible = None
        if q_positions is not None and k_positions is not None:
            visible = _visible(q_positions[:, start:stop], k_positions)  # [B, q, L]
            scores.masked_fill_(~visible[:, None], float("-inf"))
            seen_by += visible.sum(dim=1)
        if lse is not None:
            # A query that sees nothing has L = -inf and no finite score: its row must be zero.
            level = lse[:, :, start:stop, None].float()
            probabilities = scores.sub_(level.masked_fill(level.isinf(), 0.0)).exp_()
        else:
            probabilities = scores.softmax(dim=-1)
            if visible is not None:
                probabilities = probabilities.nan_to_num()
        received += probabilities.sum(dim=(1, 2))
    if q_positions is None:
        return received / (heads * length)
    return received / (heads * seen_by.clamp(min=1))


def log_sum_exp(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
) -> Tensor:
    """L_i of each query, streamed. Arguments as above; returns `[B, H, Q]` in fp32."""
    batch, heads, length, _ = q.shape
    keys = k.float().transpose(-1, -2)  # [B, K, D, L]
    parts = []
    for start, stop in _blocks(batch, heads, length, k.shape[2]):
        scores = _scores(q[:, :, start:stop], keys, scale)
        if q_positions is not None and k_positions is not None:
            visible = _visible(q_positions[:, start:stop], k_positions)
            scores.masked_fill_(~visible[:, None], float("-inf"))
        parts.append(scores.logsumexp(dim=-1))
    return torch.cat(parts, dim=2)


def _blocks(batch: int, heads: int, queries: int, keys: int) -> list[tuple[int, int]]:
    step = max(16, BLOCK_ELEMENTS // max(1, batch * heads * keys))
    return [(start, min(start + step, queries)) for start in range(0, queries, step)]


def _scores(q: Tensor, keys: Tensor, scale: float) -> Tensor:
    """`[B, H, q, L]` in fp32 from keys `[B, K, D, L]`; grouped-query heads share their keys."""
    batch, heads, length, size = q.shape
    grouped = (q.float() * scale).reshape(batch, keys.shape[1], -1, size)  # [B, K, (H/K)*q, D]
    return (grouped @ keys).reshape(batch, heads, length, keys.shape[3])


def _visible(q_positions: Tensor, k_positions: Tensor) -> Tensor:
    """`[B, q, L]`: keys at or before a query; negative positions are padding."""
    keys = k_positions[:, None, :]
    return (keys >= 0) & (keys <= q_positions[:, :, None])
