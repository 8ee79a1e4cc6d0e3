"""A small LLaVA-NeXT: CLIP with CLS, tiles in any resolution, a Mistral language model.

The encoder has five blocks, of which the last is computed and not used: features are read off its input
(`vision_feature_layer=-2`), without CLS.

What the unpatched family cannot do:
  * videos: there is no processor and no token for them.
  * on 4.57.6, beams (or several returned sequences) over a call with several pictures: no error, but
    `generate` repeats the pictures one by one, not row by row, so that beams see the wrong ones. 5.23 encodes
    before it repeats, and is right.
Rows may mix freely: no picture, one, several.
"""

from __future__ import annotations

import functools

import torch
import transformers
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

from zoo.common import V5, WORDS, Image, tokenizer
from zoo.llava import assemble, finish

NAME = "llava_next"
VIT_LAYERS = (0, 1, 2)
LLM_LAYERS = (0, 2)

SPECIAL = ["<pad>", "<s>", "</s>", "[INST]", "[/INST]", "<image>"]
TILE, PATCH = 48, 8
SIDE = TILE // PATCH
PINPOINTS = [[48, 96], [96, 48], [96, 96], [144, 48], [48, 144]]

KINDS = {
    "one picture": [[3, Image(96, 70, 1), 6]],  # 2 x 2 tiles, four columns of padding
    "several pictures": [[2, Image(30, 90, 2), 3, Image(110, 40, 3), 4]],  # 1 x 2 and 3 x 1 tiles
    "text only": [[12]],
    "batch": [
        [5, Image(96, 96, 4), 4],
        [2, Image(90, 30, 5), 1, Image(30, 90, 6), 3],
        [9],
        [4, Image(40, 130, 7), 6],
    ],
}
CANNOT = {"video": "see videos: there is no token for them"}
BEAMS, LIMITS = KINDS["batch"], {}
if not V5:
    BEAMS = [[5, Image(96, 96, 4), 4], [9], [4, Image(40, 130, 7), 6]]
    LIMITS = {"beams": "decode several pictures in a row with beams: `generate` repeats them one by one"}


def build(*, seed=0, attention="sdpa", dtype=torch.float32, layers=4):
    """The model, in eval mode."""
    config = LlavaNextConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "projection_dim": 32,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "image_size": TILE,
            "patch_size": PATCH,
        },
        text_config={
            "model_type": "mistral",
            "vocab_size": len(SPECIAL) + WORDS + 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 2048,
            "sliding_window": None,
        },
        image_token_index=SPECIAL.index("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=SIDE**2,
    )
    model = LlavaNextForConditionalGeneration._from_config(config, attn_implementation=attention)
    return finish(model, seed, pad=0).to(dtype)


@functools.cache
def processor():
    """The family's processor; every picture part is 48 x 48."""
    images = "LlavaNextImageProcessor" if V5 else "LlavaNextImageProcessorFast"
    return transformers.LlavaNextProcessor(
        image_processor=getattr(transformers, images)(
            size={"shortest_edge": TILE},
            crop_size={"height": TILE, "width": TILE},
            image_grid_pinpoints=PINPOINTS,
        ),
        tokenizer=tokenizer(SPECIAL, pad="<pad>", eos="</s>", image_token="<image>"),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLS
    )


def prompt(*rows, side="left", dtype=torch.float32, seeds=None):
    """Inputs for `forward` and `generate`."""
    markers = "<s> [INST]", "[/INST]"
    return assemble(processor(), rows, *markers, nested=False, side=side, dtype=dtype, seeds=seeds)


def text_tokens(row) -> int:
    """Words, three markers, and one newline after every line of every picture's tiles."""
    count = 3 + sum(part for part in row if isinstance(part, int))
    for part in row:
        if isinstance(part, Image):
            size = part.height, part.width
            best = transformers.image_processing_utils.select_best_resolution(size, PINPOINTS)
            tiles = [length // TILE for length in best]
            count += processor()._get_unpadded_features(*size, SIDE, SIDE, *tiles)[1]
    return count
