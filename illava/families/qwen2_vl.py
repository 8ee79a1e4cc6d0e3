"""Qwen2-VL and Qwen2.5-VL. Run on transformers 4.57.6 and 5.23.

Encoder: packed patches with one attention span per frame; Qwen2.5-VL attends in windows but for a
few blocks, and keeps its tokens in window order from the first block to the merger. A merge unit is
the 2 x 2 patches the merger joins, consecutive in both orders.

Default layers. LLM: the paper's 2, 8, 14 of 28, at the same relative depth. Encoder: the paper's
5, 9, 13 of 32 for Qwen2-VL. In Qwen2.5-VL those blocks attend in windows, where every window hands
out the same total and attention received ranks tokens only within their window; so the default is
its first two full-attention blocks (7 and 15 of 32). `Plan.paper()` has the paper's own layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from illava.families.seams import Seams, VisualInput, part
from illava.plan import scale_layers

PAPER_VIT, PAPER_VIT_DEPTH = (5, 9, 13), 32
PAPER_LLM, PAPER_LLM_DEPTH = (2, 8, 14), 28


def find_seams(model: nn.Module) -> Seams:
    """Locate the parts, in `...ForConditionalGeneration` or the bare `...Model`.

    Raises:
        SeamError: a part is missing in this version of transformers.
    """
    core = model if hasattr(model, "language_model") and hasattr(model, "visual") else None
    if core is None or hasattr(model, "lm_head"):
        core = part(model, "model", "as the module that joins pictures and text")
    tower = part(core, "visual", "as the vision encoder")
    blocks = part(core, "visual.blocks", "to merge between attention and feed-forward network")
    layers = part(core, "language_model.layers", "to merge after decoder layers")
    for name in ("attn", "norm2", "mlp"):
        part(blocks[0], name, "to merge between attention and feed-forward network")
    part(layers[0], "self_attn", "for the attention that visual tokens receive")
    config = tower.config
    depth, full = len(blocks), frozenset(range(len(blocks)))
    if hasattr(config, "fullatt_block_indexes"):
        full = frozenset(config.fullatt_block_indexes)
        vit_default = tuple(sorted(b for b in full if b < depth - 1)[:2])
    else:
        vit_default = scale_layers(PAPER_VIT, PAPER_VIT_DEPTH, depth)
    return Seams(
        model=core,
        tower=tower,
        blocks=tuple(blocks),
        block_attention="attn",
        block_norm="norm2",
        block_ffn="mlp",
        projector=part(core, "visual.merger", "to put survivors back on the full grid"),
        language_model=part(core, "language_model", "as the decoder"),
        layers=tuple(layers),
        layer_attention="self_attn",
        merge_size=config.spatial_merge_size,
        full_attention_blocks=full,
        window_patches=(getattr(config, "window_size", 0) // config.patch_size) ** 2,
        vit_default=vit_default,
        llm_default=scale_layers(PAPER_LLM, PAPER_LLM_DEPTH, len(layers)),
    )


def tower_grids(call: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    """`(frames, height, width)` in patches of every picture of one encoder call."""
    return [(int(t), int(h), int(w)) for t, h, w in call["grid_thw"].tolist()]


def visual_input(seams: Seams, call: Mapping[str, Any]) -> VisualInput | None:
    """Which tokens of a `...Model` call came from pictures; `None` if it brings no picture.

    Placeholders and features correspond in reading order, so the sizes of the features (or of the
    grids they will be made from) say where one picture ends and the next begins.
    """
    encoded = call.get("mm_encoder_outputs") or {}
    sizes: dict[str, list[int]] = {}
    for kind, pixels, grid in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        if encoded.get(kind) is not None:
            features = encoded[kind].pooler_output
            single = isinstance(features, Tensor) and features.ndim == 2
            sizes[kind] = [len(features)] if single else [len(f) for f in features]
        elif call.get(pixels) is not None:
            sizes[kind] = (call[grid].prod(-1) // seams.unit_patches).tolist()
    if not sizes:
        return None

    segment: Tensor | None = None
    kinds: list[str] = []
    tokens: list[int] = []
    for kind, counts in sizes.items():
        place = _placeholders(seams, call, kind)
        if segment is None:
            segment = torch.full(place.shape, -1, dtype=torch.long)
        numbers = torch.arange(len(counts)) + len(kinds)
        numbers = numbers.repeat_interleave(torch.tensor(counts))
        if int(place.sum()) != len(numbers):
            return None  # the model itself reports features and placeholders that do not match
        segment[place] = numbers
        kinds += [kind] * len(counts)
        tokens += counts
    if segment is None or not tokens:
        return None
    return VisualInput(segment, tuple(kinds), tuple(tokens))


def _placeholders(seams: Seams, call: Mapping[str, Any], kind: str) -> Tensor:
    """`[B, L]` bool on the CPU."""
    token = getattr(seams.model.config, f"{kind}_token_id")
    if call.get("input_ids") is not None:
        return call["input_ids"].cpu() == token
    embedding = seams.model.get_input_embeddings().weight[token]
    return (call["inputs_embeds"] == embedding.to(call["inputs_embeds"].device)).all(-1).cpu()
