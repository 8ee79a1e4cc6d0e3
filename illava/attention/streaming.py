"""The same statistics in one pass over blocks of queries: no matrix of size N x N is ever held.

A block of scores lives in one buffer that is used again and again, small enough to stay in a CPU's
cache. Where the attention kernel has given L_i, it rides along as one more channel of the queries
(against a channel of ones in the keys), so that a single matrix product yields q_i k_j scale - L_i.
On CUDA a Triton kernel takes over where `column_sum_backend` says so.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from illava.attention import column_sums

# Scores held at once: 4 MiB in fp32 on a CPU, where they should stay in the cache, 64 MiB elsewhere.
BLOCK_ELEMENTS_CPU = 2**20
BLOCK_ELEMENTS = 2**24


def attention_received(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    lse: Tensor | None = None,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    asked: slice | Tensor | None = None,
    unit: int = 1,
    backend: str | None = None,
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
        asked: the keys asked for, if not all: a range of the L, or a table `[B, J]` of their places,
            negative for padding.
        unit: consecutive keys (of those asked for) averaged into one number; must divide J.
        backend: `"triton"` or `"torch"`; `None` for what `column_sum_backend` chooses.

    Returns:
        `[B, J / unit]` in fp32, J = L if all are asked for; padding and a key that no query sees
        receive 0.
    """
    if column_sums.chosen_backend(backend, q, k) == "triton":
        received = column_sums.KERNELS.run_or_warn(
            lambda: column_sums.column_sums(
                q, k, scale=scale, lse=lse, q_positions=q_positions, k_positions=k_positions,
                asked=asked, unit=unit,
            ),
            q.device,
            required=backend is not None,
        )  # fmt: skip
        if received is not None:
            return received
    if isinstance(asked, slice) and lse is not None:
        k = k[:, :, asked]
        k_positions = None if k_positions is None else k_positions[:, asked]
        asked = None
    received = _attention_received(q, k, scale, lse, q_positions, k_positions)
    if isinstance(asked, slice):
        received = received[:, asked]
    elif asked is not None:
        received = received.gather(1, asked.clamp(min=0)).masked_fill(asked < 0, 0.0)
    return received if unit == 1 else received.unflatten(1, (-1, unit)).mean(dim=2)


def _attention_received(
    q: Tensor,
    k: Tensor,
    scale: float,
    lse: Tensor | None,
    q_positions: Tensor | None,
    k_positions: Tensor | None,
) -> Tensor:
    """The same in plain torch, for all keys: `[B, L]`."""
    batch, heads, length, _ = q.shape
    level = None
    if lse is not None:
        # A query that sees nothing has L = -inf and no finite score: its row must come out as zero.
        level = lse.float().masked_fill(lse.isinf(), 0.0)
    received = q.new_zeros((batch, k.shape[2]), dtype=torch.float32)
    for rows, block, visible, scores in _score_blocks(q, k, scale, level, q_positions, k_positions):
        if level is not None:
            probabilities = scores.exp_()
        else:
            probabilities = scores.softmax(dim=-1)
            if visible is not None:
                probabilities = probabilities.nan_to_num_()
        ones = probabilities.new_ones((1, 1, block)).expand(len(rows), 1, block)
        received.index_add_(0, rows, torch.bmm(ones, probabilities)[:, 0])  # [slices, L]
    if q_positions is None or k_positions is None:
        return received / (heads * max(1, length))
    return received / (heads * _seen_by(q_positions, k_positions).clamp(min=1))


def log_sum_exp(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """L_i of each query, streamed. Arguments as above; returns `[B, H, Q]` in fp32."""
    if column_sums.chosen_backend(backend, q, k) == "triton":
        level = column_sums.KERNELS.run_or_warn(
            lambda: column_sums.log_sum_exp(
                q, k, scale=scale, q_positions=q_positions, k_positions=k_positions
            ),
            q.device,
            required=backend is not None,
        )
        if level is not None:
            return level
    parts = [
        scores.logsumexp(dim=-1)
        for _, _, _, scores in _score_blocks(q, k, scale, None, q_positions, k_positions)
    ]
    # Blocks come slice by slice, and within a slice query by query.
    return torch.cat([q.new_zeros(0, dtype=torch.float32), *(p.flatten() for p in parts)]).view(q.shape[:3])


def block_rows(device: torch.device, slices: int, keys: int) -> int:
    """Queries per block, for `slices` heads of all rows at once."""
    elements = BLOCK_ELEMENTS_CPU if device.type == "cpu" else BLOCK_ELEMENTS
    return max(16, elements // max(1, slices * keys))


def _score_blocks(
    q: Tensor,
    k: Tensor,
    scale: float,
    level: Tensor | None,
    q_positions: Tensor | None,
    k_positions: Tensor | None,
) -> Iterator[tuple[Tensor, int, Tensor | None, Tensor]]:
    """Scores of all heads ("slices") of all rows, block by block in one buffer.

    Yields:
        The batch row of each slice, the number of queries, which keys they see (`[slices, q, L]` or
        `None`), and their scores `[slices, q, L]`, -inf where unseen. The next block overwrites them.
    """
    batch, heads, length, _ = q.shape
    if length == 0:
        return
    key_heads, keys = k.shape[1], k.shape[2]
    queries = q.float() * scale
    columns = k.float()
    if level is not None:
        queries = torch.cat([queries, -level[..., None]], dim=-1)
        columns = torch.cat([columns, torch.ones_like(columns[..., :1])], dim=-1)
    queries = queries.flatten(0, 1)  # [B*H, Q, D]
    columns = columns.flatten(0, 1).transpose(1, 2)  # [B*K, D, L]
    rows = torch.arange(batch, device=q.device).repeat_interleave(heads)
    key_of = torch.arange(batch * key_heads, device=q.device).repeat_interleave(heads // key_heads)

    block = min(length, block_rows(q.device, 1, keys))
    together = max(1, block_rows(q.device, 1, keys) // max(1, block)) if block == length else 1
    buffer = queries.new_empty(min(together, len(rows)) * block * keys)
    for first in range(0, len(rows), together):
        chunk = slice(first, first + together)
        own = columns[key_of[chunk]]
        for start in range(0, length, block):
            part = queries[chunk, start : start + block]  # [slices, q, D]
            scores = buffer[: part.shape[0] * part.shape[1] * keys].view(*part.shape[:2], keys)
            torch.bmm(part, own, out=scores)
            visible = None
            if q_positions is not None and k_positions is not None:
                visible = _visible(q_positions[:, start : start + block], k_positions)[rows[chunk]]
                scores.masked_fill_(~visible, float("-inf"))
            yield rows[chunk], part.shape[1], visible, scores


def _visible(q_positions: Tensor, k_positions: Tensor) -> Tensor:
    """`[B, q, L]`: keys at or before a query; negative positions are padding."""
    keys = k_positions[:, None, :]
    return (keys >= 0) & (keys <= q_positions[:, :, None])


def _seen_by(q_positions: Tensor, k_positions: Tensor) -> Tensor:
    """`[B, L]`: how many queries see each key, without a table of all pairs."""
    order = q_positions.sort(dim=1).values
    before = torch.searchsorted(order, k_positions.contiguous())
    return (order.shape[1] - before).masked_fill(k_positions < 0, 0)
