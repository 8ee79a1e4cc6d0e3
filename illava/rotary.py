"""Rotary position embedding, undone: queries and keys as they were before positions turned them.

Notation for tensor shapes: B rows, n slots, D channels that turn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rotation(embeddings: tuple[Tensor, Tensor], config: Any) -> tuple[Tensor, Tensor]:
    """The cosines and sines of a decoder layer as `[B, n, D]`.

    Args:
        embeddings: as Hugging Face hands them to the layer; before transformers 5 those of multimodal
            positions come as `[3, B, n, D]`, of which each section of the channels has its own.
        config: of the language model.
    """
    cos, sin = embeddings
    if cos.ndim == 3:
        return cos, sin
    sections = [*config.rope_scaling["mrope_section"]] * 2

    def joined(x: Tensor) -> Tensor:
        return torch.cat([part[i % 3] for i, part in enumerate(x.split(sections, dim=-1))], dim=-1)

    return joined(cos), joined(sin)


def unrotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn queries or keys back.

    Args:
        x: `[..., head size]`, whose first D channels were turned, each with the one D/2 after it.
        cos, sin: `[..., D]`.
    """
    turned, still = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    low, high = turned.chunk(2, dim=-1)
    back = turned * cos + torch.cat([high, -low], dim=-1) * sin
    return torch.cat([back / (cos * cos + sin * sin), still], dim=-1)
