"""Other ways to make few tokens of many, where illava merges: the first version's tables 4 and 7.

Each is a pair of functions as a plan takes them, a score that is 1 for the units that stay and a rule that
says of what each of those is made. (The first version of iLLaVA, arXiv
2412.06263v1, section 4.6, compares with greedy merging, bipartite matching and k-means of 5 iterations; it
does not say of what features, or from what k-means begins: here of those that are merged, and from evenly
spaced ones.)

Notation for tensor shapes: S segments, N units of the largest, P kept units of the largest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from illava import Candidates, merge
from rivals import random_tokens
from rivals.common import gathered, unchanged

ITERATIONS = 5
Grouping = Callable[[Tensor, Tensor, int], Tensor]


def greedy(features: Tensor, sizes: Tensor, keep: int) -> Tensor:
    """Merge the two groups whose means are most alike, until `keep` groups are left.

    Args:
        features: `[n, d]` of one segment's units.
        sizes: `[n]` of how many of the original units each is made.

    Returns:
        `[n]` for each unit the unit that its group is put in the place of: the group's first.
    """
    owner, means, sizes = torch.arange(len(features)), features.float().clone(), sizes.float().clone()
    likeness = _cosine(means, means).fill_diagonal_(float("-inf"))
    for _ in range(len(features) - keep):
        one, other = sorted(divmod(int(likeness.argmax()), len(features)))
        means[one] = (sizes[one] * means[one] + sizes[other] * means[other]) / (sizes[one] + sizes[other])
        sizes[one] += sizes[other]
        owner[owner == other] = one
        likeness[other], likeness[:, other] = float("-inf"), float("-inf")
        row = _cosine(means[one : one + 1], means)[0].masked_fill(likeness[one].isneginf(), float("-inf"))
        likeness[one], likeness[:, one] = row, row
    return owner


def k_means(features: Tensor, sizes: Tensor, keep: int) -> Tensor:
    """Lloyd's algorithm by cosine; as `greedy`, but a group is put in the place of its most central unit.

    For a group that has lost all its units, the unit least like its own group's mean stays alone.
    """
    x = torch.nn.functional.normalize(features.float(), dim=-1)
    centres = x[torch.linspace(0, len(x) - 1, keep).round().long()]
    for _ in range(ITERATIONS):
        group = (x @ centres.mT).argmax(dim=1)  # [n]
        sums = torch.zeros_like(centres).index_add(0, group, sizes[:, None] * x)
        there = torch.zeros(keep, dtype=torch.bool).index_fill(0, group, True)[:, None]
        centres = torch.where(there, torch.nn.functional.normalize(sums, dim=-1), centres)
    likeness = x @ centres.mT  # [n, keep]
    group = likeness.argmax(dim=1)
    near = likeness.gather(1, group[:, None])[:, 0]  # [n]
    owner = torch.empty_like(group)
    for number in group.unique():
        mine = (group == number).nonzero()[:, 0]
        owner[mine] = mine[near[mine].argmax()]
    places = torch.arange(len(x))
    alone = near.masked_fill(owner == places, float("inf")).argsort(stable=True)[: keep - len(owner.unique())]
    owner[alone] = alone
    return owner


def _cosine(one: Tensor, other: Tensor) -> Tensor:
    return torch.nn.functional.normalize(one, dim=-1) @ torch.nn.functional.normalize(other, dim=-1).mT


def settings(group: Grouping) -> dict[str, Any]:
    """The `score` and `merge` of a plan by which groups are made in this way."""

    def owners(c: Candidates) -> Tensor:
        found = torch.full(c.index.shape, -1)
        features = c.features.flatten(1).cpu()  # [U, g*d]
        for row, (units, keep) in enumerate(zip(c.counts, c.keep_counts, strict=True)):
            index = c.index[row, :units].cpu()
            found[row, :units] = group(features[index], c.sizes[c.index[row, :units]].cpu(), keep)
        return found.to(c.index.device)

    def score(c: Candidates) -> Tensor:
        return (owners(c) == torch.arange(c.index.shape[1], device=c.index.device)).float()

    def rule(c: Candidates, kept: Tensor) -> Tensor:
        return gathered(kept, owners(c), c.sizes[c.index])

    return {"score": score, "merge": rule}


def keeping(own: float, recycled: float = 0.05, members: int = 5) -> dict[str, Any]:
    """The paper's rule, but for a share of its own features that a recycled unit keeps beforehand."""

    def rule(c: Candidates, kept: Tensor) -> Tensor:
        made = merge.select(
            c.attention, c.index, c.counts, c.keep_counts, total_units=len(c.sizes), rule="recycle",
            recycled_share=recycled, members=members, queries=c.queries, keys=c.keys, scale=c.scale,
        )  # fmt: skip
        weights = unchanged(kept, c.index.shape[1])  # [S, P, N]
        whole = torch.zeros(len(c.sizes), 2, dtype=torch.long, device=kept.device)
        rows = torch.arange(len(c.index), device=kept.device)[:, None].expand(c.index.shape)
        columns = torch.arange(c.index.shape[1], device=kept.device).expand(c.index.shape)
        whole[c.index[c.real]] = torch.stack((rows[c.real], columns[c.real]), dim=1)  # where each unit stands
        for unit, sources, shares in zip(made.recycled, made.sources, made.weights, strict=True):
            row, column = whole[unit]
            place = (kept[row, : c.keep_counts[row]] == column).nonzero()[0, 0]
            weights[row, place] *= own
            weights[row, place].index_add_(0, whole[sources, 1], (1 - own) * shares)
        return weights

    return {"merge": rule}


def in_encoder(settings: dict[str, Any]) -> dict[str, Any]:
    """A pair of functions in the encoder alone, and in the language model the paper's rule."""
    default = keeping(0.0)["merge"]

    def score(c: Candidates) -> Tensor:
        return settings["score"](c) if c.stage == "vit" else c.attention

    def rule(c: Candidates, kept: Tensor) -> Tensor:
        return settings["merge"](c, kept) if c.stage == "vit" else default(c, kept)

    return {"score": score, "merge": rule}


RULES: dict[str, dict[str, Any]] = {
    "random": {"score": random_tokens.score, "merge": "prune"},
    "greedy": settings(greedy),
    "k-means": settings(k_means),
}
