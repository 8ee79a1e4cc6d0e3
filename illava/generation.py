"""What all that generates answers has in common: inputs, greedy settings, lengths, the cache's size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from illava.jobs.pictures import clip_options, correct_times

# Checkpoints that sample carry the last three, and transformers warns when they are left over.
GREEDY: dict[str, Any] = {
    "do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None
}  # fmt: skip


def processed(
    model: Any,
    processor: Any,
    texts: Sequence[str],
    pictures: Sequence[Sequence[Any]],
    clips: Sequence[tuple[Any, Any]],
) -> dict[str, Any]:
    """Inputs of `generate`: one batch, padded on the left, on the model's device.

    Args:
        model, processor: of one checkpoint.
        texts: prompts, each with its marks for pictures and videos.
        pictures: of each prompt, as PIL images.
        clips: of all prompts in their order, each as `illava.jobs.pictures.read_clip` gives it.

    Raises whatever the processor raises for what it refuses.
    """
    options: dict[str, Any] = {}
    # By prompt: LLaVA-OneVision cuts a picture into tiles only where it is alone in its prompt.
    if rows := [list(row) for row in pictures if row]:
        options["images"] = rows
    if clips:
        options |= clip_options(clips)
    begin = tokenizer_of(processor).bos_token
    if begin is not None and all(text.startswith(begin) for text in texts):
        options["add_special_tokens"] = False  # the chat template wrote it; as in apply_chat_template
    batch = processor(text=list(texts), padding=True, padding_side="left", return_tensors="pt", **options)
    correct_times(batch, processor, clips)
    # Only pixels take the model's type: in bfloat16, the seconds between frames would be rounded.
    return {
        name: value.to(model.device, model.dtype if name.startswith("pixel_values") else value.dtype)
        for name, value in batch.items()
        if isinstance(value, Tensor)
    }


def padding_of(model: Any, processor: Any) -> int | None:
    """The token that fills up after an answer's end: the model's, or else the tokenizer's."""
    pad = model.generation_config.pad_token_id
    return tokenizer_of(processor).pad_token_id if pad is None else pad


def tokenizer_of(processor: Any) -> Any:
    """A processor's tokenizer; what has none is one."""
    return getattr(processor, "tokenizer", processor)


def answer_lengths(model: Any, answers: Tensor, ends: int | Sequence[int] | None = None) -> list[int]:
    """Tokens of each answer, the one that ends it included.

    Args:
        answers: `[B, n]` new tokens; what comes after an end is padding.
        ends: tokens that end an answer, where `generate` was not left the model's own.
    """
    ends = model.generation_config.eos_token_id if ends is None else ends
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    ended = torch.isin(answers, torch.tensor(ends, device=answers.device, dtype=answers.dtype)).long()
    after = ended.cumsum(1) - ended  # [B, n] ends before each token
    return (after == 0).sum(1).tolist()


def cache_bytes(cache: Any) -> int:
    """Keys and values of all layers."""
    held = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(x.nbytes for x in held if x is not None)  # linear attention has neither
