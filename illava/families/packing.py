"""Features that a model crops, interpolates or pools, some of them merged away."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from illava.errors import SeamError
from illava.sparse import sparse

# Weights of a packed feature that are nothing but rounding.
TINY = 1e-4
# Sources of one packed feature are neighbours on the picture, and lie in tiles next to each other. Features
# of one colour, by parity of row and column and by tile, are never both among them.
TILE_COLOURS = 16
COLOURS = 4 * TILE_COLOURS


def pack_over_dead(original: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run a model's own packing over features of which some are -inf.

    The packing runs twice: over the features, dead ones as zero, and over a single channel that is 1
    where a feature is alive. A packed feature is the weighted mean of the live ones behind it, and
    -inf where all are dead. The model's own newline feature counts as alive.

    Args:
        original: the bound method; its first argument holds features `[..., d]`, a tensor or a list
            of tensors; it returns packed ones, alone or first in a tuple.
    """
    call = inspect.signature(original).bind(*args, **kwargs)
    first = next(iter(call.arguments))
    features = call.arguments[first]
    single = isinstance(features, Tensor)
    alive = [~torch.isneginf(f).all(dim=-1, keepdim=True) for f in ([features] if single else features)]
    filled = [f.masked_fill(~a, 0) for f, a in zip([features] if single else features, alive, strict=True)]
    call.arguments[first] = filled[0] if single else filled
    packed = original(*call.args, **call.kwargs)

    call.arguments[first] = alive[0].float() if single else [a.float() for a in alive]
    newline = call.arguments.get("image_newline")
    if newline is not None:
        call.arguments["image_newline"] = torch.ones(1, device=newline.device)
    weights = original(*call.args, **call.kwargs)
    if isinstance(packed, tuple):
        return (_restore(packed[0], weights[0]), *packed[1:])
    return _restore(packed, weights)


def _restore(packed: Any, weights: Any) -> Any:
    if not isinstance(packed, Tensor):
        return type(packed)(_restore(p, w) for p, w in zip(packed, weights, strict=True))
    whole, dead = weights > 1 - TINY, weights < TINY
    mean = packed / weights.masked_fill(whole | dead, 1).to(packed.dtype)
    return mean.masked_fill(dead, float("-inf"))


@torch.no_grad()
def weights_of_packing(
    original: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[Tensor]:
    """Of which features a model's own packing makes each packed one.

    The packing runs over three channels per colour: 1, the feature's number, and its square. Where one
    feature of a colour goes into a packed one, the first is its weight and the second tells which it is; the
    third would tell if there were two.

    Args:
        original, args, kwargs: as for `pack_over_dead`; of the features only their shapes are read.

    Returns:
        For each item of the features, which are `[tiles, n, d]` each or one tensor of frames `[n, d]`, its
        weights `[packed, features]`, sparse, in fp64 on the CPU. A newline's row has none.

    Raises:
        SeamError: it mixes features that are no neighbours.
    """
    call = inspect.signature(original).bind(*args, **kwargs)
    first = next(iter(call.arguments))
    features = call.arguments[first]
    single = isinstance(features, Tensor)
    shapes = [(1, *f.shape[:-1]) if single else f.shape[:-1] for f in features]
    probes = [_probe(tiles, size) for tiles, size in shapes]
    call.arguments[first] = torch.cat(probes) if single else probes
    if call.arguments.get("image_newline") is not None:
        call.arguments["image_newline"] = torch.zeros(3 * COLOURS, dtype=torch.float64)
    packed = original(*call.args, **call.kwargs)
    found = packed[0] if isinstance(packed, tuple) else packed
    return [_sources(rows, tiles * size) for rows, (tiles, size) in zip(found, shapes, strict=True)]


def _probe(tiles: int, size: int) -> Tensor:
    """`[tiles, size, 3 * COLOURS]`, every feature's three channels in those of its colour."""
    number, side = torch.arange(tiles * size), math.isqrt(size)
    tile, place = number // size, number % size
    colour = (place // side % 2) * 2 + place % side % 2 + 4 * (tile % TILE_COLOURS)
    powers = torch.stack([number.double() ** i for i in range(3)], dim=1)  # [tiles * size, 3]
    channels = torch.zeros(len(number), COLOURS, 3, dtype=torch.float64)
    channels[number, colour] = powers
    return channels.flatten(1).unflatten(0, (tiles, size))


def _sources(rows: Tensor, features: int) -> Tensor:
    """`[packed, features]` sparse, told by the channels `[packed, 3 * COLOURS]`."""
    weight, first, second = rows.unflatten(-1, (COLOURS, 3)).unbind(-1)  # [packed, COLOURS] each
    row, colour = (weight.abs() > TINY**2).nonzero(as_tuple=True)
    weight, first, second = (x[row, colour] for x in (weight, first, second))
    mean = first / weight
    number = mean.round()
    apart = (second / weight - 2 * number * mean + number**2).abs().amax() if len(row) else 0
    if apart > 0.01:
        raise SeamError(
            "this model's packing makes one visual token of features that are no neighbours, and what it is "
            "made of cannot be told; patch without trace=True, or report this at the project's issue tracker"
        )
    return sparse(row, number.long(), weight, (len(rows), features))
