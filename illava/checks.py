"""Finding the model inside its wrappers, and refusing one that cannot be patched."""

from __future__ import annotations

import inspect
import os
from typing import Any

from torch import nn

from illava.errors import AlreadyPatchedError, PlanError, SeamError, UnsupportedModelError
from illava.families.parts import is_saved_by_peft
from illava.families.seams import Seams

# The file of transformers 4.57 whose wrappers record hidden states.
RECORDER = os.path.join("transformers", "utils", "generic.py")


def unwrap(model: Any) -> nn.Module:
    """The Hugging Face model inside `torch.compile`, PEFT and DataParallel wrappers."""
    while isinstance(model, nn.Module):
        if "_orig_mod" in model._modules:
            model = model._orig_mod
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
            model = model.get_base_model()
        else:
            return model
    raise UnsupportedModelError(
        f"{type(model).__name__} is not a model; pass the Hugging Face model itself, not its name or path"
    )


def check_untouched(seams: Seams) -> None:
    """Another tool's `forward` at a place illava needs would be fed what it does not expect."""
    places = [("vision encoder", seams.tower), ("language model", seams.language_model)]
    places += [(f"encoder block {i}", b) for i, b in enumerate(seams.blocks)]
    places += [(f"decoder layer {i}", b) for i, b in enumerate(seams.layers)]
    places += [
        (f"attention of encoder block {i}", getattr(b, seams.block_attention))
        for i, b in enumerate(seams.blocks)
    ]
    places += [
        (f"attention of decoder layer {i}", getattr(seams.layers[i], seams.layer_attention))
        for i in sorted(seams.scoring_layers)
    ]
    for place, module in places:
        own = module.__dict__.get("forward")
        if _is_transformers_own(own, module):
            own = None
        by_accelerate = hasattr(module, "_hf_hook")
        by_compile = hasattr(own, "_torchdynamo_orig_callable")
        home = getattr(type(module).forward, "__module__", "")
        foreign_class = not home.startswith("transformers.") and home != type(module).__module__
        # A copy that PEFT trains in a module's place has blocks of its own, which hooks would miss.
        foreign_class |= is_saved_by_peft(module)
        if (own is not None and not by_accelerate and not by_compile) or foreign_class:
            source = getattr(own, "__module__", None) or home
            raise AlreadyPatchedError(
                f"the {place} ({type(module).__name__}) runs code of {source!r} in place of its own; two "
                "tools cannot shorten the same tokens. Undo the other one, or load the model afresh"
            )


def _is_transformers_own(forward: Any, module: nn.Module) -> bool:
    """Whether a `forward` on the instance is the class's own, bare or as transformers records it.

    4.57 puts a recording one there while it collects hidden states, the bare one back afterwards, and
    after an exception not even that.
    """
    while getattr(getattr(forward, "__code__", None), "co_filename", "").endswith(RECORDER):
        forward = forward.__wrapped__
    return getattr(forward, "__func__", None) is type(module).forward


def check_spans(seams: Seams) -> None:
    """Whether the encoder's attention has spans that could be run together.

    Raises:
        PlanError: it takes pictures as rows of a batch, or attends with flash attention already.
    """
    attention = getattr(seams.blocks[0], seams.block_attention)
    implementation = seams.tower.config._attn_implementation
    packed = "cu_seqlens" in inspect.signature(type(attention).forward).parameters
    if not packed or implementation.startswith("flash"):
        how = f"attends with {implementation!r}" if packed else "takes pictures as rows of one batch"
        raise PlanError(
            f"fast_windows=True: the vision encoder {type(seams.tower).__name__} {how}, which runs all of "
            "them in one call already; leave fast_windows out"
        )


def check_proportional(seams: Seams) -> None:
    """Whether the encoder's attention can be told what its tokens stand for.

    Raises:
        PlanError: it is code of the blocks' own.
    """
    if seams.block_observed is not None:
        raise PlanError(
            f"proportional=True: the blocks of {type(seams.tower).__name__} compute their attention by "
            "themselves, and cannot be told how many tokens one stands for; leave proportional out, or give "
            "proportional=False"
        )


def check_attention(seams: Seams) -> None:
    """Which attention implementations merging can serve."""
    for name, module in (("vision encoder", seams.tower), ("language model", seams.language_model)):
        implementation = module.config._attn_implementation
        if implementation not in ("eager", "sdpa") and not implementation.startswith("flash_attention"):
            raise SeamError(
                f"the {name} attends with {implementation!r}, whose masks illava cannot shorten; load the "
                "model with attn_implementation='sdpa', 'eager' or 'flash_attention_2'"
            )
    kinds = set(getattr(seams.language_model.config, "layer_types", None) or ())
    kinds -= {"full_attention", "linear_attention"}
    if kinds:
        raise SeamError(
            f"the language model has {', '.join(sorted(kinds))} layers, whose caches cannot hold merged "
            "sequences; set use_sliding_window=False in its config"
        )
