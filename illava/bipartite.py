"""Bipartite soft matching: units that are most alike become one. Pure tensor maths, no model in sight.

Bolya et al., ICLR 2023, arXiv 2210.09461, section 3, by features instead of keys: of a segment's units those
at even places each look for the one at an odd place that is most like them, and the pairs most alike become
one, the mean weighted by how many units each stands for. A round removes half at most; to remove more takes
several. `matching` says what a round costs.

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

from illava.matching import matches
from illava.merge import Merge, joined, real_or, select


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
    x = features.flatten(1)  # [U, g*d]
    everyone = torch.arange(total + 1, device=device)
    first, owner, keep, weights = None, everyone[:total], None, sizes
    left, places, wanted = tuple(counts), index, tuple(keep_counts)
    while True:
        after = tuple(max(p, n - n // 2) for n, p in zip(left, wanted, strict=True))
        likeness, match = matches(x, places, left, distance_penalty, grid)
        decision = select(-likeness, places, left, after, total_units=total, rule="prune")
        goes = torch.where(decision.keep[places], places, places.gather(1, match))  # [S, N]
        step = everyone.scatter(0, real_or(total, places, left).flatten(), goes.flatten())[:total]
        if first is None:
            first, owner, keep = decision, step, decision.keep
        else:
            owner, keep = step[owner], keep & decision.keep
        if after == wanted:
            table = decision.kept_table
            return replace(first, keep=keep, kept_table=table, kept_counts=wanted, owner=owner, sizes=sizes)
        x = joined(x.float(), step, weights, sum(left) - sum(after))
        weights = torch.zeros_like(weights).index_add(0, step, weights)
        left, places = after, decision.kept_table
