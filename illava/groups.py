"""Of what recycled units are made: groups, affinities and weights (paper, section 3.2.2 and eq. 3).

A group is given as three tensors, a row for each unit that takes in others: that unit, the units it is made
of and their weights, as `merge.Merge` holds them. Notation for tensor shapes as in `merge`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from illava.grids import row_places
from illava.transfer import on

# Elements of the largest block of scores held at once while all pairs are gone through (64 MiB in fp32).
BLOCK_ELEMENTS = 2**24


def recycled_count(kept: int, removed: int, share: float) -> int:
    """P^c: how many of `kept` units recycle when `removed` are dropped (DESIGN: step 2)."""
    return min(kept, max(1, round(share * kept))) if removed else 0


def no_groups(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    nothing = torch.zeros(0, dtype=torch.long, device=device)
    return nothing, nothing[:, None], nothing[:, None].float()


def linear_groups(
    order: Tensor, index: Tensor, counts: Sequence[int], keep_counts: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The first version's rule: rank P-1 takes in everything ranked below it."""
    device = order.device
    merging = [s for s, (n, p) in enumerate(zip(counts, keep_counts, strict=True)) if n > p]
    if not merging:
        return no_groups(device)
    sizes = [counts[s] - keep_counts[s] + 1 for s in merging]
    rows = on(device, merging)
    first = on(device, [keep_counts[s] - 1 for s in merging])[:, None]
    step = torch.arange(max(sizes), device=device)[None]  # [1, T]
    size = on(device, sizes)[:, None]
    ranks = (first + step).clamp(max=order.shape[1] - 1)
    sources = index[rows].gather(1, order[rows].gather(1, ranks))  # [S', T]
    sources = torch.where(step < size, sources, sources[:, :1])  # unused places name no other's unit
    weights = torch.where(step < size, step + 1.0, torch.zeros_like(step, dtype=torch.float32))
    return sources[:, 0], sources, weights / weights.sum(dim=1, keepdim=True)


def recycled_groups(
    order: Tensor,
    index: Tensor,
    counts: Sequence[int],
    keep_counts: Sequence[int],
    share: float,
    members: int,
    queries: Tensor,
    keys: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The paper's rule: recycled units and the groups they take in."""
    device = order.device
    merging = [s for s, (n, p) in enumerate(zip(counts, keep_counts, strict=True)) if n > p]
    if not merging:
        return no_groups(device)
    recycled = [recycled_count(keep_counts[s], counts[s] - keep_counts[s], share) for s in merging]
    informative = [keep_counts[s] - c for s, c in zip(merging, recycled, strict=True)]
    targets = [counts[s] - i for s, i in zip(merging, informative, strict=True)]

    # Ranks from P^i on are the targets; the first P^c of them are the recycled units themselves,
    # so that a recycled unit and its own place among the targets share one column number.
    rows = on(device, merging)
    step = torch.arange(max(targets), device=device)[None]  # [1, T]
    first = on(device, informative)[:, None]
    ranks = (first + step).clamp(max=order.shape[1] - 1)
    target_units = index[rows].gather(1, order[rows].gather(1, ranks))  # [S', T]
    is_target = step < on(device, targets)[:, None]  # [S', T]

    widest = max(recycled)
    scores = affinity(queries[target_units[:, :widest]], keys[target_units], is_target, scale)
    # Affinities of what is not finite are none: the unit stays itself. Places of no target are -inf.
    scores = scores.nan_to_num(nan=0.0).masked_fill(~is_target[:, None], float("-inf"))  # [S', C, T]
    own = torch.eye(widest, scores.shape[2], dtype=torch.bool, device=device)
    group = scores.masked_fill(own, float("inf")).topk(min(members, scores.shape[2]), dim=2).indices
    affinities = scores.gather(2, group)  # [S', C, M]
    # A place of no target may stand for a neighbour's unit; not even times 0 may its NaN come here.
    group = torch.where(affinities < 0, group[..., :1], group)
    weights = affinities.clamp(min=0)
    total = weights.sum(dim=2, keepdim=True)
    # Where all affinities of a group underflow to zero, the unit (first in its group) stays itself.
    alone = torch.zeros_like(weights)
    alone[..., 0] = 1
    weights = torch.where(total > 0, weights / total.clamp(min=torch.finfo(total.dtype).tiny), alone)
    sources = target_units.gather(1, group.flatten(1)).view(group.shape)  # [S', C, M]

    real = on(device, row_places(recycled, widest))
    return (
        target_units[:, :widest].flatten()[real],
        sources.flatten(0, 1)[real],  # [R, M]
        weights.flatten(0, 1)[real],
    )


def affinity(queries: Tensor, keys: Tensor, is_target: Tensor, scale: float) -> Tensor:
    """S_sub: attention from recycled units to target units (paper, eq. 3 and below it).

    Args:
        queries: `[S, C, g, H, D]`.
        keys: `[S, T, g, K, D]`, `K` dividing `H` (grouped queries).
        is_target: `[S, T]` bool, which columns are real.
        scale: factor on the scores.

    Returns:
        `[S, C, T]` in fp32: softmax over all real target tokens, averaged over heads and over the
        members of both units.
    """
    segments, width, unit, heads, _ = queries.shape
    columns, key_heads = keys.shape[1], keys.shape[3]
    k = keys.float().permute(0, 3, 4, 1, 2).flatten(3)  # [S, K, D, T*g]
    k = k.repeat_interleave(heads // key_heads, dim=1)  # [S, H, D, T*g]
    hidden = ~is_target.repeat_interleave(unit, dim=1)[:, None, None]  # [S, 1, 1, T*g]
    step = max(1, BLOCK_ELEMENTS // (segments * heads * unit * unit * columns))
    blocks = []
    for start in range(0, width, step):
        q = queries[:, start : start + step].float().permute(0, 3, 1, 2, 4).flatten(2, 3)
        scores = (q @ k * scale).masked_fill(hidden, float("-inf"))  # [S, H, c*g, T*g]
        mean = scores.softmax(dim=-1).mean(dim=1)  # [S, c*g, T*g]
        blocks.append(mean.unflatten(2, (columns, unit)).unflatten(1, (-1, unit)).mean(dim=(2, 4)))
    return torch.cat(blocks, dim=1)
