"""A small MiniCPM-V 4.7 with its real processor: MiniCPM-V 4.6 with positions on a canvas.

Only in transformers 5.x. The prompts are those of 4.6, whose docstring says how they are made, but:
  * the processor adds `mm_token_type_ids`, which the model needs with any picture (ValueError "Multimodal
    data was passed (via `target_sizes` or `target_sizes_videos`) but `mm_token_type_ids` is missing");
  * thumbnail and slices of a picture share one canvas: a position is three numbers, positions repeat and run
    backwards within a row, and the last one is not the number of tokens before it;
  * videos carry no `<image_id>`.

What the unpatched family cannot do, beyond what 4.6 cannot:
  * start from `inputs_embeds` alone: without `input_ids` its positions fall back to one dimension;
  * text alone after a picture, by `forward` and a cache: `model.model.rope_deltas` outlives the call that set
    it, and decoding on from a text-only prompt adds the stale number (`generate` is not affected).
"""

import functools

import torch
import transformers
from transformers import MiniCPMV4_7Config, MiniCPMV4_7ForConditionalGeneration

from zoo.minicpmv4_6 import (
    BEAMS,  # noqa: F401
    FOURFOLD,  # noqa: F401
    KINDS,  # noqa: F401
    LIMITS,  # noqa: F401
    LLM_LAYERS,  # noqa: F401
    VIT_LAYERS,  # noqa: F401
    config_of,
    processor_of,
    prompt_of,
    random_model,
    text_tokens_of,
)

NAME = "minicpmv4_7"


def build(*, seed=0, attention="sdpa", dtype=torch.float32, layers=5, **changes):
    """A random model. `changes` go to its config, as `downsample_mode="4x"`."""
    ids = processor().tokenizer.convert_tokens_to_ids
    markers = {
        "image_start_id": ids("<image>"),
        "image_end_id": ids("</image>"),
        "slice_start_id": ids("<slice>"),
        "slice_end_id": ids("</slice>"),
        "newline_id": ids("\n"),
    }
    config = MiniCPMV4_7Config(**config_of(layers), **markers, **changes)
    return random_model(MiniCPMV4_7ForConditionalGeneration, config, seed, attention, dtype)


@functools.cache
def processor():
    """The family's own processor: pictures and frames are sliced beyond 80 x 80 pixels."""
    return processor_of(transformers.MiniCPMV4_7Processor)


def prompt(*rows, side="left", dtype=torch.float32, seeds=None):
    """Inputs for `model(**inputs)` and `model.generate(**inputs)`."""
    return prompt_of(processor(), rows, side, dtype, seeds)


def text_tokens(row) -> int:
    """Tokens of a row that are not visual: words, and the markers and newlines around pictures and slices."""
    return text_tokens_of(processor(), prompt(row))
