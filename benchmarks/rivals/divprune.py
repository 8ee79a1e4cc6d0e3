"""DivPrune: of the projected features, the subset whose members are least like each other.

Alvar et al., CVPR 2025, arXiv 2503.02175; github.com/vbdi/divprune, LLaVA/llava/model/llava_arch.py
(`LAYER_INDEX=0`): max-min diversity, greedily: first the feature furthest from its nearest neighbour, then
always the one furthest from those chosen; distance is 1 minus the cosine.
"""

from __future__ import annotations

import torch
from torch import Tensor

from illava import Candidates, Plan
from illava.families.seams import Seams
from rivals.common import Rival, chosen, cosine


def most_diverse(features: Tensor, number: int) -> list[int]:
    """The places of `number` of the features `[N, d]`, in the order of their choice."""
    distance = 1 - cosine(features[None])[0]
    apart = distance + torch.diag(distance.new_full((len(distance),), float("inf")))
    nearest = apart.min(dim=0).values if len(distance) > 1 else distance[0]
    picked = [int(nearest.argmax())]
    nearest = distance[picked[0]].clone()
    while len(picked) < number:
        nearest[picked] = float("-inf")
        picked.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, distance[picked[-1]])
    return picked


def score(c: Candidates) -> Tensor:
    features = c.features[:, 0][c.index]  # [S, N, d]
    return chosen(
        c,
        [most_diverse(x[:n], p) for x, n, p in zip(features, c.counts, c.keep_counts, strict=True)],
    )


def plan(seams: Seams, final_ratio: float) -> Plan:
    return Plan((), ("input",), llm_shares=(final_ratio,), score=score, merge="prune")


RIVAL = Rival(
    "DivPrune",
    "Alvar et al., CVPR 2025, arXiv 2503.02175; vbdi/divprune LLaVA/llava/model/llava_arch.py",
    "encoder output",
    "Each picture of several by itself, where its code knows one; a chosen feature can not be chosen again.",
    plan,
)
