"""What illava needs to know of a model: where its parts are. Filled in by one file per family."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from illava.errors import SeamError


@dataclass(frozen=True)
class Seams:
    """The parts of one model that merging touches.

    Attributes:
        model: the module that takes pictures and text (`...Model`).
        tower: the vision encoder; `blocks` its blocks, each with an attention, a second norm and a
            feed-forward network under the names given, joined as `h = h + ffn(norm(h))`.
        projector: the module that turns merge units into visual tokens.
        language_model: the decoder stack; `layers` its layers.
        merge_size: patches along one side of a merge unit.
        full_attention_blocks: encoder blocks that attend over a whole frame; the others attend in
            windows of `window_patches` patches.
        vit_default, llm_default: the family's default merging layers.
    """

    model: nn.Module
    tower: nn.Module
    blocks: Sequence[nn.Module]
    block_attention: str
    block_norm: str
    block_ffn: str
    projector: nn.Module
    language_model: nn.Module
    layers: Sequence[nn.Module]
    layer_attention: str
    merge_size: int
    full_attention_blocks: frozenset[int]
    window_patches: int
    vit_default: tuple[int, ...]
    llm_default: tuple[int, ...]

    @property
    def unit_patches(self) -> int:
        """Patches of a merge unit."""
        return self.merge_size**2


@dataclass(frozen=True)
class VisualInput:
    """Which tokens of one call came from pictures.

    Attributes:
        segment: `[B, L]` int64 on the CPU: the number of the picture or video a token belongs to,
            -1 for text and padding.
        kinds: `"image"` or `"video"` per segment.
        tokens: visual tokens per segment in this call.
    """

    segment: torch.Tensor
    kinds: tuple[str, ...]
    tokens: tuple[int, ...]


def part(root: nn.Module, path: str, why: str) -> Any:
    """`root.path`, or an error that names what is missing.

    Raises:
        SeamError: this version of transformers has no such part.
    """
    current: Any = root
    for name in path.split("."):
        current = getattr(current, name, None)
        if current is None:
            import transformers

            raise SeamError(
                f"{type(root).__name__} has no {path!r} in transformers {transformers.__version__}; "
                f"illava needs it {why}. Install a version it was run on (4.57.6 or 5.23), or report "
                "this at the project's issue tracker."
            )
    return current


@lru_cache(maxsize=256)
def _signature(forward: Any) -> inspect.Signature:
    return inspect.signature(forward)


def arguments(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Everything a module was called with, by name, whether it came by position or by keyword."""
    names = [n for n in _signature(type(module).forward).parameters if n != "self"]
    return dict(zip(names, args, strict=False)) | dict(kwargs)
