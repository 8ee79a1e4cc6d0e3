"""Bipartite soft matching: units that are most alike become one. Pure tensor maths, no model in sight.

Bolya et al., ICLR 2023, arXiv 2210.09461, section 3, by features instead of keys: of a segment's units those
at even places each look for the one at an odd place that is most like them, and the pairs most alike become
one, the mean weighted by how many units each stands for. A round removes half at most; to remove more takes
several.

Notation for tensor shapes as in `merge`: S segments, N units of the largest, U units in all, g tokens per
unit, d hidden size; E and O units at even and at odd places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from illava.merge import AFFINITY_BLOCK_ELEMENTS, Merge, joined, select
from illava.transfer import on

TAKES_IN = 2.0  # the rank of a unit that others go into: above all cosines


def join(
    features: Tensor, sizes: Tensor, index: Tensor, counts: Sequence[int], keep_counts: Sequence[int]
) -> Merge:
    """Decide which units of each segment become one.

    Args:
        features: `[U, g, d]` by which units are alike, cosines of a unit's tokens side by side.
        sizes: `[U]` how many of the original units each stands for.
        index: `[S, N]` where each segment's units stand among all `U` units, ascending in a row.
        counts: units per segment.
        keep_counts: units to be left of each, 1 to `counts`.

    Returns:
        The decision; its `importance` is how unlike a unit is to its best match, 2 of those at odd places.
    """
    total, device = len(sizes), features.device
    index, sizes = index.to(device), sizes.to(device).float()
    x = features.flatten(1).float()  # [U, g*d]
    owner, keep = torch.arange(total, device=device), torch.ones(total, dtype=torch.bool, device=device)
    first, weights = None, sizes
    left, places, wanted = tuple(counts), index, tuple(keep_counts)
    while True:
        after = tuple(max(p, n - n // 2) for n, p in zip(left, wanted, strict=True))
        likeness, match = matches(x, places, left)
        decision = select(-likeness, places, left, after, total_units=total, rule="prune")
        goes = torch.where(decision.keep[places], places, places.gather(1, match))  # [S, N]
        step = torch.arange(total + 1, device=device)
        step = step.scatter(0, _real(places, left, total).flatten(), goes.flatten())[:total]
        owner, keep = step[owner], keep & decision.keep
        first = decision if first is None else first
        if after == wanted:
            table = decision.kept_table
            return replace(first, keep=keep, kept_table=table, kept_counts=wanted, owner=owner, sizes=sizes)
        x = joined(x, step, weights)
        weights = torch.zeros_like(weights).index_add(0, step, weights)
        left, places = after, decision.kept_table


def matches(x: Tensor, index: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The best match of each unit at an even place, among those at odd places.

    Args:
        x: `[U, d]`.
        index, counts: as for `join`.

    Returns:
        `[S, N]` cosines with it, and its places in the rows; at odd places `-TAKES_IN` and the place itself.
    """
    width = index.shape[1]
    place = torch.arange(width, device=index.device)
    real = place < on(index.device, counts)[:, None]  # [S, N]
    likeness = torch.full(index.shape, -TAKES_IN, device=index.device)
    match = place.expand(index.shape).clone()
    if width == 1:
        return likeness, match
    odd = normalize(x[index[:, 1::2]], dim=-1).mT  # [S, d, O]
    step = max(1, AFFINITY_BLOCK_ELEMENTS // (len(index) * odd.shape[2]))
    for start in range(0, (width + 1) // 2, step):
        these = slice(2 * start, 2 * (start + step), 2)
        even = normalize(x[index[:, these]], dim=-1)  # [S, e, d]
        # What is not finite is like nothing.
        alike = (even @ odd).nan_to_num(nan=-1.0, posinf=-1.0, neginf=-1.0)  # [S, e, O]
        best = alike.masked_fill(~real[:, None, 1::2], -1.5).max(dim=2)
        likeness[:, these], match[:, these] = best.values, 1 + 2 * best.indices
    return likeness, match


def _real(index: Tensor, counts: Sequence[int], spare: int) -> Tensor:
    """`[S, N]` where units stand, and `spare` for padding."""
    place = torch.arange(index.shape[1], device=index.device)
    return torch.where(place < on(index.device, counts)[:, None], index, spare)
