"""A small MiniCPM-V 4.6 with its real processor; its helpers also serve MiniCPM-V 4.7.

The family exists only in transformers 5.x: there is none in 4.57.

Every picture becomes a thumbnail and, where it is large, slices; every video frame likewise. Each of them is
one row of `target_sizes` (`target_sizes_videos`): one encoder segment and one segment of the language model.
In the default "16x" mode a token of the language model shows 4x4 patches of 4x4 pixels (a square of 16), in
"4x" mode 2x2 patches. A row that holds the part `FOURFOLD` is prompted in "4x" mode, and the whole batch with
it: the mode is then an entry of the inputs, `downsample_mode="4x"`, a string.

The decoder's layers are linear, full, linear, linear, full, linear, ...: layer i attends fully if i % 3 == 1.

What the unpatched family cannot do, or does not do as one might think:
  * a mode for each picture: there is one for the call;
  * pictures by rows: `pixel_values` packs the pictures of all rows into one sequence with a first dimension
    of 1; only the counts of placeholders tell which row a picture belongs to. Rows may differ in them;
  * positions by the attention mask in `forward`: 4.6 makes them from the padded length alone, `generate` from
    the first token that is not padding. Rotary embeddings are relative: it differs by rounding;
  * right padding in `generate`: it runs, and goes on from the padding (HF warns).
"""

import functools

import torch
import transformers
from transformers import MiniCPMV4_6Config, MiniCPMV4_6ForConditionalGeneration

from zoo.common import Image, Video, scale_weights, tokenizer, words

NAME = "minicpmv4_6"
LIMITS = {"turns": "pad between turns: the state of its linear attention runs on over padding"}
FOURFOLD = "4x"
PATCH = 4

IMAGE, VIDEO, PAD, EOS = "<|image_pad|>", "<|video_pad|>", "<|endoftext|>", "<|im_end|>"
NAMED = {
    "image_token": IMAGE,
    "video_token": VIDEO,
    "image_start_token": "<image>",
    "image_end_token": "</image>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
}
NEWLINE = "\n"  # between two rows of slices

# A square of 80 pixels is one segment of 25 units; larger pictures are sliced, into slices about that large.
PLAIN, WIDE, TALL, SLICED = (60, 90), (56, 100), (100, 64), (170, 84)
KINDS = {
    "one picture": [[3, Image(*SLICED, seed=1), 5]],  # a thumbnail and two slices, a newline between them
    "several pictures": [[2, Image(*PLAIN, seed=2), 3, Image(*TALL, seed=3), Image(80, 150, seed=4), 4]],
    "video": [[3, Video(3, 60, 80, seed=5), 2, Video(1, 84, 170, seed=17), 5]],  # frames may be sliced too
    "pictures and video": [
        [2, Image(*WIDE, seed=6), 3, Video(3, 60, 80, seed=7), 2, Image(*SLICED, seed=8), 4]
    ],
    "text only": [[12]],
    "batch": [
        [3, Image(*PLAIN, seed=9), 5],
        [9],
        [2, Image(*SLICED, seed=10), 3, Image(*TALL, seed=11), 2],
        [4, Video(2, 80, 60, seed=12), 1, Image(*WIDE, seed=13), 6],
    ],
    "one picture, 4x": [[FOURFOLD, 3, Image(*PLAIN, seed=14), 5]],
    "several pictures, 4x": [[FOURFOLD, 2, Image(50, 60, seed=15), 3, Video(1, 60, 80, seed=16), 4]],
}
BEAMS = KINDS["batch"]
VIT_LAYERS = (0, 2, 3)  # the merger inside the tower follows block 1
LLM_LAYERS = (1, 3)  # 1 attends fully; 3 is linear and reads layer 1's queries and keys of what is left


# ---------------------------------------------------------------- model


def build(*, seed=0, attention="sdpa", dtype=torch.float32, layers=5, **changes):
    """A random model. `changes` go to its config, as `downsample_mode="4x"`."""
    config = MiniCPMV4_6Config(**config_of(layers), **changes)
    return random_model(MiniCPMV4_6ForConditionalGeneration, config, seed, attention, dtype)


