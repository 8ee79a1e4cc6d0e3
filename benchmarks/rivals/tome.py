"""ToMe: every encoder block merges the pairs of tokens whose keys are most alike (bipartite soft matching).

Bolya et al., ICLR 2023, arXiv 2210.09461; github.com/facebookresearch/ToMe, tome/merge.py and
tome/patch/timm.py: between attention and feed-forward network of every block; tokens at even places look for
the most like token at odd places, by their keys averaged over heads; the r best pairs become one token, the
mean weighted by how many patches each stands for; keys of larger tokens draw more attention (proportional
attention). A constant r, as most of the paper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from illava import Candidates, Plan
from illava.families.seams import Seams
from rivals.common import Rival, cosine, gathered, is_kept, mean_keys


def matching(c: Candidates, metric: Tensor) -> tuple[Tensor, Tensor]:
    """`[S, N]` how like its best match each unit is, and where that stands; none at odd places."""
    odd = torch.arange(c.index.shape[1], device=c.index.device) % 2 == 1
    likeness = cosine(metric).masked_fill(~(odd & c.real)[:, None], float("-inf"))
    like, match = likeness.max(dim=2)
    return like.masked_fill(odd, float("-inf")), match


def score(c: Candidates) -> Tensor:
    """The better the match, the sooner a unit goes; those matched stay."""
    return -matching(c, mean_keys(c))[0]


def merge(c: Candidates, kept: Tensor) -> Tensor:
    place = torch.arange(c.index.shape[1], device=c.index.device).expand(c.index.shape)
    owner = torch.where(is_kept(c, kept), place, matching(c, mean_keys(c))[1])
    return gathered(kept, owner.masked_fill(~c.real, -1), c.sizes[c.index])


def shares(final_ratio: float, depth: int) -> tuple[float, ...]:
    """Equal steps down to the final ratio, as far as no block can lose more than half of its tokens."""
    step = (1 - final_ratio) / depth
    return tuple(min(1 - step * done, final_ratio * 2 ** (depth - done)) for done in range(1, depth + 1))


def plan(seams: Seams, final_ratio: float) -> Plan:
    depth = len(seams.blocks)
    return Plan(
        tuple(range(depth)), (), vit_shares=shares(final_ratio, depth),
        score=score, merge=merge, proportional=True,
    )  # fmt: skip


RIVAL = Rival(
    "ToMe",
    "Bolya et al., ICLR 2023, arXiv 2210.09461; facebookresearch/ToMe tome/merge.py, tome/patch/timm.py",
    "encoder",
    "Merge units instead of patches, the keys of their patches side by side and merged slot by slot; "
    "survivors keep their order; below 1/(blocks + 1) steps grow smaller towards the end, for a block can "
    "only halve; in Qwen2.5-VL, matched over the whole frame also where attention is windowed.",
    plan,
)
