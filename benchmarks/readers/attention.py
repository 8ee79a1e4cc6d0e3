"""Attention for training on a CPU, where torch's own takes five times as long to go backward."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "three_operations"
OUT = -1e4  # added to scores that do not count: small enough for softmax, and finite in bfloat16


def additive(seen: Tensor) -> Tensor:
    """A mask to add to scores, bfloat16, of one that is True where a token is seen."""
    return torch.zeros(seen.shape, dtype=torch.bfloat16, device=seen.device).masked_fill_(~seen, OUT)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None,
    scaling: float | None = None, **_,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention written out: queries `[B, heads, L, d]`, keys and values `[B, groups, S, d]` to `[B, L, heads, d]`.

    Raises:
        ValueError: the mask is one of booleans, see `additive`.
    """
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))  # [B, heads, S, d]
    query, key = query.to(value.dtype), key.to(value.dtype)  # rotary embeddings leave them in float32
    scores = (query * (scaling or query.shape[-1] ** -0.5)) @ key.mT  # [B, heads, L, S]
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            raise ValueError("this attention adds its mask to the scores: make it with `additive` first")
        scores = scores + attention_mask
    return (scores.softmax(-1) @ value).transpose(1, 2), None


def use(model: nn.Module) -> None:
    """Have a model's attention computed so; of Qwen's encoder, which attends in windows, only the decoder's."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)  # batches bring their masks along
    parts = {"text_config": NAME} if model.config.model_type == "qwen2_5_vl" else NAME
    model.set_attn_implementation(parts)
