"""AIM: like features merge before the language model, then its later half prunes by PageRank.

Zhong et al., ICCV 2025, arXiv 2412.03248; github.com/LaVi-Lab/AIM, llava/model/token_merge.py,
llava/model/llava_arch.py and other_packages/transformers/src/transformers/models/qwen2/modeling_qwen2.py:
bipartite matching of the projected features within each frame, plain means, in rounds of at most a half; from
layer 14 to 21 of 28 visual tokens leave in equal steps, ranked by five steps of PageRank over the layer's
attention at temperature 0.1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from illava import Candidates, Plan
from illava.families.seams import Seams
from rivals.common import Rival, chosen, unchanged

TEMPERATURE, STEPS = 0.1, 5
FIRST, LAST, DEPTH = 14, 21, 28


def merged(features: Tensor, frames: Tensor, number: int) -> tuple[list[int], Tensor]:
    """Match and merge `[N, d]` until `number` are left.

    Returns:
        Places of those left, ascending, and `[P, N]` the weights of which they are made.
    """
    weights, left = torch.eye(len(features), device=features.device), list(range(len(features)))
    while len(left) > number:
        x = torch.nn.functional.normalize(weights @ features, dim=-1)
        frame = frames[left]
        first = torch.searchsorted(frame, frame)  # where each one's frame begins
        even = (torch.arange(len(left), device=x.device) - first) % 2 == 0
        likeness = (x @ x.T).masked_fill(even[None] | (frame[:, None] != frame[None]), float("-inf"))
        like, match = likeness.masked_fill(~even[:, None], float("-inf")).max(dim=1)
        gone = like.argsort(descending=True, stable=True)[: len(left) - number]
        gone = gone[like[gone] > float("-inf")]
        if not len(gone):  # one token in every frame: drop from the end
            return left[:number], weights[:number]
        mean = torch.eye(len(left), device=x.device)
        mean[match[gone], gone] = 1
        mean /= mean.sum(dim=1, keepdim=True)
        stay = torch.ones(len(left), dtype=torch.bool, device=x.device).index_fill(0, gone, False)
        weights = (mean @ weights)[stay]
        left = [place for place, here in zip(left, stay.tolist(), strict=True) if here]
    return left, weights


def all_merged(c: Candidates) -> list[tuple[list[int], Tensor]]:
    features = c.features[:, 0].float()[c.index]  # [S, N, d]
    return [
        merged(x[:n], place[:n, 0].contiguous(), p)
        for x, place, n, p in zip(features, c.place, c.counts, c.keep_counts, strict=True)
    ]


def page_rank(c: Candidates) -> Tensor:
    """`[S, N]` importance of each visual token in its row's attention, the text's included."""
    rows = c.sequences
    batch, slots = rows.positions.shape
    q, k = (x[:, 0].float().view(batch, slots, *x.shape[2:]).transpose(1, 2) for x in (c.queries, c.keys))
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # [B, H, n, D]
    at, real = rows.positions, rows.positions >= 0
    visible = (at[:, None] <= at[..., None]) & real[:, None]  # [B, n, n]
    logits = (q @ k.transpose(-1, -2) * c.scale / TEMPERATURE).masked_fill(~visible[:, None], float("-inf"))
    flow = logits.softmax(dim=-1).nan_to_num() * real[:, None, :, None]
    rank = (real / real.sum(dim=1, keepdim=True))[:, None, None].expand(-1, q.shape[1], -1, -1)
    for _ in range(STEPS):
        rank = rank @ flow  # [B, H, 1, n]
    return rank[:, :, 0].square().mean(dim=1).sqrt().flatten()[c.index]


def score(c: Candidates) -> Tensor:
    return page_rank(c) if c.layer >= 0 else chosen(c, [left for left, _ in all_merged(c)])


def merge(c: Candidates, kept: Tensor) -> Tensor:
    mixture = unchanged(kept, c.index.shape[1])
    if c.layer < 0:
        for row, (left, weights) in enumerate(all_merged(c)):
            mixture[row, : len(left), : c.counts[row]] = weights
    return mixture


def plan(seams: Seams, final_ratio: float) -> Plan:
    depth = len(seams.layers)
    first = round(FIRST * depth / DEPTH)
    layers = range(first, max(first + 1, round((LAST + 1) * depth / DEPTH)))
    entering = math.sqrt(final_ratio)
    step = (entering - final_ratio) / len(layers)
    shares = [entering, *(entering - step * (i + 1) for i in range(len(layers)))]
    shares[-1] = final_ratio
    return Plan((), ("input", *layers), llm_shares=tuple(shares), score=score, merge=merge)


RIVAL = Rival(
    "AIM",
    "Zhong et al., ICCV 2025, arXiv 2412.03248; LaVi-Lab/AIM llava/model/token_merge.py, "
    "other_packages/transformers/.../qwen2/modeling_qwen2.py",
    "llm",
    "Published for videos: 25 % after merging, then down to none at layer 21. Here merging leaves the "
    "root of the final ratio, and pruning goes down to it in equal steps; the best pairs of all frames "
    "go first, so frames may keep different numbers; tokens keep their order between rounds; tokens are "
    "really removed, its code masks them; layers at the same relative depth.",
    plan,
)
