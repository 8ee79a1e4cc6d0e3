"""MiniCPM-V 4.6 and 4.7, native in transformers. Run on transformers 5.23.

Encoder: pictures, slices and video frames packed line by line, one attention span each. A module
inside the tower joins 2 x 2 patches after `insert_layer_id`; the merger behind it joins 2 x 2 again, so
that a merge unit is 4 x 4 patches before the first and 2 x 2 tokens after it (2 x 2 patches throughout
in the "4x" mode, which leaves the inner module out). Both modules take whole pictures of any size: the
survivors are handed to them side by side, as one picture one unit high.

The language model ranks every slice and frame by itself. It is a Qwen3.5: most of its layers attend
linearly and rank nothing, so a merge after such a layer reads the attention of the nearest
full-attention layer before it; the plan says which.

Where it merges by attention: encoder, the paper's 5, 9, 13 of 32 at the same relative depth; decoder, the
full-attention layers nearest to its 2, 8, 14 of 28 at the same relative depth.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from illava.families import visual
from illava.families.about import About
from illava.families.cutting import Cutting
from illava.families.layout import Layout, Survivors
from illava.families.parts import core_of, part
from illava.families.seams import Projector, Regrid, Seams
from illava.families.visual import VisualInput
from illava.plan import LLM_PAPER, VIT_PAPER
from illava.schedule import nearest_layers, scale_layers

_ABOUT = (
    "4 x 4 patches, 2 x 2 behind the inner merger",
    "5, 9, 13 of 32, scaled",
    "the full-attention layers nearest to 2, 8, 14 of 28, scaled",
    ("5.23.0",),
)
ABOUT = {
    "minicpmv4_6": About("MiniCPM-V 4.6", *_ABOUT),
    "minicpmv4_7": About("MiniCPM-V 4.7", *_ABOUT),
}
CUTTING = {name: Cutting(whole="first", slices=True, keeps_shape=True) for name in ABOUT}


def find_seams(model: nn.Module) -> Seams:
    """Locate the parts, in `...ForConditionalGeneration` or the bare `...Model`.

    Raises:
        SeamError: a part is missing in this version of transformers.
    """
    core = core_of(model)
    tower = part(core, "vision_tower", "as the vision encoder")
    why = "to merge between attention and feed-forward network"
    blocks = tuple(part(tower, "encoder.layers", why))
    for name in ("self_attn", "layer_norm2", "mlp"):
        part(blocks[0], name, why)
    layers = tuple(part(core, "language_model.layers", "to merge after decoder layers"))
    scoring = frozenset(i for i, layer in enumerate(layers) if hasattr(layer, "self_attn"))
    joins = tower.config.insert_layer_id if _joins_inside(core, None) else -1
    inner = part(tower, "vit_merger", "to hand it the survivors")
    merger = part(core, "merger", "to put survivors back on the full grid")
    return Seams(
        model=core,
        tower=tower,
        blocks=blocks,
        block_attention="self_attn",
        block_norm="layer_norm2",
        block_ffn="mlp",
        projectors=(Projector(merger, len(blocks) - 1, squeeze=_squeeze, spread=_spread),),
        language_model=part(core, "language_model", "as the decoder"),
        layers=layers,
        layer_attention="self_attn",
        merge_size=_unit_side(core, joins >= 0),
        full_attention_blocks=frozenset(range(len(blocks))),
        vit_ranked=scale_layers(*VIT_PAPER, len(blocks)),
        llm_ranked=nearest_layers(scale_layers(*LLM_PAPER, len(layers)), scoring),
        scoring_layers=scoring,
        regrid=Regrid(inner, tower.config.insert_layer_id, squeeze=_squeeze_windows),
    )


def layout(seams: Seams, call: Mapping[str, Any]) -> Layout:
    """Of one encoder call: the patches of each picture line by line, end to end."""
    config: Any = seams.tower.config
    joins = bool(call.get("use_vit_merger", True)) and config.insert_layer_id >= 0
    grids = tuple((1, int(h), int(w)) for h, w in call["target_sizes"].tolist())
    return Layout(grids, _unit_side(seams.model, joins), raster=True)


def visual_input(seams: Seams, call: Mapping[str, Any]) -> VisualInput | None:
    """Which tokens of a `...Model` call came from pictures; `None` if it brings no picture."""
    encoded = call.get("mm_encoder_outputs") or {}
    side = _unit_side(seams.model, _joins_inside(seams.model, call.get("downsample_mode")))
    pictures: dict[str, list[tuple[int, tuple[int, ...] | None]]] = {}
    for kind, pixels, sizes in (
        ("image", "pixel_values", "target_sizes"),
        ("video", "pixel_values_videos", "target_sizes_videos"),
    ):
        if encoded.get(kind) is not None:
            counts = visual.feature_lengths(encoded[kind].pooler_output)
        elif call.get(pixels) is not None:
            counts = (call[sizes].prod(-1) // side**2).tolist()
        else:
            continue
        pictures[kind] = [(n, (n,)) for n in counts]
    return visual.visual_input(seams.model, call, pictures)


def _joins_inside(core: Any, mode: str | None) -> bool:
    return (mode or core.config.downsample_mode) != "4x" and core.vision_tower.config.insert_layer_id >= 0


def _unit_side(core: Any, joins_inside: bool) -> int:
    """Patches along one side of what becomes one visual token."""
    return core.config.merge_kernel_size[0] ** core.config.merger_times * (2 if joins_inside else 1)


def _squeeze_windows(call: dict[str, Any], windows: Tensor) -> dict[str, Any]:
    """The survivors' `[W, 2, 2]` windows as one picture two patches high."""
    hidden = call["hidden_states"]  # [1, N, d]
    strip = windows.transpose(0, 1).flatten().to(hidden.device)  # [2 * W * 2]
    sizes = call["target_sizes"].new_tensor([[2, 2 * len(windows)]])
    kept = {k: v for k, v in call.items() if k not in ("window_index", "cu_window_seqlens")}
    return kept | {"hidden_states": hidden[:, strip], "target_sizes": sizes}


def _squeeze(call: dict[str, Any], alive: Survivors) -> dict[str, Any]:
    """The survivors' units as one picture one unit high."""
    side, hidden = alive.layout.side, call["hidden_states"]  # [1, all tokens, d]
    places = alive.tokens[alive.members].unflatten(1, (side, side))  # [U, side, side]
    strip = places.transpose(0, 1).flatten().to(hidden.device)
    sizes = call["target_sizes"].new_tensor([[side, side * len(places)]])
    return call | {"hidden_states": hidden[:, strip], "target_sizes": sizes}


def _spread(output: list[Tensor], alive: Survivors) -> list[Tensor]:
    """`[U, d]` of survivors to the features of each picture."""
    return list(alive.spread(output[0]).split(list(alive.layout.frame_units)))
