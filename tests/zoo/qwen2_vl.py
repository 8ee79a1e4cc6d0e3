"""A small Qwen2-VL with its real processor; the model is that of tests/tiny.py.

What there is to know of the unpatched family:
- A video is one run of placeholders, all frames together; nothing in the prompt tells its frames apart.
- transformers 5 needs `mm_token_type_ids` (its processor gives them); 4.57 knows no such argument.
- Everything works that `KINDS` lists: any number of pictures and videos in a row, and other numbers in other
  rows of a batch.
"""

from __future__ import annotations

import functools

import torch
import transformers

from zoo import qwen
from zoo.common import Image, Video

NAME = "qwen2_vl"

A, B, C = Image(140, 168), Image(196, 112, seed=1), Image(137, 143, seed=2)  # 5 x 6, 7 x 4 and 5 x 5 units
V, W = Video(5, 140, 112), Video(4, 112, 140, seed=1)  # 3 frames of 5 x 4 units, 2 of 4 x 5
KINDS = {
    "one picture": [[5, A, 7]],
    "several pictures": [[3, A, 4, B, 2, C, 6]],
    "video": [[4, V, 5]],
    "pictures and video": [[2, C, 3, V, 2, A, 4, W, 3]],
    "text only": [[9]],
    "batch": [[5, A, 7], [3, C, 2, B, 9], [6], [2, V, 3]],
}
BEAMS = KINDS["batch"]
VIT_LAYERS, LLM_LAYERS = (0, 1, 2), (0, 2)
SIZES = {"size": {"shortest_edge": 28 * 28, "longest_edge": 2**20}}


@functools.cache
def processor():
    return transformers.Qwen2VLProcessor(
        image_processor=qwen.image_processor(**SIZES),
        tokenizer=qwen.qwen_tokenizer(),
        video_processor=transformers.Qwen2VLVideoProcessor(**SIZES, **qwen.CAP),
    )


def prompt(*rows, side="left", dtype=torch.float32, seeds=None):
    """Inputs for `model(**inputs)` and `model.generate(**inputs)`: one list of parts for each batch row."""
    return qwen.inputs_of(processor(), rows, side=side, dtype=dtype, seeds=seeds)


def text_tokens(row) -> int:
    """How many tokens of a row are not visual: its words, and two markers around each picture or video."""
    return sum(part if isinstance(part, int) else 2 for part in row)


def config_parts(layers: int) -> dict:
    """What Qwen2-VL and Qwen2.5-VL have in common in their configs."""
    tokens = processor().tokenizer
    text = dict(
        vocab_size=len(tokens), hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
        rope_scaling={"type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 2]},
        pad_token_id=tokens.pad_token_id, eos_token_id=tokens.eos_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    return dict(text_config=text, tie_word_embeddings=False, **qwen.token_ids(tokens))


def build(*, seed=0, attention="sdpa", dtype=torch.float32, layers=4):
    """A random model with 4 encoder blocks."""
    vision = dict(depth=4, embed_dim=32, num_heads=2, mlp_ratio=2, hidden_size=32, patch_size=14)
    config = transformers.Qwen2VLConfig(vision_config=vision, **config_parts(layers))
    torch.manual_seed(seed)
    kind = transformers.Qwen2VLForConditionalGeneration
    return qwen.random_weights(
        kind._from_config(config, attn_implementation=attention, dtype=dtype), seed, dtype
    )
