"""A small Qwen3-VL with its real processor.

What there is to know of the unpatched family:
- Taps: the encoder's deepstack features after blocks 0, 1 and 3 are added after decoder layers 0, 1 and 2.
  With merges in blocks 0, 1 and 2 every tap sees another number of survivors.
- A video's frames stand apart in the prompt: `<0.5 seconds>`, a start marker, the frame, an end marker. The
  template's own pair of markers around the video stays in transformers 5 and is swallowed in 4.57.
- transformers 5 needs `mm_token_type_ids` (its processor gives them); 4.57 knows no such argument.
- On 4.57, `generate` with beams or several returned sequences takes every frame of a video for a video:
  "split_with_sizes expects split_sizes to sum exactly to 1 (...), but got split_sizes=[0, 0, 0, 3]".
- Everything else works that `KINDS` lists: any number of pictures and videos in a row, and other numbers in
  other rows of a batch.
"""

from __future__ import annotations

import functools

import torch
import transformers

from zoo import qwen
from zoo.common import V5, Image, Video

NAME = "qwen3_vl"

# Frames of one second, two of which make a patch in time; an odd last one is doubled, hence the 4.0.
TIMES = ("seconds>", "<0.5", "<2.5", "<4.0", "<4.5")

A, B, C = Image(160, 192), Image(192, 128, seed=1), Image(130, 126, seed=2)  # 5 x 6, 6 x 4 and 4 x 4 units
V, W = Video(5, 128, 160), Video(4, 128, 128, seed=1)  # 3 frames of 4 x 5 units, 2 of 4 x 4
KINDS = {
    "one picture": [[5, A, 7]],
    "several pictures": [[3, A, 4, B, 2, C, 6]],
    "video": [[4, V, 5]],
    "pictures and video": [[2, C, 3, V, 2, A, 4, W, 3]],
    "text only": [[9]],
    "batch": [[5, A, 7], [3, C, 2, B, 9], [6], [2, V, 3]],
}
BEAMS, LIMITS = KINDS["batch"], {}
if not V5:
    BEAMS, LIMITS = BEAMS[:3], {"beams": "decode videos with beams: `generate` counts each frame as one"}
VIT_LAYERS, LLM_LAYERS = (0, 1, 2), (0, 2)


@functools.cache
def processor():
    sizes = dict(size={"shortest_edge": 32 * 32, "longest_edge": 2**20}, patch_size=16)
    return transformers.Qwen3VLProcessor(
        image_processor=qwen.image_processor(image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5], **sizes),
        tokenizer=qwen.qwen_tokenizer(TIMES),
        video_processor=transformers.Qwen3VLVideoProcessor(**sizes, **qwen.CAP),
    )


def prompt(*rows, side="left", dtype=torch.float32, seeds=None):
    """Inputs for `model(**inputs)` and `model.generate(**inputs)`: one list of parts for each batch row."""
    return qwen.inputs_of(processor(), rows, side=side, dtype=dtype, seeds=seeds)


def text_tokens(row) -> int:
    """How many tokens of a row are not visual: its words, markers and timestamps."""
    count = 0
    for part in row:
        if isinstance(part, int):
            count += part
        elif isinstance(part, Image):
            count += 2
        else:
            frames = (part.frames + 1) // 2
            count += 4 * frames + (2 if V5 else 0)
    return count


def config_parts(layers: int) -> dict:
    """What Qwen3-VL and its mixture of experts have in common in their configs."""
    tokens = processor().tokenizer
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    theta = {"rope_theta": 5e6}
    text = dict(
        vocab_size=len(tokens), hidden_size=32, intermediate_size=48, num_hidden_layers=layers, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
        pad_token_id=tokens.pad_token_id, eos_token_id=tokens.eos_token_id, tie_word_embeddings=False,
        **({"rope_parameters": rope | theta} if V5 else {"rope_scaling": rope} | theta),
    )  # fmt: skip
    vision = dict(
        depth=4, hidden_size=32, num_heads=2, intermediate_size=48, out_hidden_size=32, patch_size=16,
        num_position_embeddings=49, deepstack_visual_indexes=[0, 1, 3],
    )  # fmt: skip
    ids = qwen.token_ids(tokens)
    return dict(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)


def build(*, seed=0, attention="sdpa", dtype=torch.float32, layers=4):
    """A random model with 4 encoder blocks."""
    config = transformers.Qwen3VLConfig(**config_parts(layers))
    torch.manual_seed(seed)
    kind = transformers.Qwen3VLForConditionalGeneration
    return qwen.random_weights(
        kind._from_config(config, attn_implementation=attention, dtype=dtype), seed, dtype
    )
