"""LLaVA-OneVision and LLaVA-NeXT (7B, 13B, 34B). Run on transformers 4.57.6 and 5.23.

Encoder: square tiles as rows of one batch (SigLIP; CLIP with a CLS token, which takes part in
attention but is neither ranked nor dropped). A merge unit is one patch. The projector runs on the
survivors; the model's own packing then crops padding, shrinks very large pictures, pools video frames
2 x 2 and adds a newline feature after each row of patches. A packed token that mixes live and dead
patches is the live ones' weighted mean, and dead when all are; so encoder and language model count
different things, and the report shows both. Newlines always stay and belong to no picture.

The features read are the output of `vision_feature_layer`: blocks beyond it cannot merge.

Where it merges by attention: the paper's 5, 9, 13 of 32 and 2, 8, 14 of 28, at the same relative depth.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

import torch
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

ABOUT = {
    "llava_onevision": About("LLaVA-OneVision", "a patch", "4, 7, 11 of 26", "2, 8, 14 of 28"),
    "llava_next": About(
        "LLaVA-NeXT 7B, 13B, 34B", "a patch", "4, 6, 9 of the 23 that are read", "2, 9, 16 of 32"
    ),
}
CUTTING = {name: Cutting(whole="first", padded=True) for name in ABOUT}


def find_seams(model: nn.Module) -> Seams:
    """Locate the parts, in `...ForConditionalGeneration` or the bare `...Model`.

    Raises:
        SeamError: a part is missing in this version of transformers.
    """
    core = core_of(model)
    config: Any = core.config
    tower = part(core, "vision_tower", "as the vision encoder")
    why = "to merge between attention and feed-forward network"
    every = part(tower, "encoder.layers", why, "vision_model.encoder.layers")
    blocks = tuple(every[: used_blocks(len(every), config.vision_feature_layer)])
    for name in ("self_attn", "layer_norm2", "mlp"):
        part(blocks[0], name, why)
    layers = tuple(part(core, "language_model.layers", "to merge after decoder layers"))
    projector = part(core, "multi_modal_projector", "to put survivors back on the full grid")
    packing = tuple(n for n in ("pack_image_features", "apply_pooling") if hasattr(core, n))
    part(core, "image_newline", "to tell it from features of pictures")
    return Seams(
        model=core,
        tower=tower,
        blocks=blocks,
        block_attention="self_attn",
        block_norm="layer_norm2",
        block_ffn="mlp",
        unread_blocks=len(every) - len(blocks),
        projectors=(Projector(projector, len(blocks) - 1, squeeze=_squeeze, spread=spread_tiles),),
        language_model=part(core, "language_model", "as the decoder"),
        layers=layers,
        layer_attention="self_attn",
        merge_size=1,
        full_attention_blocks=frozenset(range(len(blocks))),
        vit_ranked=scale_layers(*VIT_PAPER, len(blocks)),
        llm_ranked=scale_layers(*LLM_PAPER, len(layers)),
        scoring_layers=frozenset(range(len(layers))),
        packing=packing,
        newline="image_newline",
    )


def layout(seams: Seams, call: Mapping[str, Any]) -> Layout:
    """Of one encoder call: a tile or frame a row, its patches line by line, after CLS if there is one."""
    tiles, _, height, width = call["pixel_values"].shape
    patch = seams.tower.config.patch_size
    height, width = height // patch, width // patch
    embeddings = part(seams.tower, "embeddings", "to know whether there is CLS", "vision_model.embeddings")
    prefix = int(hasattr(embeddings, "class_embedding"))
    return Layout(
        ((1, height, width),) * tiles, 1, raster=True, prefix=prefix, row_tokens=prefix + height * width
    )


def visual_input(seams: Seams, call: Mapping[str, Any]) -> VisualInput | None:
    """Which tokens of a `...Model` call came from pictures; `None` if it brings no picture."""
    encoded = call.get("mm_encoder_outputs") or {}
    pictures: dict[str, list[tuple[int, tuple[int, ...] | None]]] = {}
    if encoded.get("image") is not None:
        counts = visual.feature_lengths(encoded["image"].pooler_output)
        pictures["image"] = [(n, None) for n in counts]
    elif call.get("pixel_values") is not None and len(call["pixel_values"]):
        pictures["image"] = [(n, None) for n in _packed_lengths(seams.model, call)]
    vision = seams.tower.config
    side = vision.image_size // vision.patch_size
    pooled = math.ceil(side / 2) ** 2
    if encoded.get("video") is not None:
        counts = visual.feature_lengths(encoded["video"].pooler_output)
    elif call.get("pixel_values_videos") is not None:
        videos, frames = call["pixel_values_videos"].shape[:2]
        counts = [frames * pooled + 1] * videos
    else:
        counts = []
    if counts:
        pictures["video"] = [(n, (side * side,) * (n // pooled)) for n in counts]
    return visual.visual_input(seams.model, call, pictures)


def _packed_lengths(core: Any, call: Mapping[str, Any]) -> list[int]:
    """Tokens of each picture: what the model's own packing makes of a single empty channel."""
    config, own = core.config, sys.modules[type(core).__module__]
    sizes, vision = call["image_sizes"], config.vision_config
    tiled = [True] * len(sizes)
    if call.get("batch_num_images") is not None:
        tiled = [n == 1 for n in call["batch_num_images"].tolist() for _ in range(n)]
    side = vision.image_size // vision.patch_size
    empty = []
    for size, tiles in zip(sizes, tiled, strict=True):
        number = own.image_size_to_num_patches(size, config.image_grid_pinpoints, vision.image_size)
        empty.append(torch.zeros(number if tiles else 1, side * side, 1))
    options = {
        "vision_aspect_ratio": call.get("vision_aspect_ratio") or getattr(config, "vision_aspect_ratio", None)
    }
    if options["vision_aspect_ratio"] is None:
        options = {"vision_feature_select_strategy": config.vision_feature_select_strategy}
    packed, _ = type(core).pack_image_features(core, empty, sizes, image_newline=torch.ones(1), **options)
    return [len(p) for p in packed]


def _squeeze(call: dict[str, Any], alive: Survivors) -> dict[str, Any]:
    return call | {"image_features": alive.squeeze(call["image_features"])}
