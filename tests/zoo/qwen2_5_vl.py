"""A small Qwen2.5-VL with its real processor; the model is that of tests/tiny.py.

Its windows are 2 x 2 units, and every picture (5 x 6, 7 x 4, 5 x 5 units, frames of 5 x 4 and 4 x 5) has some
that its edge cuts. Blocks 1 and 3 attend fully.

What the unpatched family can do is what Qwen2-VL can. Its processor adds `second_per_grid_ts`: two seconds
here, for two frames of one second make a patch in time. Unless told, it takes two frames a second, whatever
the metadata of the video say.
"""

from __future__ import annotations

import functools

import torch
import transformers

from zoo import qwen
from zoo.qwen2_vl import BEAMS, KINDS, LLM_LAYERS, SIZES, VIT_LAYERS, config_parts, text_tokens  # noqa: F401

NAME = "qwen2_5_vl"


@functools.cache
def processor():
    return transformers.Qwen2_5_VLProcessor(
        image_processor=qwen.image_processor(**SIZES),
        tokenizer=qwen.qwen_tokenizer(),
        video_processor=transformers.Qwen2VLVideoProcessor(**SIZES, **qwen.CAP),
    )


def prompt(*rows, side="left", dtype=torch.float32, seeds=None):
    """Inputs for `model(**inputs)` and `model.generate(**inputs)`: one list of parts for each batch row."""
    return qwen.inputs_of(processor(), rows, side=side, dtype=dtype, seeds=seeds, fps=1.0)


def build(*, seed=0, attention="sdpa", dtype=torch.float32, layers=4):
    """A random model with 4 encoder blocks of which 1 and 3 attend fully."""
    vision = dict(
        depth=4, hidden_size=32, num_heads=2, intermediate_size=48, out_hidden_size=32,
        fullatt_block_indexes=[1, 3], window_size=56, patch_size=14,
    )  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(vision_config=vision, **config_parts(layers))
    torch.manual_seed(seed)
    kind = transformers.Qwen2_5_VLForConditionalGeneration
    return qwen.random_weights(
        kind._from_config(config, attn_implementation=attention, dtype=dtype), seed, dtype
    )
