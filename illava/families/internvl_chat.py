"""InternVL 2.5 by its published code (`InternVLChatModel`). Run on transformers 4.57.6 and 5.23.

Recognised by its class; illava never asks for `trust_remote_code`. Tower, merge unit, pictures and
layers that merge by attention are those of `illava.families.internvl`. Its attention is its own:
queries and keys are read off its modules, and in merging blocks S_avg is a pass of its own.
`generate` (and `chat`) builds embeddings and hands them to the language model's `generate`, so
which of them are visual is told there. On 5.x the published classes cannot be loaded by
`from_pretrained`; `from_config` works.

The language model must be transformers' own (Qwen2, Llama). With InternLM2 as published, which has no
`generate` in the versions of transformers illava runs on, convert the checkpoint to
`InternVLForConditionalGeneration`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from illava.errors import SeamError
from illava.families import internvl, visual
from illava.families.about import About
from illava.families.cutting import Cutting
from illava.families.layout import Layout, Survivors, spread_tiles
from illava.families.parts import part, used_blocks
from illava.families.seams import Observed, Projector, Seams
from illava.families.visual import VisualInput
from illava.plan import LLM_PAPER, VIT_PAPER
from illava.schedule import scale_layers

__all__ = ["find_seams", "joining_methods", "layout", "visual_input"]

ABOUT = {
    "internvl_chat": About(
        "InternVL 2.5, published code", "2 x 2 patches", "as internvl", "2, 8, 14 of 28, scaled"
    )
}
CUTTING = {"internvl_chat": Cutting(whole="last")}


def find_seams(model: nn.Module) -> Seams:
    """Locate the parts.

    Raises:
        SeamError: a part is missing in this copy of the code, or the language model is not
            transformers' own.
    """
    config: Any = model.config
    tower = part(model, "vision_model", "as the vision encoder")
    why = "to merge between attention and feed-forward network"
    every = part(tower, "encoder.layers", why)
    blocks = tuple(every[: used_blocks(len(every), config.select_layer)])
    for name in ("attn.qkv", "norm2", "mlp", "ls2"):
        part(blocks[0], name, why)
    language = part(model, "language_model.model", "as the decoder")
    layers = tuple(part(language, "layers", "to merge after decoder layers"))
    if not type(language).__module__.startswith("transformers."):
        raise SeamError(
            f"the language model {type(language).__name__} runs code of its own, with a cache that cannot "
            "hold merged sequences; convert the checkpoint to InternVLForConditionalGeneration "
            "(transformers' convert_internvl_weights_to_hf.py) and patch that"
        )
    return Seams(
        model=model,
        tower=tower,
        blocks=blocks,
        block_attention="attn",
        block_norm="norm2",
        block_ffn="mlp",
        block_observed=Observed(("qkv", "q_norm", "k_norm"), _queries_keys),
        ffn_tail=("ls2", "drop_path2"),
        unread_blocks=len(every) - len(blocks),
        projectors=(
            Projector(
                part(model, "mlp1", "to put survivors back on the full grid"),
                len(blocks) - 1,
                squeeze=partial(_squeeze, model),
                spread=partial(_spread, model),
            ),
        ),
        language_model=language,
        layers=layers,
        layer_attention="self_attn",
        merge_size=round(1 / config.downsample_ratio),
        full_attention_blocks=frozenset(range(len(blocks))),
        vit_ranked=scale_layers(*VIT_PAPER, len(blocks)),
        llm_ranked=scale_layers(*LLM_PAPER, len(layers)),
        scoring_layers=frozenset(range(len(layers))),
    )


def layout(seams: Seams, call: Mapping[str, Any]) -> Layout:
    """As `internvl`'s; oldest checkpoints make visual tokens column by column."""
    core: Any = seams.model
    return replace(internvl.layout(seams, call), by_columns=core.ps_version == "v1")


def visual_input(seams: Seams, call: Mapping[str, Any]) -> VisualInput | None:
    """Which tokens of a call of `forward` or `generate` came from pictures; `None` if none did."""
    core: Any = seams.model
    if call.get("pixel_values") is None or core.img_context_token_id is None:
        return None
    place = call["input_ids"].cpu() == core.img_context_token_id
    per_tile = core.num_image_token
    pictures = [(n, (per_tile,) * (n // per_tile)) for n in visual.runs(place)]
    return visual.visual_tokens({"image": place}, {"image": pictures})


def joining_methods(state: Any) -> tuple[tuple[nn.Module, str, Callable[..., Any]], ...]:
    """Methods in which the model joins pictures and text, and what to do around them."""
    core: Any = state.seams.model

    def generate(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = dict(zip(("pixel_values", "input_ids"), args, strict=False)) | kwargs
        with state.announced(visual_input(state.seams, call)):
            return original(*args, **kwargs)

    return ((core, "generate", generate),)


def _queries_keys(attention: Any, seen: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, float]:
    """`[tiles, n, H, D]` each: the fused projection's, or behind their norms where it has them."""
    q, k, _ = seen["qkv"].chunk(3, dim=-1)  # [tiles, n, d]
    q, k = seen.get("q_norm", q), seen.get("k_norm", k)
    heads = (attention.num_heads, -1)
    return q.unflatten(-1, heads), k.unflatten(-1, heads), attention.scale


def _squeeze(model: Any, call: dict[str, Any], alive: Survivors) -> dict[str, Any]:
    return call | {"input": alive.squeeze(_shuffled(model, call["input"]))}


def _spread(model: Any, output: Tensor, alive: Survivors) -> Tensor:
    return _shuffled(model, spread_tiles(output, alive))


def _shuffled(model: Any, units: Tensor) -> Tensor:
    """`[tiles, units, d]`: the pixel shuffle of oldest checkpoints leaves units column by column."""
    if model.ps_version != "v1":
        return units
    side = math.isqrt(units.shape[1])
    return units.unflatten(1, (side, side)).transpose(1, 2).flatten(1, 2)
