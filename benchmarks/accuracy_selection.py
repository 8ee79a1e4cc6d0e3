"""Other ways to say which units stay, where the paper's rule makes them: an ablation of accuracy.py.

Single patches cannot be selected on their own: the merger behind the encoder joins a fixed group of them, so
a unit stays or goes as a whole. How its patches' importance becomes its own is open: illava takes the mean.
In the encoder every frame of a video keeps as many units as every other, since how many stay is known before
anything is computed; in the language model illava selects among all that is left of the video.

Notation for tensor shapes: S segments, N units of the largest, g patches per unit, n units of one segment,
H query heads, K key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from illava import Candidates


def best_patch(c: Candidates) -> Tensor:
    """`[S, N]`: in the encoder a unit is worth what its most attended patch receives, not their mean.

    Attention is taken over the whole picture, without a class token where there is one.
    """
    return by_patch(c, lambda received: received.amax(dim=1)) if c.stage == "vit" else c.attention


def by_patch(c: Candidates, joined: Callable[[Tensor], Tensor]) -> Tensor:
    """`[S, N]` of `joined`, which makes `[n, g]`, what the patches of a segment's units receive, `[n]`."""
    if c.queries is None or c.keys is None:
        raise ValueError(f"{c.stage} layer {c.layer}: nothing attends where there are no queries and keys")
    found = torch.zeros(c.index.shape, device=c.index.device)
    repeats = c.queries.shape[2] // c.keys.shape[2]
    for row, units in enumerate(c.counts):
        index = c.index[row, :units]
        queries = c.queries[index].flatten(0, 1).transpose(0, 1)  # [H, n*g, D]
        keys = c.keys[index].flatten(0, 1).transpose(0, 1).repeat_interleave(repeats, dim=0)  # [H, n*g, D]
        weights = (queries.float() @ keys.float().mT * c.scale).softmax(dim=-1)  # [H, n*g, n*g]
        found[row, :units] = joined(weights.mean(dim=(0, 1)).unflatten(0, (units, -1)))  # [n, g] to [n]
    return found


def every_frame_alike(c: Candidates) -> Tensor:
    """`[S, N]`: in the language model, too, as many units of each frame stay; of each its most attended."""
    if c.stage == "vit":
        return c.attention
    order = c.attention.masked_fill(~c.real, float("-inf")).argsort(dim=1, descending=True, stable=True)
    frames = c.place[..., 0].gather(1, order)  # [S, N]
    same = frames[:, :, None] == frames[:, None]  # [S, N, N]
    rank = same.tril(-1).sum(dim=2)  # [S, N] how many of its own frame receive more
    within = torch.arange(order.shape[1], device=order.device) / order.shape[1]  # ties by attention
    return torch.empty_like(c.attention).scatter(1, order, -(rank + within).to(c.attention.dtype))
