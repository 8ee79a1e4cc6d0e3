"""Bipartite soft matching: units that are most alike become one. Pure tensor maths, no model in sight.

Bolya et al., ICLR 2023, arXiv 2210.09461, section 3, by features instead of keys: of a segment's units those
at even places each look for the one at an odd place that is most like them, and the pairs most alike become
one, the mean weighted by how many units each stands for. A round removes half at most; to remove more takes
several. It costs 2 * E * O * g * d operations, in float32 whatever the model's type.

Alike is not the same: two equal things that stand apart are two. A penalty on what are no neighbours keeps
them so for longer (neighbours first is an idea of ALGM, Norouzi et al., CVPR 2024, arXiv 2406.09936).

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

TAKES_IN = 2.0  # the rank of a unit that others go into, before any penalty: above all cosines


def join(
    features: Tensor,
    sizes: Tensor,
    index: Tensor,
    counts: Sequence[int],
    keep_counts: Sequence[int],
    *,
    distance_penalty: float = 0.0,
    grid: Tensor | None = None,
) -> Merge:
    """Decide which units of each segment become one.

    Args:
        features: `[U, g, d]` by which units are alike, cosines of a unit's tokens side by side.
        sizes: `[U]` how many of the original units each stands for.
        index: `[S, N]` where each segment's units stand among all `U` units, ascending in a row.
        counts: units per segment.
        keep_counts: units to be left of each, 1 to `counts`.
        distance_penalty: taken from the cosine of two that are no `neighbours`.
        grid: `[U, 3]` frame, row and column of each unit, where there is a penalty. What others went into
            stays where it is.

    Returns:
        The decision; its `importance` is how unlike a unit is to its best match, the penalty added; of units
        at odd places it is 2, the penalty added.
    """
    total, device = len(sizes), features.device
    index, sizes = index.to(device), sizes.to(device).float()
    x = features.flatten(1).float()  # [U, g*d]
    owner, keep = torch.arange(total, device=device), torch.ones(total, dtype=torch.bool, device=device)
    first, weights = None, sizes
    left, places, wanted = tuple(counts), index, tuple(keep_counts)
    while True:
        after = tuple(max(p, n - n // 2) for n, p in zip(left, wanted, strict=True))
        likeness, match = matches(x, places, left, distance_penalty, grid)
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


def matches(
    x: Tensor, index: Tensor, counts: Sequence[int], penalty: float = 0.0, grid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The best match of each unit at an even place, among those at odd places.

    Args:
        x: `[U, d]`.
        index, counts: as for `join`.
        penalty: how much less alike two are that are no `neighbours`.
        grid: `[U, 3]` frame, row and column of each unit; `None` for no penalty.

    Returns:
        `[S, N]` cosines with it, the penalty taken off, and its places in the rows; at odd places
        `-TAKES_IN - penalty` and the place itself.
    """
    width = index.shape[1]
    place = torch.arange(width, device=index.device)
    real = place < on(index.device, counts)[:, None]  # [S, N]
    likeness = torch.full(index.shape, -TAKES_IN - penalty, device=index.device)
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
        if grid is not None:
            alike = alike - penalty * ~neighbours(grid, index[:, these], index[:, 1::2])
        best = alike.masked_fill(~real[:, None, 1::2], -1.5 - penalty).max(dim=2)
        likeness[:, these], match[:, these] = best.values, 1 + 2 * best.indices
    return likeness, match


def neighbours(grid: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """`[S, e, O]` bool, whether each of `one` stands beside each of `other`: on one of the eight places
    around it, or on the same place of the frame before or after.

    Args:
        grid: `[U, 3]` frame, row and column.
        one, other: `[S, e]` and `[S, O]` among all U.
    """
    frame, row, column = ((along[one][:, :, None] - along[other][:, None]).abs() for along in grid.unbind(1))
    return frame + torch.maximum(row, column) <= 1


def _real(index: Tensor, counts: Sequence[int], spare: int) -> Tensor:
    """`[S, N]` where units stand, and `spare` for padding."""
    place = torch.arange(index.shape[1], device=index.device)
    return torch.where(place < on(index.device, counts)[:, None], index, spare)
