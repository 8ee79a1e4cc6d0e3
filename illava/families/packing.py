"""Features that a model crops, interpolates or pools, some of them merged away."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Weights of an interpolation that are nothing but rounding.
TINY = 1e-4


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
