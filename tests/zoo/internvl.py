"""InternVL: a small random `InternVLForConditionalGeneration` and prompts from its real processor.

A tile is 112 x 112 pixels, 8 x 8 patches, 4 x 4 units of the pixel shuffle: 16 language model tokens. A
picture is cut into up to 6 tiles by its shape and, if cut at all, followed by a thumbnail tile of the
whole; its tokens are one run of placeholders between `<img>` and `</img>`. A video frame is one tile, and
reaches the model as a run of its own, `Frame1: <img>...</img>`, in the same `pixel_values` as the pictures:
the model cannot tell frames from pictures, and none of its inputs says which is which.

What the unpatched family cannot do:
  * Videos of different lengths in one call of the processor, in one row or several: "stack expects each
    tensor to be equal size, but got [2, 3, 112, 112] at entry 0 and [3, 3, 112, 112] at entry 1" (5.23
    ValueError, 4.57.6 RuntimeError). So all videos of a prompt, over all its rows, have one number of
    frames; their sizes in pixels may differ.
  * On 4.57.6, `generate` with beams or several returned sequences when a row has more than one tile: it
    repeats `pixel_values` tile by tile, not row by row, and the beams read each other's tiles. No error;
    the first logits are off by 0.3 to 0.7 here. 5.23 expands encoded pictures row by row and is right.
  * `vision_feature_layer` other than -1 on 4.57.6: "'InternVLModel' object has no attribute
    'vision_model'". 5.23 reads the recorded hidden states of one layer; a list of layers fails there,
    "tuple indices must be integers or slices, not list".
  * `vision_feature_select_strategy="full"`, or tiles that are not square: "shape '[7, 8, 8, -1]' is invalid
    for input of size 14560". Square tiles of another size do work, on interpolated position embeddings.

Rows of a batch may have different numbers of pictures, none included: the tiles of all rows are stacked and
find their placeholders in order.
"""

from __future__ import annotations

import functools

import torch
import transformers

from zoo.common import V5, Image, Video, scale_weights, tokenizer, words

