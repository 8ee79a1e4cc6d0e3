"""SparseVLM: words that have to do with the picture rate its tokens; some of the rest are recycled.

Zhang et al., ICML 2025, arXiv 2410.04417; github.com/Gumpest/SparseVLMs (v1.5),
llava/model/language_model/modelling_sparse_llama.py, score.py and utils.py: raters are the text tokens whose
mean softmax over text, of features' products before the first layer, is above the average; after layers 2, 6
and 15 of 32 the tokens to which raters pay most attention stay; of the others the best 30 % are clustered
(density peaks, k nearest neighbours) into a tenth as many means.
"""

from __future__ import annotations

import torch
from torch import Tensor

from illava import Candidates, Plan
from illava.families.seams import Seams
from illava.schedule import scale_layers
from rivals.common import Rival, chosen, gathered

LAYERS, DEPTH = (2, 6, 15), 32
RECYCLED, CLUSTER = 0.3, 10
# Shares of 576 tokens left at each layer, for 192, 128, 96 and 64 tokens on average (score.py).
PUBLISHED = (
    (1.0, 1.0, 1.0),
    (300 / 576, 200 / 576, 110 / 576),
    (303 / 576, 110 / 576, 36 / 576),
    (238 / 576, 48 / 576, 26 / 576),
    (66 / 576, 30 / 576, 17 / 576),
    (0.0, 0.0, 0.0),
)


def raters(c: Candidates) -> Tensor:
    """`[S, T]` bool: the words behind the picture that are likest to it."""
    places, real = c.text
    products = torch.einsum("snd,std->snt", c.inputs[c.index].float(), c.inputs[places].float())
    weights = products.masked_fill(~real[:, None], float("-inf")).softmax(dim=-1).nan_to_num()  # [S, N, T]
    mean = (weights * c.real[..., None]).sum(dim=1) / c.real.sum(dim=1, keepdim=True)  # [S, T]
    return (mean > mean.sum(dim=1, keepdim=True) / real.sum(dim=1, keepdim=True).clamp(min=1)) & real


def rating(c: Candidates) -> Tensor:
    """`[S, N]` attention from the raters; from everything that sees it, where no word follows a picture."""
    asking = raters(c)
    return torch.where(asking.any(dim=1, keepdim=True), c.text_attention(asking), c.attention)


def clustered(features: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Density peaks of `[N, d]`: which ones are centres, `[number]`, and `[N]` the centre of each."""
    distance = torch.cdist(features, features) / features.shape[1] ** 0.5
    near = distance.topk(number, dim=1, largest=False).values
    density = (-near.square().mean(dim=1)).exp()
    denser = density[None] > density[:, None]
    peak = torch.where(denser, distance, distance.max()).min(dim=1).values * density
    centres = peak.argsort(descending=True, stable=True)[:number]
    owner = centres[distance[:, centres].argmin(dim=1)]
    owner[centres] = centres
    return centres, owner


def groups(c: Candidates) -> tuple[list[list[int]], Tensor]:
    """Who stays, and `[S, N]` into whom each goes, -1 for nobody."""
    ratings, features = rating(c), c.features[:, 0].float()
    owner = torch.full(c.index.shape, -1, device=c.index.device)
    stays = []
    for row, (count, kept) in enumerate(zip(c.counts, c.keep_counts, strict=True)):
        order = ratings[row, :count].argsort(descending=True, stable=True)
        centres = min(kept - 1, (int((count - kept) * RECYCLED) + 1) // CLUSTER + 1) if kept < count else 0
        top, rest = order[: kept - centres], order[kept - centres :]
        owner[row, top] = top
        if centres:
            best = rest[: max(centres, int(len(rest) * RECYCLED) + 1)]
            heads, mine = clustered(features[c.index[row, best]], centres)
            owner[row, best] = best[mine]
            top = torch.cat([top, best[heads]])
        stays.append(top.tolist())
    return stays, owner


def score(c: Candidates) -> Tensor:
    return chosen(c, groups(c)[0])


def merge(c: Candidates, kept: Tensor) -> Tensor:
    return gathered(kept, groups(c)[1], torch.ones(c.index.shape, device=kept.device))


def shares(final_ratio: float) -> tuple[float, ...]:
    """Its published lists, and what lies between them."""
    above = next(i for i in range(len(PUBLISHED) - 1) if PUBLISHED[i + 1][2] <= final_ratio)
    high, low = PUBLISHED[above], PUBLISHED[above + 1]
    part = (final_ratio - low[2]) / (high[2] - low[2])
    return *(a + (b - a) * part for a, b in zip(low[:2], high[:2], strict=True)), final_ratio


def plan(seams: Seams, final_ratio: float) -> Plan:
    layers = scale_layers(LAYERS, DEPTH, len(seams.layers))
    return Plan((), layers, llm_shares=shares(final_ratio)[-len(layers) :], score=score, merge=merge)


RIVAL = Rival(
    "SparseVLM",
    "Zhang et al., ICML 2025, arXiv 2410.04417; Gumpest/SparseVLMs v1.5 "
    "llava/model/language_model/modelling_sparse_llama.py, score.py, utils.py",
    "llm",
    "Recycled tokens count towards the final ratio; shares between its published lists are interpolated; a "
    "cluster stands where its centre stood, its code appends it and renumbers positions; raters are "
    "chosen anew at each layer, from the same input features, for the visual tokens still there; equal "
    "densities are not told apart by noise; layers at the same relative depth.",
    plan,
)
