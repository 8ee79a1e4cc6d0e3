"""VisionZip: dominant tokens of the encoder's output are kept, the others merged into contextual ones.

Yang et al., CVPR 2025, arXiv 2412.04467; github.com/dvlab-research/VisionZip, visionzip/clip_encoder.py:
dominant ones by the class token's attention in the block whose output is read, 54 of 64; of the others, in
their order, every n-th is contextual and takes in the mean of those whose keys are most like its own (the
mean is added to it, not averaged with it).
"""

from __future__ import annotations

import torch
from torch import Tensor

from illava import Candidates, Plan
from illava.families.seams import Seams
from rivals.common import Rival, best, chosen, cosine, gathered, is_kept, mean_keys, seen_by_class, unchanged

CONTEXTUAL_SHARE = 10 / 64


def split(c: Candidates) -> tuple[Tensor, list[int]]:
    """Which units are dominant, `[S, N]` bool, and how many contextual ones each segment has."""
    contextual = [
        min(kept - 1, max(1, round(kept * CONTEXTUAL_SHARE))) if kept < n else 0
        for n, kept in zip(c.counts, c.keep_counts, strict=True)
    ]
    dominant = [kept - extra for kept, extra in zip(c.keep_counts, contextual, strict=True)]
    return best(seen_by_class(c).masked_fill(~c.real, float("-inf")), dominant), contextual


def score(c: Candidates) -> Tensor:
    dominant, contextual = split(c)
    rows = []
    for mine, count, extra in zip(dominant.tolist(), c.counts, contextual, strict=True):
        rest = [unit for unit in range(count) if not mine[unit]]
        step = max(1, len(rest) // max(1, extra))
        rows.append([unit for unit in range(count) if mine[unit]] + rest[::step][:extra])
    return chosen(c, rows)


def merge(c: Candidates, kept: Tensor) -> Tensor:
    dominant, _ = split(c)
    targets = is_kept(c, kept) & ~dominant  # [S, N]
    rest = c.real & ~dominant & ~targets
    likeness = cosine(mean_keys(c)).masked_fill(~targets[:, None], float("-inf"))
    owner = torch.where(rest & targets.any(dim=1, keepdim=True), likeness.argmax(dim=2), -1)
    return unchanged(kept, c.index.shape[1]) + gathered(kept, owner, torch.ones_like(owner).float())


def plan(seams: Seams, final_ratio: float) -> Plan:
    return Plan(("output",), (), vit_shares=(final_ratio,), score=score, merge=merge)


RIVAL = Rival(
    "VisionZip",
    "Yang et al., CVPR 2025, arXiv 2412.04467; dvlab-research/VisionZip visionzip/clip_encoder.py",
    "encoder output",
    "Merge units instead of patches, merged slot by slot; the class token itself does not go on to the "
    "language model; where there is none (Qwen), attention received from all tokens stands in for its own.",
    plan,
)