NAME = "internvl"
TILE, PATCH = 112, 14
TILE_TOKENS = (TILE // PATCH // 2) ** 2
MAX_TILES = 6  # without the thumbnail
MOST_FRAMES = 8  # frames that have a token for their number

PAD, EOS, START = "<|endoftext|>", "<|im_end|>", "<|im_start|>"
CONTEXT, IMG, END_IMG, VIDEO, NEWLINE = "<IMG_CONTEXT>", "<img>", "</img>", "<video>", "\n"
FRAMES = [f"Frame{i + 1}:" for i in range(MOST_FRAMES)]

KINDS = {
    # 2 x 3 tiles and the thumbnail: 112 tokens
    "one picture": [[4, Image(224, 336, 1), 6]],
    # 1 x 2 and thumbnail, one tile, 3 x 1 and thumbnail: 48, 16 and 64 tokens, the last two side by side
    "several pictures": [[3, Image(112, 224, 2), 5, Image(100, 90, 3), Image(340, 120, 4), 7]],
    "video": [[5, Video(4, 90, 120, 5), 6]],
    "pictures and video": [[2, Image(112, 224, 6), 3, Video(3, 140, 100, 7), 4, Image(90, 90, 8), 5]],
    "text only": [[12]],
    "batch": [
        [3, Image(112, 224, 9), 5],
        [9],
        [2, Image(80, 80, 10), 1, Image(160, 160, 11), 8],
        [4, Video(3, 90, 120, 12), 6],
    ],
}
BEAMS, LIMITS = KINDS["batch"], {}
if not V5:
    BEAMS = [[3, Image(100, 90, 9), 5], [9], [2, Image(80, 80, 10), 8]]
    LIMITS = {"beams": "decode several tiles in a row with beams: `generate` repeats them one by one"}
VIT_LAYERS, LLM_LAYERS = (0, 1, 2), (0, 2)


def build(
    *,
    seed: int = 0,
    attention: str = "sdpa",
    dtype=torch.float32,
    layers: int = 4,
    qk_norm: bool = False,
    language: str = "qwen2",
):
    """A random model of 4 encoder blocks and `layers` decoder layers.

    Args:
        qk_norm: as the 26B's large encoder, norms on queries and keys, RMS norms and no biases in q, k and v,
            instead of as the small one.
        language: "qwen2" or "llama".
    """
    ids = processor().tokenizer.convert_tokens_to_ids
    vision = dict(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=48,
        image_size=[TILE, TILE], patch_size=[PATCH, PATCH], attention_bias=not qk_norm, use_qk_norm=qk_norm,
        norm_type="rms_norm" if qk_norm else "layer_norm",
    )  # fmt: skip
    text = dict(
        model_type=language, vocab_size=len(processor().tokenizer), hidden_size=32, intermediate_size=48,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
        bos_token_id=ids(START), eos_token_id=ids(EOS), pad_token_id=ids(PAD), tie_word_embeddings=False,
    )  # fmt: skip
    config = transformers.InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=ids(CONTEXT),
        image_seq_length=TILE_TOKENS,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    kind = transformers.InternVLForConditionalGeneration
    model = scale_weights(kind._from_config(config, attn_implementation=attention).eval(), seed)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if name.endswith(("cls_token", "position_embeddings")):
            weight.data = 0.5 * noise  # zero by default: tiles would have no layout
        elif "lambda_" in name:  # 0.1 by default: attention and feed-forward would hardly show
            weight.data = 0.8 + 0.2 * noise
        elif weight.ndim == 1 and name.endswith("weight"):  # norms
            weight.data = 1 + 0.2 * noise
    model.generation_config.pad_token_id = ids(PAD)
    model.generation_config.eos_token_id = None  # a random model should not stop early
    return model.to(dtype)


@functools.cache
def processor():
    """`InternVLProcessor` for tiles of 112 pixels; pictures are cut into at most 6 of them."""
    special = [PAD, EOS, START, CONTEXT, IMG, END_IMG, VIDEO, NEWLINE, *FRAMES]
    named = dict(
        start_image_token=IMG, end_image_token=END_IMG, context_image_token=CONTEXT, video_token=VIDEO
    )
    # Checkpoints ask for the one that computes in torch, which 4.57 calls fast.
    image_processor = transformers.GotOcr2ImageProcessor if V5 else transformers.GotOcr2ImageProcessorFast
    size = {"height": TILE, "width": TILE}
    return transformers.InternVLProcessor(
        image_processor=image_processor(size=size, crop_to_patches=True, max_patches=MAX_TILES),
        tokenizer=tokenizer(special, pad=PAD, eos=EOS, **named),
        video_processor=transformers.InternVLVideoProcessor(size=size),
        image_seq_length=TILE_TOKENS,
    )


def prompt(*rows, side: str = "left", dtype=torch.float32, seeds=None) -> dict:
    """Inputs for the model: one row of parts, or several as a batch padded on `side`."""
    texts, images, videos = [], [], []
    for row, seed in zip(rows, seeds or range(len(rows)), strict=True):
        generator = torch.Generator().manual_seed(seed)
        pieces = [START]
        for part in row:
            if isinstance(part, Image):
                images.append(part.pil())
                pieces.append(CONTEXT)
            elif isinstance(part, Video):
                videos.append(part.array())
                pieces.append(VIDEO)
            else:
                pieces.append(words(part, generator))
        texts.append(" ".join([*pieces, EOS, START]))
    inputs = processor()(
        text=texts, images=images or None, videos=videos or None, padding=True, padding_side=side,
        return_tensors="pt",
    )  # fmt: skip
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}


def text_tokens(row) -> int:
    """Tokens of a row that are not visual: words, the three of the template, markers around pictures."""
    count = 3
    for part in row:
        if isinstance(part, Image):
            count += 2  # <img> and </img>
        elif isinstance(part, Video):
            count += 3 * part.frames + part.frames - 1  # its number too, and newlines between frames
        else:
            count += part
    return count
