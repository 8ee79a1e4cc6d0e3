"""Attention for training on a CPU, where torch's own takes five times as long forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from illava.attention.spans import Spans

NAME = "written_out_for_flash"  # with this word in it, transformers 5 hands over all windows in one call
OUT = -1e4  # added to scores that do not count: small enough for softmax, and finite in bfloat16


def additive(seen: Tensor) -> Tensor:
    """A mask to add to scores, bfloat16, of one that is True where a token is seen."""
    return torch.zeros(seen.shape, dtype=torch.bfloat16, device=seen.device).masked_fill_(~seen, OUT)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None,
    scaling: float | None = None, cu_seq_lens_q: Tensor | None = None, **_,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention written out: `[B, heads, L, d]` queries, `[B, groups, S, d]` keys to `[B, L, heads, d]`.

    Args:
        cu_seq_lens_q: bounds of windows within which tokens attend, in a batch of one, as flash-attn's.

    Raises:
        ValueError: the mask is one of booleans, see `additive`.
    """
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        raise ValueError("this attention adds its mask to the scores: make it with `additive` first")
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))  # [B, heads, S, d]
    query, key = query.to(value.dtype), key.to(value.dtype)  # rotary embeddings leave them in float32
    query = query * (scaling or query.shape[-1] ** -0.5)
    if cu_seq_lens_q is None:
        return _weigh(query, key, value, attention_mask).transpose(1, 2), None
    found, places = [], []
    for index, _real in Spans.from_cu_seqlens(cu_seq_lens_q).tables(padded=False):  # [windows, l]
        of = (x[0][:, index].transpose(0, 1) for x in (query, key, value))  # [windows, heads, l, d]
        found.append(_weigh(*of, None).transpose(1, 2).flatten(0, 1))  # [windows · l, heads, d]
        places.append(index.flatten())
    return torch.cat(found)[torch.cat(places).argsort()][None], None  # [1, L, heads, d]


def _weigh(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    scores = query @ key.mT  # [B, heads, L, S]
    return (scores if mask is None else scores + mask).softmax(-1) @ value


def use(model: nn.Module) -> None:
    """Have all of a model attend so."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)  # batches bring their masks along
    model.config._attn_implementation = NAME  # set_attn_implementation would look for a package of that name
