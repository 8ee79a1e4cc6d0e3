"""LLaVA-PruMerge+: attended and evenly spaced tokens of the encoder's output, each with its neighbours added.

Shang et al., ICCV 2025, arXiv 2403.15388; github.com/42Shawn/LLaVA-PruMerge,
llava/model/multimodal_encoder/clip_encoder.py, `token_prune_merge_advanced_plus`, which is what it runs: the
tokens the class token attends to most; about three times as many, evenly spaced, beside them; each takes in
the 32 of all tokens whose keys are most like its own, weighted by the class token's attention to them (added,
not averaged); and one more token, the sum of all others weighted likewise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from illava import Candidates, Plan
from illava.families.seams import Seams
from rivals.common import Rival, best, chosen, cosine, is_kept, mean_keys, seen_by_class, unchanged

NEIGHBOURS = 32
ATTENDED_SHARE = 1 / 4


def attention(c: Candidates) -> Tensor:
    """`[S, N]` the class token's attention to each unit: with CLS, a row sums to at most 1."""
    return (seen_by_class(c) * c.features.shape[1]).masked_fill(~c.real, 0)


def parts(c: Candidates) -> list[tuple[list[int], list[int], list[int]]]:
    """Of each segment the attended units, evenly spaced ones beside them, and the place of one more token."""
    seen = attention(c).tolist()
    found = []
    for row, count, kept in zip(seen, c.counts, c.keep_counts, strict=True):
        order = sorted(range(count), key=lambda unit, row=row: -row[unit])
        attended = order[: max(1, round(kept * ATTENDED_SHARE))]
        rest = sorted(order[len(attended) :])
        spaced = max(0, kept - len(attended) - 1)
        even = [rest[(2 * i + 1) * len(rest) // (2 * spaced)] for i in range(spaced)]
        left = [unit for unit in order if unit not in {*attended, *even}]
        found.append((attended, even, left[: kept - len(attended) - spaced]))
    return found


def score(c: Candidates) -> Tensor:
    return chosen(c, [[*attended, *even, *extra] for attended, even, extra in parts(c)])


def merge(c: Candidates, kept: Tensor) -> Tensor:
    width, seen = c.index.shape[1], attention(c)
    itself = unchanged(kept, width)  # [S, P, N]
    sums = [extra[0] if extra else -1 for _, _, extra in parts(c)]
    extra = (kept == torch.tensor(sums, device=kept.device)[:, None])[..., None]  # [S, P, 1]
    likeness = cosine(mean_keys(c)).masked_fill(~c.real[:, None], float("-inf"))
    rows = torch.arange(len(kept), device=kept.device)[:, None]
    likeness = likeness[rows, kept].masked_fill(itself > 0, float("-inf"))  # [S, P, N]
    near = best(likeness.flatten(0, 1), [min(NEIGHBOURS, n - 1) for n in c.counts for _ in kept[0]])
    near = near.view_as(likeness) & c.real[:, None]
    group = torch.where(extra, (c.real & ~is_kept(c, kept))[:, None] | (itself > 0), near)
    return torch.where(extra, 0.0, itself) + group * seen[:, None]


def plan(seams: Seams, final_ratio: float) -> Plan:
    return Plan(("output",), (), vit_shares=(final_ratio,), score=score, merge=merge)


RIVAL = Rival(
    "LLaVA-PruMerge+",
    "Shang et al., ICCV 2025, arXiv 2403.15388; 42Shawn/LLaVA-PruMerge "
    "llava/model/multimodal_encoder/clip_encoder.py",
    "encoder output",
    "A fixed number of tokens in place of its outlier detection, a quarter of them attended as in its 1:3; "
    "evenly spaced among those not attended, so that none is chosen twice; the block whose output is read "
    "instead of the last; attention per head; the one more token stands where the most attended of the "
    "others stood; merge units instead of patches; attention received where there is no class token.",
    plan,
)
