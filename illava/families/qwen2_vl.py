"""Qwen2-VL and Qwen2.5-VL. Run on transformers 4.57.6 and 5.23.

Encoder: packed patches with one attention span per frame; Qwen2.5-VL attends in windows but for a
few blocks, and keeps its tokens in window order from the first block to the merger. A merge unit is
the 2 x 2 patches the merger joins, consecutive in both orders.

Where it merges by attention. LLM: the paper's 2, 8, 14 of 28, at the same relative depth. Encoder:
the paper's 5, 9, 13 of 32 for Qwen2-VL. In Qwen2.5-VL those blocks attend in windows, where every
window hands out the same total and attention received ranks tokens only within their window; so it
is the first two full-attention blocks (7 and 15 of 32). `Plan.paper()` has the paper's own layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from illava.families import visual
from illava.families.about import About
from illava.families.cutting import Cutting
from illava.families.layout import Layout
from illava.families.parts import core_of, part
from illava.families.seams import Projector, Seams
from illava.families.visual import VisualInput, feature_lengths
from illava.plan import LLM_PAPER, VIT_PAPER
from illava.schedule import scale_layers

ABOUT = {
    "qwen2_5_vl": About(
        "Qwen2.5-VL",
        "2 x 2 patches",
        "7, 15 of 32: the first two that attend over the whole picture",
        "2, 8, 14 of 28",
    ),
    "qwen2_vl": About("Qwen2-VL", "2 x 2 patches", "5, 9, 13 of 32", "2, 8, 14 of 28"),
}
CUTTING = {name: Cutting(keeps_shape=True) for name in ABOUT}


def find_seams(model: nn.Module) -> Seams:
    """Locate the parts, in `...ForConditionalGeneration` or the bare `...Model`.

    Raises:
        SeamError: a part is missing in this version of transformers.
    """
    core = core_of(model)
    tower = part(core, "visual", "as the vision encoder")
    blocks = tuple(part(core, "visual.blocks", "to merge between attention and feed-forward network"))
    layers = tuple(part(core, "language_model.layers", "to merge after decoder layers"))
    for name in ("attn", "norm2", "mlp"):
        part(blocks[0], name, "to merge between attention and feed-forward network")
    part(layers[0], "self_attn", "for the attention that visual tokens receive")
    config = tower.config
    depth, full = len(blocks), frozenset(range(len(blocks)))
    if hasattr(config, "fullatt_block_indexes"):
        full = frozenset(config.fullatt_block_indexes)
        vit_ranked = tuple(sorted(b for b in full if b < depth - 1)[:2])
    else:
        vit_ranked = scale_layers(*VIT_PAPER, depth)
    merger = part(core, "visual.merger", "to put survivors back on the full grid")
    return Seams(
        model=core,
        tower=tower,
        blocks=blocks,
        block_attention="attn",
        block_norm="norm2",
        block_ffn="mlp",
        projectors=(Projector(merger, depth - 1),),
        language_model=part(core, "language_model", "as the decoder"),
        layers=layers,
        layer_attention="self_attn",
        merge_size=config.spatial_merge_size,
        full_attention_blocks=full,
        window_patches=(getattr(config, "window_size", 0) // config.patch_size) ** 2,
        vit_ranked=vit_ranked,
        llm_ranked=scale_layers(*LLM_PAPER, len(layers)),
        scoring_layers=frozenset(range(len(layers))),
    )


def layout(seams: Seams, call: Mapping[str, Any]) -> Layout:
    """Of one encoder call: patches unit by unit, frames end to end."""
    grids = tuple((int(t), int(h), int(w)) for t, h, w in call["grid_thw"].tolist())
    window = round(seams.window_patches**0.5) // seams.merge_size
    return Layout(grids, seams.merge_size, window_side=window)


def visual_input(seams: Seams, call: Mapping[str, Any]) -> VisualInput | None:
    """Which tokens of a `...Model` call came from pictures; `None` if it brings no picture."""
    encoded = call.get("mm_encoder_outputs") or {}
    pictures = {}
    for kind, pixels, grid in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        if encoded.get(kind) is not None:
            counts = feature_lengths(encoded[kind].pooler_output)
        elif call.get(pixels) is not None:
            counts = (call[grid].prod(-1) // seams.merge_size**2).tolist()
        else:
            continue
        pictures[kind] = [(n, (n,)) for n in counts]
    return visual.visual_input(seams.model, call, pictures)
