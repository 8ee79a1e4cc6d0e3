"""A small LLaVA-OneVision: SigLIP without CLS, tiles in any resolution, videos, a Qwen2 language model.

As in the real one, the picture size (60) is not a multiple of the patch size (8) and the grid side (7) is
odd: the pooling of video frames rounds up, to 4. `anyres_max_2` shrinks a picture of 2 x 2 tiles and leaves
one of 1 x 2.

What the unpatched family cannot do:
  * videos with different numbers of frames in one call: the processor stacks them (5.23: ValueError "Unable
    to convert output 'pixel_values_videos' (type: list) to tensor"; 4.57.6: RuntimeError "stack expects each
    tensor to be equal size"). Their heights and widths may differ: every frame is resized to one tile.
  * tiles for a picture that shares its row with another: such a picture is one tile and one newline.
  * on 4.57.6, beams (or several returned sequences) over a call with several pictures or several videos: no
    error, but `generate` repeats the pictures one by one, not row by row, so that beams see the wrong ones.
    5.23 encodes before it repeats, and is right.
Rows may otherwise mix freely: no picture, one, several, videos.
"""

from __future__ import annotations

import functools

import torch
import transformers
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from zoo.common import V5, WORDS, Image, Video, tokenizer
from zoo.llava import assemble, finish

NAME = "llava_onevision"
VIT_LAYERS = (0, 1, 2)
LLM_LAYERS = (0, 2)

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]
TILE, PATCH = 60, 8
SIDE = TILE // PATCH
PINPOINTS = [[60, 60], [60, 120], [120, 60], [120, 120], [60, 180], [180, 60]]

KINDS = {
    "one picture": [[3, Image(120, 100, 1), 6]],  # 2 x 2 tiles, two columns of padding, shrunk
    "one wide picture": [[4, Image(50, 120, 2), 5]],  # 1 x 2 tiles, two rows of padding, not shrunk
    "one strip": [[2, Image(180, 60, 3), 5]],  # 3 x 1 tiles, no padding, 21 x 7 shrunk to 17 x 5
    "several pictures": [[2, Image(60, 90, 4), 3, Image(100, 50, 5), 4]],
    "video": [[3, Video(4, 50, 80, 6), 2, Video(4, 70, 40, 7), 5]],
    "picture and video": [[2, Image(50, 120, 8), 3, Video(3, 60, 60, 9), 4]],
    "pictures and video": [[2, Image(60, 90, 10), 3, Video(3, 60, 60, 11), 1, Image(70, 70, 12), 4]],
    "text only": [[12]],
    "batch": [
        [5, Image(120, 100, 13), 4],
        [2, Image(40, 90, 14), 1, Image(60, 60, 15), 3],
        [9],
        [4, Video(3, 50, 80, 16), 2, Image(50, 120, 17), 6],
    ],
}
BEAMS, LIMITS = KINDS["batch"], {}
if not V5:
    BEAMS = [[5, Image(120, 100, 13), 4], [9], [4, Video(3, 50, 80, 16), 2, Image(50, 120, 17), 6]]
    LIMITS = {"beams": "decode several pictures in a row with beams: `generate` repeats them one by one"}


def build(*, seed=0, attention="sdpa", dtype=torch.float32, layers=4):
    """The model, in eval mode."""
    config = LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": TILE,
            "patch_size": PATCH,
            "vision_use_head": False,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(SPECIAL) + WORDS + 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
        },
        image_token_index=SPECIAL.index("<image>"),
        video_token_index=SPECIAL.index("<video>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2",
        image_grid_pinpoints=PINPOINTS,
    )
    model = LlavaOnevisionForConditionalGeneration._from_config(config, attn_implementation=attention)
    return finish(model, seed, pad=0).to(dtype)


@functools.cache
def processor():
    """The family's processor; every picture part is 60 x 60."""
    images = "LlavaOnevisionImageProcessor" if V5 else "LlavaOnevisionImageProcessorFast"
    size = {"height": TILE, "width": TILE}
    return transformers.LlavaOnevisionProcessor(
        image_processor=getattr(transformers, images)(size=size, image_grid_pinpoints=PINPOINTS),
        tokenizer=tokenizer(
            SPECIAL, pad="<|endoftext|>", eos="<|im_end|>", image_token="<image>", video_token="<video>"
        ),
        video_processor=transformers.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=SIDE**2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2",
    )


def prompt(*rows, side="left", dtype=torch.float32, seeds=None):
    """Inputs for `forward` and `generate`."""
    markers = "<|im_start|>", "<|im_end|> <|im_start|>"
    return assemble(processor(), rows, *markers, nested=True, side=side, dtype=dtype, seeds=seeds)


def text_tokens(row) -> int:
    """Words, three markers, and newlines: one after every line of tiles, else one a picture or video."""
    pictures = [part for part in row if isinstance(part, Image)]
    count = 3 + sum(part for part in row if isinstance(part, int))
    count += sum(isinstance(part, Video) for part in row)
    if len(pictures) != 1:
        return count + len(pictures)
    height, width = pictures[0].height, pictures[0].width
    best = transformers.image_processing_utils.select_best_resolution((height, width), PINPOINTS)
    tiles = [length // TILE for length in best]
    return count + processor()._get_unpadded_features(height, width, SIDE, SIDE, *tiles)[1]
