"""Random tokens in illava's own places: what is left of its accuracy when the choice means nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from illava import Candidates, Plan
from illava.families.seams import Seams
from rivals.common import Rival

SEED = 0


def score(c: Candidates) -> Tensor:
    """A permutation for each number of units, the same in every batch, another at every layer."""
    scores = torch.zeros(c.index.shape)
    for row, count in enumerate(c.counts):
        numbers = torch.Generator().manual_seed(hash((SEED, c.stage == "llm", c.layer, count)) % 2**31)
        scores[row, :count] = torch.rand(count, generator=numbers)
    return scores.to(c.index.device)


def plan(seams: Seams, final_ratio: float) -> Plan:
    return Plan(reduction=1 - final_ratio, score=score, merge="prune")


RIVAL = Rival(
    "random",
    "the control: layers and budget of `illava recycle`, units drawn at random, the rest dropped",
    "both",
    "The draw is fixed for a number of units and a layer, so that a picture alone and in a batch loses "
    "the same ones.",
    plan,
)
