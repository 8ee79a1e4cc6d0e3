"""The attention of merging modules: the user's own, and the statistics on the way."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from illava.hooks import in_graph, under_way
from illava.hooks.state import OfOneModel, State
from illava.vision import VisionCall

# The names under which a merging attention module finds illava's attention function. They are read from
# that module's own view of its config, only while it merges; no other model ever carries them. Packed
# encoders go by "flash" in the name: to such attention they hand all spans at once.
ATTENTION_NAME = "illava"
ENCODER_ATTENTION_NAME = "illava_flash_packed"


class ConfigView(OfOneModel):
    """One attention module's view of its config: illava's attention function while it merges."""

    def __init__(self, config: Any, merging: Callable[[], bool], state: State, name: str) -> None:
        self.__dict__.update(_config=config, _merging=merging, illava_state=state, _name=name)

    @property
    def _attn_implementation(self) -> str:
        return self._name if self._merging() else self._config._attn_implementation

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_config"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._config, name, value)


def attention(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any = None,
    dropout: float = 0.0,  # by name, as other tools that wrap attention functions hand it on by position
    **kwargs: Any,
) -> tuple[Any, Any]:
    """The attention function of a merging module: the user's own, plus the statistics.

    Args:
        query, key, value: `[B, H, L, D]` as Hugging Face hands them over, rotated.

    Returns:
        `[B, L, H, D]`, and the weights if the user's own function returns them.
    """
    state: State = module.config.illava_state
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    vision = under_way.VISION.of(state.number)
    if vision is not None and vision.attending is not None:
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)  # [rows, width, H, D]
        if in_graph.possible(vision):
            return in_graph.attend(vision, q, k, v, scale), None
        return _attend(vision, q, k, v, scale), None
    call = under_way.LANGUAGE.of(state.number)
    if call is None or call.attending is None:
        raise RuntimeError("illava's attention function called outside a merging layer")
    # The statistics wait until the layer is left, where a compiled graph has one operation for all of it.
    call.attended[call.attending] = query.detach(), key.detach(), scale
    call.attending = None  # from here on the config tells the user's own name
    return own_attention(module)(module, query, key, value, attention_mask, dropout=dropout, **kwargs)


@torch.compiler.disable
def _attend(call: VisionCall, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    if call.attending is None:
        raise RuntimeError("illava's attention function called outside an encoder block")
    call.begin_attention(call.attending, call.bounds)
    return call.attend(q, k, v, scale)


def own_attention(module: Any) -> Callable[..., Any]:
    """The attention function the user chose for this module."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = module.config._attn_implementation
    if name == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]
