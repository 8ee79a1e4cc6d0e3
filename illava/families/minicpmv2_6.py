"""MiniCPM-V 2.6 by its published code (`MiniCPMV`). Run on transformers 4.57.6 and 5.23.

Recognised by its class; illava never asks for `trust_remote_code`. Encoder: slices as rows of one
padded batch, with a mask; a merge unit is one patch. Its attention is its own: queries and keys are
read off its modules, and in merging blocks S_avg is a pass of its own. The resampler's queries read
the survivors alone, and give the language model the same number of tokens (64) per slice however many
those are; so encoder and language model count different things. A budget applies to each: the encoder
removes its share of the patches, the language model all of the reduction of its own tokens, slice by
slice, and the report shows both.

`generate` (and `chat`) builds embeddings and hands them to the language model's `generate`, when
streaming in another thread, so the embeddings say themselves which of them are visual.

Where it merges by attention: the paper's 5, 9, 13 of 32 and 2, 8, 14 of 28, at the same relative depth.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from illava.errors import SeamError
from illava.families import visual
from illava.families.about import About
from illava.families.cutting import Cutting
from illava.families.layout import Layout, Survivors
from illava.families.parts import part
from illava.families.seams import Observed, Projector, Seams
from illava.families.visual import VisualInput
from illava.plan import LLM_PAPER, VIT_PAPER
from illava.schedule import scale_layers
from illava.sparse import sparse
from illava.transfer import on

ABOUT = {"minicpmv": About("MiniCPM-V 2.6, published code", "a patch", "4, 8, 11 of 27", "2, 8, 14 of 28")}
CUTTING = {"minicpmv": Cutting(whole="first", slices=True, keeps_shape=True)}


def find_seams(model: nn.Module) -> Seams:
    """Locate the parts.

    Raises:
        SeamError: a part is missing in this copy of the code, as in other versions of the model.
    """
    tower = part(model, "vpm", "as the vision encoder")
    why = "to merge between attention and feed-forward network"
    blocks = tuple(part(tower, "encoder.layers", why))
    for name in ("self_attn.q_proj", "self_attn.k_proj", "layer_norm2", "mlp"):
        part(blocks[0], name, why)
    language = part(model, "llm.model", "as the decoder")
    layers = tuple(part(language, "layers", "to merge after decoder layers"))
    part(layers[0], "self_attn", "for the attention that visual tokens receive")
    part(model, "get_vllm_embedding", "to know where pictures stand in the prompt")
    if "tgt_sizes" not in inspect.signature(type(tower).forward).parameters:
        raise SeamError(
            f"the vision encoder {type(tower).__name__} is not told the sizes of its slices, as in MiniCPM-V "
            "2.5; illava could not tell pictures from padding. Use MiniCPM-V 2.6 or newer"
        )
    reads = part(model, "resampler.attn", "to hand the survivors to the resampler's queries")
    return Seams(
        model=model,
        tower=tower,
        blocks=blocks,
        block_attention="self_attn",
        block_norm="layer_norm2",
        block_ffn="mlp",
        block_observed=Observed(("q_proj", "k_proj"), _queries_keys),
        projectors=(
            Projector(reads, len(blocks) - 1, squeeze=_squeeze, spread=lambda out, _: out, reads=_reads),
        ),
        language_model=language,
        layers=layers,
        layer_attention="self_attn",
        merge_size=1,
        dead_rows=0.0,  # the resampler norms and projects them before they are left out
        full_attention_blocks=frozenset(range(len(blocks))),
        vit_ranked=scale_layers(*VIT_PAPER, len(blocks)),
        llm_ranked=scale_layers(*LLM_PAPER, len(layers)),
        scoring_layers=frozenset(range(len(layers))),
    )


def layout(seams: Seams, call: Mapping[str, Any]) -> Layout:
    """Of one encoder call: a slice a row, its patches line by line, padded at the end."""
    rows, _, height, width = call["pixel_values"].shape
    patch = seams.tower.config.patch_size
    height, width = height // patch, width // patch
    grids = ((1, height, width),) * rows
    if call.get("tgt_sizes") is not None:
        grids = tuple((1, int(h), int(w)) for h, w in call["tgt_sizes"].tolist())
    return Layout(grids, 1, raster=True, row_tokens=height * width)


def visual_input(seams: Seams, call: Mapping[str, Any]) -> VisualInput | None:
    """Which tokens of the prompt in `get_vllm_embedding`'s argument came from pictures.

    A call of the model itself brings that argument along; what it makes of it is told there.
    """
    if "image_bound" not in call:
        return None
    place = torch.zeros(call["input_ids"].shape, dtype=torch.bool)
    counts: list[int] = []
    for row, bounds in zip(place, call["image_bound"], strict=True):
        for start, end in [(int(a), int(b)) for a, b in bounds]:
            row[start:end] = True
            counts.append(end - start)
    sizes = [h * w for rows in call.get("tgt_sizes", ()) for h, w in torch.as_tensor(rows).tolist()]
    known = len(sizes) == len(counts)  # not if the caller brought features along
    pictures = [(n, (sizes[i],) if known else None) for i, n in enumerate(counts)]
    return visual.visual_tokens({"image": place}, {"image": pictures})


def joining_methods(state: Any) -> tuple[tuple[nn.Module, str, Callable[..., Any]], ...]:
    """Methods in which the model joins pictures and text, and what to do around them."""
    core: Any = state.seams.model

    def embed(original: Callable[..., Any], data: Mapping[str, Any]) -> Any:
        with state.gathering():  # many slices are encoded in several calls, and resampled in one
            embeds, features = original(data)
        state.mark(embeds, visual_input(state.seams, data))
        return embeds, features

    def generate(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with state.announced(state.take_mark(kwargs.get("inputs_embeds"))):
            return original(*args, **kwargs)

    return ((core, "get_vllm_embedding", embed), (core.llm, "generate", generate))


def _reads(output: Any, alive: Survivors) -> list[Tensor]:
    """How the queries look at each slice's patches, mean over heads: `[queries, patches]`, sparse."""
    sizes = alive.layout.frame_units
    starts = [*accumulate(sizes, initial=0)][:-1]
    left = alive.units.split(list(alive.frame_counts))
    found = []  # output[1] is [slices, queries, n]
    for looks, own, start, size in zip(output[1], left, starts, sizes, strict=True):
        weights, columns = looks[:, : len(own)].double().cpu(), own.cpu() - start
        rows = torch.arange(len(weights))[:, None].expand_as(weights)
        columns = columns.expand_as(weights)
        found.append(sparse(rows.flatten(), columns.flatten(), weights.flatten(), (len(weights), size)))
    return found


def _queries_keys(attention: Any, seen: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, float]:
    """`[slices, n, H, D]` each."""
    heads = (attention.num_heads, -1)
    return seen["q_proj"].unflatten(-1, heads), seen["k_proj"].unflatten(-1, heads), attention.scale


def _squeeze(call: dict[str, Any], alive: Survivors) -> dict[str, Any]:
    """Keys and values `[patches, slices, d]` of the survivors, and which of them are padding."""
    key = call["key"]
    width = key.shape[0]  # patches a row, padding included
    columns = [tokens % width for tokens in alive.tokens.to(key.device).split(list(alive.frame_counts))]
    index = nn.utils.rnn.pad_sequence(columns)  # [n, slices]
    rows = torch.arange(index.shape[1], device=key.device)
    kept = on(key.device, alive.frame_counts)
    padding = torch.arange(index.shape[0], device=key.device) >= kept[:, None]  # [slices, n]
    return call | {
        "key": key[index, rows],
        "value": call["value"][index, rows],
        "key_padding_mask": padding,
    }
