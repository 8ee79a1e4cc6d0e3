"""Calls of the language model that merging cannot serve."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from illava.errors import UnsupportedInputError
from illava.families.visual import VisualInput


def refuse_checkpointing(module: nn.Module) -> None:
    """Refuse a module that would run again for its gradients.

    Raises:
        UnsupportedInputError: it trains with gradient checkpointing.
    """
    if module.training and any(getattr(m, "gradient_checkpointing", False) for m in module.modules()):
        raise UnsupportedInputError(
            "gradient checkpointing recomputes layers after the call is over, when what was merged is "
            f"forgotten; call gradient_checkpointing_disable() on the model's {type(module).__name__} "
            "while it is patched"
        )


def refuse_unserved(attention_mask: Any, position_ids: Tensor | None, batch: int) -> None:
    """Say which arguments of a call merging cannot serve, before anything runs.

    Raises:
        UnsupportedInputError: a mask that is not 2-D, or packed sequences.
    """
    if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2):
        shape = (
            tuple(attention_mask.shape)
            if isinstance(attention_mask, Tensor)
            else type(attention_mask).__name__
        )
        raise UnsupportedInputError(
            f"attention_mask of {shape}: a ready-made mask of the caller's length fits no layer after a "
            "merge; pass the tokenizer's 2-D mask of 0 and 1, from which illava makes each layer's own"
        )
    if attention_mask is None and batch == 1 and position_ids is not None and position_ids.ndim == 3:
        text = position_ids[0, 0]
        if position_ids.shape[0] == 4 and text.numel() > 1 and not bool((text.diff() == 1).all()):
            raise UnsupportedInputError(
                f"position_ids restart {int((text.diff() != 1).sum())} times within one row: packed "
                "sequences are not supported; pass one sequence per row with a 2-D attention mask"
            )


def refuse_router_logits(wanted: bool) -> None:
    """Refuse to record the router of a mixture of experts where tokens leave between its layers.

    Hugging Face makes the load-balancing loss of them and of the caller's mask, which has another length.

    Raises:
        UnsupportedInputError: it was asked for.
    """
    if wanted:
        raise UnsupportedInputError(
            "output_router_logits=True: the load-balancing loss counts every token in every layer, and "
            "merged tokens pass no router any more; leave it out, or remove the patch first"
        )


def refuse_chunks(visual: VisualInput | None, chunk: int) -> None:
    """Refuse a prompt whose chunks hold tokens of several pictures.

    Hugging Face hands a chunk the features of all its images (or videos) as one tensor, and nothing says
    where one ends and the next begins.

    Args:
        visual: the prompt's pictures.
        chunk: tokens of a chunk.

    Raises:
        UnsupportedInputError: such a chunk.
    """
    if visual is None:
        return
    for number, segment in enumerate(visual.segment.split(chunk, dim=1)):
        found = [visual.kinds[i] for i in sorted(set(segment[segment >= 0].tolist()))]
        for kind in dict.fromkeys(found):
            if (count := found.count(kind)) > 1:
                raise UnsupportedInputError(
                    f"prefill_chunk_size={chunk} puts tokens of {count} encoded pictures, tiles or videos of "
                    f"kind {kind!r} into chunk {number}, which transformers hands over as one: where one "
                    "ends and the next begins is lost. Leave out prefill_chunk_size: merging shortens prompts"
                )


def refuse_broken(
    broken: Mapping[int, int], visual: VisualInput, dtype: torch.dtype, finite: Sequence[Mapping[int, Tensor]]
) -> None:
    """Refuse pictures whose features are NaN or infinite: nothing can be ranked by them.

    Args:
        broken: tokens with such features, by the number of the picture.
        visual: the pictures of the call.
        dtype: of the features.
        finite: of each encoder call since the last report, by merging block whether what it attended
            to was finite. Read from the device here, for the call is over anyway.

    Raises:
        UnsupportedInputError: always.
    """
    number = min(broken)
    row = int((visual.segment == number).any(dim=1).nonzero()[0])
    first = min((block for call in finite for block, fine in call.items() if not bool(fine)), default=None)
    if first is not None:
        where = f"they were no longer finite in the attention of encoder block {first}"
    elif any(finite):
        last = max(block for call in finite for block in call)
        where = f"they were finite up to encoder block {last}, the last that merges"
    else:
        where = "no merging encoder block saw them before, so they came with the call or out of the encoder"
    name = str(dtype).removeprefix("torch.")
    raise UnsupportedInputError(
        f"{visual.kinds[number]} {number} (row {row}) has NaN or infinite features in {broken[number]} of "
        f"its {visual.tokens[number]} tokens, in {name}: {where}. Look at the pixels and the weights; an "
        "encoder that overflows float16 runs in bfloat16 or float32"
    )


def refuse_presses(attentions: Iterable[nn.Module]) -> None:
    """Refuse to merge under kvpress, which would silently compress nothing.

    Its presses know a prefill by `cache_position` ending where the layer's own tokens do, which no layer
    behind a merge fulfils.

    Raises:
        UnsupportedInputError: one is attached.
    """
    for attention in attentions:
        for hook in attention._forward_hooks.values():
            press = type(getattr(hook, "__self__", None))
            if press.__module__.partition(".")[0] == "kvpress":
                raise UnsupportedInputError(
                    f"kvpress' {press.__name__} is attached to a model that illava has patched: it takes a "
                    "merged prompt for decoding and would leave the cache as it is. Use one of the two: "
                    "leave the press out (illava shortens the cache as well), or call handle.remove() first"
                )