def config_of(layers):
    """The options that the configs of 4.6 and 4.7 share."""
    ids = processor().tokenizer.convert_tokens_to_ids
    return {
        "insert_layer_id": 1,
        "image_size": 64,
        "image_token_id": ids(IMAGE),
        "video_token_id": ids(VIDEO),
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": 64,  # 16 x 16 learned positions
            "patch_size": PATCH,
        },
        "text_config": {
            "model_type": "qwen3_5_text",
            "vocab_size": len(processor().tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "layer_types": [
                "full_attention" if layer % 3 == 1 else "linear_attention" for layer in range(layers)
            ],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            # a query of a linear layer may read next to nothing: the norm after it must not magnify rounding
            "rms_norm_eps": 1e-4,
            "max_position_embeddings": 1024,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "mrope_section": [3, 3, 2],
                "mrope_interleaved": True,
            },
        },
    }


def random_model(model_class, config, seed, attention, dtype):
    """A model with seeded random weights that never stops early."""
    model = scale_weights(model_class._from_config(config, attn_implementation=attention), seed)
    generator = torch.Generator().manual_seed(seed + 1)

    def near(weight, centre, spread):
        weight.data = centre + spread * torch.randn(weight.shape, generator=generator)

    for name, weight in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            near(weight, 0.5, 0.1)  # queries and keys are 1.5 long on each axis: attention far from uniform
        elif name.endswith("A_log"):
            near(weight, -2.0, 0.7)  # the linear layers forget slowly: what was dropped is missed
        elif name.endswith("dt_bias"):
            near(weight, 0.0, 0.5)
        elif name.endswith("position_embedding.weight"):
            near(weight, 0.0, 0.3)
        elif name.endswith("embed_tokens.weight"):
            near(weight, 0.0, 0.4)
        elif name.endswith("mlp.0.linear_2.weight"):
            weight.data *= 2  # the last projector: features as large as the words
        elif name.endswith("weight") and weight.ndim == 1:
            # the text model's norms multiply by 1 + weight, but for the gated one
            zero = "language_model" in name and "linear_attn" not in name
            near(weight, 0.0 if zero else 1.0, 0.1)
    for weight in model.parameters():  # not the buffers: HF keeps rotary frequencies in fp32
        weight.data = weight.data.to(dtype)
    model.generation_config.pad_token_id = processor().tokenizer.pad_token_id
    model.generation_config.eos_token_id = None
    return model.eval()


# ---------------------------------------------------------------- prompts


@functools.cache
def processor():
    """The family's own processor: pictures and frames are sliced beyond 80 x 80 pixels."""
    return processor_of(transformers.MiniCPMV4_6Processor)


def processor_of(processor_class):
    """MiniCPM-V 4.7 shares the processors of pictures and of videos."""
    sizes = {"scale_resolution": 80, "patch_size": PATCH}
    return processor_class(
        image_processor=transformers.MiniCPMV4_6ImageProcessor(**sizes),
        video_processor=transformers.MiniCPMV4_6VideoProcessor(**sizes),
        tokenizer=tokenizer([*NAMED.values(), NEWLINE, PAD, EOS], pad=PAD, eos=EOS, **NAMED),
    )


def prompt(*rows, side="left", dtype=torch.float32, seeds=None):
    """Inputs for `model(**inputs)` and `model.generate(**inputs)`."""
    return prompt_of(processor(), rows, side, dtype, seeds)


def prompt_of(processor, rows, side, dtype, seeds):
    """The text of every row with a placeholder for each picture, and all pictures in order."""
    texts, images, videos = [], [], []
    fourfold = any(part == FOURFOLD for row in rows for part in row)
    for row, seed in zip(rows, seeds or range(len(rows)), strict=True):
        generator = torch.Generator().manual_seed(seed)
        pieces = []
        for part in row:
            if isinstance(part, Image):
                images.append(part.pil())
                pieces.append(IMAGE)
            elif isinstance(part, Video):
                videos.append(part.array())
                pieces.append(VIDEO)
            elif part != FOURFOLD:
                pieces.append(words(part, generator))
        texts.append(" ".join(pieces))
    inputs = processor(
        text=texts,
        images=images or None,
        videos=videos or None,
        padding=True,
        padding_side=side,
        do_sample_frames=False,
        return_tensors="pt",
        **({"downsample_mode": "4x"} if fourfold else {}),
    )
    inputs = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor)
    }
    if fourfold:
        inputs["downsample_mode"] = "4x"
    return inputs


def text_tokens(row) -> int:
    """Tokens of a row that are not visual: words, and the markers and newlines around pictures and slices."""
    return text_tokens_of(processor(), prompt(row))


def text_tokens_of(processor, inputs):
    visual = torch.tensor([processor.image_token_id, processor.video_token_id])
    return int((~torch.isin(inputs["input_ids"], visual)).sum())
