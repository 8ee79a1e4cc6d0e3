"""FEATHER: attention without positions, beside every third token of every third row; later a second cut.

Endo et al., "Feather the Throttle", ICCV 2025, arXiv 2412.13180; github.com/markendo/FEATHER,
prismatic-vlms/prismatic/models/backbones/llm/llama2_models.py and vlm-evaluation/scripts/eval_feather.sh:
after 8 of 32 layers the share q of tokens to which the last token's query pays most attention, both taken
before rotary embedding, and besides a grid of stride 3; after 16 the share q squared of those, by attention
alone (published: q = 0.3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from illava import Candidates, Plan
from illava.families.seams import Seams
from rivals.common import Rival

STRIDE = 3


def attention(c: Candidates) -> Tensor:
    """`[S, N]` softmax over the picture's tokens of the last token's scores, averaged over heads."""
    rows = c.sequences
    queries, keys = (x[:, 0].float() for x in c.unrotated)  # [U, H, D], [U, K, D]
    slots = rows.positions.shape[1]
    own = c.index[:, 0] // slots  # [S]
    q = queries[rows.positions.argmax(dim=1)[own] + own * slots]  # [S, H, D]
    k = keys.repeat_interleave(q.shape[1] // keys.shape[1], dim=1)[c.index]  # [S, N, H, D]
    logits = torch.einsum("shd,snhd->shn", q, k) * c.scale
    return logits.masked_fill(~c.real[:, None], float("-inf")).softmax(dim=-1).mean(dim=1)


def on_grid(c: Candidates) -> Tensor:
    """`[S, N]` bool: every third token of every third row."""
    return (c.place[..., 1] % STRIDE == 0) & (c.place[..., 2] % STRIDE == 0) & c.real


def score_with(first: int) -> object:
    """The score where `first` is the layer of the first cut."""

    def score(c: Candidates) -> Tensor:
        return attention(c) + (on_grid(c) if c.layer == first else 0)

    return score


def attended_share(final_ratio: float) -> float:
    """q, such that the union with the grid (taken as independent) times q squared is the final ratio."""
    low, high, grid = 0.0, 1.0, 1 / STRIDE**2
    for _ in range(50):
        q = (low + high) / 2
        low, high = (q, high) if (q + grid - q * grid) * q**2 < final_ratio else (low, q)
    return high


def plan(seams: Seams, final_ratio: float) -> Plan:
    depth = len(seams.layers)
    first = max(0, round(depth / 4) - 1)
    second = max(first + 1, round(depth / 2) - 1)
    q = attended_share(final_ratio)
    union = max(final_ratio, q + (1 - q) / STRIDE**2)
    return Plan(
        (), (first, second), llm_shares=(union, final_ratio), queries="last",
        score=score_with(first), merge="prune",
    )  # fmt: skip


RIVAL = Rival(
    "FEATHER",
    "Endo et al., ICCV 2025, arXiv 2412.13180; markendo/FEATHER "
    "prismatic-vlms/prismatic/models/backbones/llm/llama2_models.py",
    "llm",
    "The union of attended tokens and grid has the size it would have if they were independent, where its "
    "code has whatever it comes to; layers at the same relative depth; each frame of a video has its own "
    "grid.",
    plan,
)
