"""The models that prefill.py measures: one per family, random weights, a real checkpoint made smaller.

Narrower and shallower, not rebalanced: heads keep their real sizes, feed-forward networks their real
ratios, what sits inside the encoder (full attention, deepstack taps, the inner merger) its real relative
depth, patches, tiles and windows their real sizes. Each is as large as two CPU cores prefill in about a
second. Encoders have 12 blocks and more, so that merging in three of them stays a small part.

Where a model is more than a smaller copy:
- Qwen3-VL-MoE sends a token to 8 experts as the real one does, but of 32, not 128, so that each expert
  meets as many tokens as a CPU needs to be busy; a real one meets as many with a picture four times larger.
- LLaVA-NeXT reads the output of the last block but one, and transformers runs the last one all the same.
- MiniCPM-V's linear attention runs in transformers' own torch code, here as for users without kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import prefill_configs as configs
import torch
import transformers
from prefill_configs import Shape
from torch import nn

from illava.evaluate import synthetic as inputs
from illava.evaluate.random_weights import build_random
from illava.evaluate.synthetic import Picture


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        name: of its classes in transformers, less `Config` and `ForConditionalGeneration`.
        shape: the small model.
        config: arguments of its config, of any shape.
        picture: a picture of `(height, width)` pixels in the form the family's processor gives.
        heads: channels of a head in the encoder and in the language model: widths are multiples.
        steps: a picture's sides are multiples of these pixels, the encoder's depth of these blocks.
    """

    name: str
    shape: Shape
    config: Callable[[Shape], dict[str, Any]]
    picture: Callable[[Any, tuple[int, int], torch.Generator], Picture]
    heads: tuple[int, int]
    steps: tuple[int, int]

    @property
    def exists(self) -> bool:
        """In the transformers installed."""
        return hasattr(transformers, f"{self.name}Config")


def build_config(family: Family, shape: Shape) -> Any:
    """The config of a family's model."""
    return getattr(transformers, f"{family.name}Config")(**family.config(shape))


def build_model(family: Family, config: Any, device: str, dtype: torch.dtype, attn: str) -> nn.Module:
    """A model with random weights, made on the device."""
    kind = getattr(transformers, f"{family.name}ForConditionalGeneration")
    return build_random(kind, config, device=device, dtype=dtype, attn=attn)


_MINICPM = Shape(216, 12, 512, 12, (1344, 1344))  # a thumbnail and 3 x 3 slices
FAMILIES = {
    "qwen2_vl": Family(
        "Qwen2VL",
        Shape(240, 12, 768, 8, (672, 672)),
        configs.qwen2_vl,
        inputs.qwen_picture,
        heads=(80, 128),
        steps=(28, 1),
    ),
    "qwen2_5_vl": Family(
        "Qwen2_5_VL",
        Shape(320, 16, 768, 12, (896, 896)),
        configs.qwen2_5_vl,
        inputs.qwen_picture,
        heads=(80, 128),
        steps=(28, 4),
    ),
    "qwen3_vl": Family(
        "Qwen3VL",
        Shape(216, 12, 768, 12, (768, 768)),
        configs.qwen3_vl,
        inputs.qwen_picture,
        heads=(72, 128),
        steps=(32, 1),
    ),
    "qwen3_vl_moe": Family(
        "Qwen3VLMoe",
        Shape(216, 12, 512, 12, (768, 768)),
        configs.qwen3_vl_moe,
        inputs.qwen_picture,
        heads=(72, 128),
        steps=(32, 1),
    ),
    "internvl": Family(
        "InternVL",
        Shape(192, 12, 512, 8, (448, 1344)),  # 1 x 3 tiles and a thumbnail
        configs.internvl,
        inputs.internvl_picture,
        heads=(64, 128),
        steps=(448, 1),
    ),
    "llava_onevision": Family(
        "LlavaOnevision",
        Shape(288, 12, 512, 8, (216, 384)),  # a thumbnail and one tile, two fifths of it padding
        configs.llava_onevision,
        inputs.llava_picture,
        heads=(72, 128),
        steps=(1, 1),
    ),
    "llava_next": Family(
        "LlavaNext",
        Shape(256, 12, 512, 8, (336, 672)),  # a thumbnail and 1 x 2 tiles, the fewest there are
        configs.llava_next,
        inputs.llava_picture,
        heads=(64, 128),
        steps=(1, 1),
    ),
    "minicpmv4_6": Family(
        "MiniCPMV4_6", _MINICPM, configs.minicpm, inputs.minicpm_picture, heads=(72, 256), steps=(448, 1)
    ),
    "minicpmv4_7": Family(
        "MiniCPMV4_7", _MINICPM, configs.minicpm_4_7, inputs.minicpm_picture, heads=(72, 256), steps=(448, 1)
    ),
}
QWEN2_5_VL_7B = Family(
    "Qwen2_5_VL",
    Shape(1280, 32, 3584, 28, (896, 896)),
    configs.qwen2_5_vl_7b,
    inputs.qwen_picture,
    heads=(80, 128),
    steps=(28, 4),
)
