"""InternVL 2.5, 3 and 3.5 as transformers' `InternVLForConditionalGeneration`. Run on 4.57.6 and 5.23.

Encoder: square tiles as rows of one batch, a CLS token ahead of each, which takes part in attention
but is neither ranked nor dropped. A merge unit is the 2 x 2 patches that the pixel shuffle joins; the
shuffle runs on the full grid, the projector after it on the survivors.

A picture is one run of placeholders, all its tiles and its thumbnail together. The frames of a video
come as runs of their own with text between, which nothing in the call tells from pictures: the
language model ranks each frame by itself.

Where it merges by attention: the paper's 5, 9, 13 of 32 and 2, 8, 14 of 28, at the same relative depth.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from illava.families import visual
from illava.families.about import About
from illava.families.cutting import Cutting
from illava.families.layout import Layout, Survivors, spread_tiles
from illava.families.parts import core_of, part, used_blocks
from illava.families.seams import Projector, Seams
from illava.families.visual import VisualInput
from illava.plan import LLM_PAPER, VIT_PAPER
from illava.schedule import scale_layers

ABOUT = {"internvl": About("InternVL 2.5 to 3.5", "2 x 2 patches", "4, 7, 10 of 24", "2, 9, 16 of 32")}
CUTTING = {"internvl": Cutting(whole="last")}


def find_seams(model: nn.Module) -> Seams:
    """Locate the parts, in `...ForConditionalGeneration` or the bare `...Model`.

    Raises:
        SeamError: a part is missing in this version of transformers.
    """
    core = core_of(model)
    tower = part(core, "vision_tower", "as the vision encoder")
    config: Any = core.config
    every = part(tower, "encoder.layer", "to merge between attention and feed-forward network")
    blocks = tuple(every[: used_blocks(len(every), config.vision_feature_layer)])
    for name in ("attention", "layernorm_after", "mlp", "lambda_2"):
        part(blocks[0], name, "to merge between attention and feed-forward network")
    layers = tuple(part(core, "language_model.layers", "to merge after decoder layers"))
    projector = part(core, "multi_modal_projector", "to put survivors back on the full grid")
    return Seams(
        model=core,
        tower=tower,
        blocks=blocks,
        block_attention="attention",
        block_norm="layernorm_after",
        block_ffn="mlp",
        ffn_tail=("dropout", "lambda_2"),
        unread_blocks=len(every) - len(blocks),
        projectors=(Projector(projector, len(blocks) - 1, squeeze=_squeeze, spread=spread_tiles),),
        language_model=part(core, "language_model", "as the decoder"),
        layers=layers,
        layer_attention="self_attn",
        merge_size=round(1 / config.downsample_ratio),
        full_attention_blocks=frozenset(range(len(blocks))),
        vit_ranked=scale_layers(*VIT_PAPER, len(blocks)),
        llm_ranked=scale_layers(*LLM_PAPER, len(layers)),
        scoring_layers=frozenset(range(len(layers))),
    )


def layout(seams: Seams, call: Mapping[str, Any]) -> Layout:
    """Of one encoder call: a tile a row, CLS and then its patches line by line."""
    tiles, _, height, width = call["pixel_values"].shape
    patch = seams.tower.config.patch_size
    patch_height, patch_width = (patch, patch) if isinstance(patch, int) else patch
    height, width = height // patch_height, width // patch_width
    return Layout(
        ((1, height, width),) * tiles, seams.merge_size, raster=True, prefix=1, row_tokens=1 + height * width
    )


def visual_input(seams: Seams, call: Mapping[str, Any]) -> VisualInput | None:
    """Which tokens of a `...Model` call came from pictures; `None` if it brings no picture."""
    encoded = (call.get("mm_encoder_outputs") or {}).get("image")
    if encoded is not None:
        per_tile = encoded.pooler_output.shape[1]
    elif call.get("pixel_values") is not None:
        per_tile = layout(seams, call).frame_units[0]
    else:
        return None
    runs = visual.runs(visual.placeholders(seams.model, call, "image"))
    pictures = [(tokens, (per_tile,) * (tokens // per_tile)) for tokens in runs]
    return visual.visual_input(seams.model, call, {"image": pictures})


def _squeeze(call: dict[str, Any], alive: Survivors) -> dict[str, Any]:
    return call | {"image_features": alive.squeeze(call["image_features"])}
