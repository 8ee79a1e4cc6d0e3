"""The attention of merging modules: the user's own, and the statistics on the way."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from illava.hooks.state import OfOneModel, State

# The name under which a merging attention module finds illava's attention function. It is read from
# that module's own view of its config, only while it merges; no other model ever carries it.
ATTENTION_NAME = "illava"


class ConfigView(OfOneModel):
    """One attention module's view of its config: illava's attention function while it merges."""

    def __init__(self, config: Any, merging: Callable[[], bool], state: State) -> None:
        self.__dict__.update(_config=config, _merging=merging, illava_state=state)

    @property
    def _attn_implementation(self) -> str:
        return ATTENTION_NAME if self._merging() else self._config._attn_implementation

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_config"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._config, name, value)


def attention(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, **kwargs: Any
) -> tuple[Any, Any]:
    """The attention function of a merging module: the user's own, plus the statistics.

    Args:
        query, key, value: `[B, H, L, D]` as Hugging Face hands them over, rotated.

    Returns:
        `[B, L, H, D]`, and the weights if the user's own function returns them.
    """
    state: State = module.config.illava_state
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    vision = state.vision.get()
    if vision is not None and vision.attending is not None:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # [rows, width, H, D]
        return vision.attend(q, k, v, scale), None
    call = state.language.get()
    if call is None or call.attending is None:
        raise RuntimeError("illava's attention function called outside a merging layer")
    layer, call.attending = call.attending, None  # from here on the config tells the user's own name
    result = own_attention(module)(module, query, key, value, attention_mask, **kwargs)
    with torch.no_grad():
        call.score(layer, query.detach(), key.detach(), scale)
    return result


def own_attention(module: Any) -> Callable[..., Any]:
    """The attention function the user chose for this module."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = module.config._attn_implementation
    if name == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]
