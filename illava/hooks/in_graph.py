"""Merges as operations of a compiled graph.

What survives a merge depends on values, how much survives does not: the plan knows every size before the
first layer runs. So torch.compile can trace past a merge that it sees as an opaque operation of known
output sizes. What a merge changes besides (positions, caches to come) it changes in the call under way,
when it runs.

Notation for tensor shapes: B rows, n slots, K keys; N tokens of the encoder, H heads, D head size, d hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from illava.hooks import under_way
from illava.language import LanguageCall
from illava.language_layers import LayerInputs, Rotary
from illava.vision import VisionCall
from illava.vision_stage import BlockInputs

# Operations read the call under way, which a captured CUDA graph would not do again.
_TAGS = [tag for name in ("cudagraph_unsafe",) if (tag := getattr(torch.Tag, name, None)) is not None]
_SCHEMAS = {
    "merge": "(Tensor hidden, Tensor cos, Tensor sin, Tensor[] seen, float scale, int layer, SymInt width, "
    "SymInt[] keys, str[] forms) -> Tensor[]",
    "attend": "(Tensor q, Tensor k, Tensor v, Tensor? bounds, float scale, int block) -> Tensor",
    "merge_units": "(Tensor hidden, int block, SymInt[] sizes) -> Tensor[]",
}
_LIBRARY = torch.library.Library("illava", "FRAGMENT")  # operations go when this module goes
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"illava::{_name}", _schema, lib=_LIBRARY, tags=_TAGS)


def possible(call: LanguageCall | VisionCall) -> bool:
    """Whether a merge can be traced: nobody asks for gradients or for what is inside the graph."""
    return torch.compiler.is_compiling() and call.traceable and not torch.is_grad_enabled()


def merge(call: LanguageCall, layer: int, hidden: Tensor, rotary: Rotary) -> Tensor:
    """Merge after `layer`, traced: `[B, n, d]` to `[B, n', d]`."""
    at = call.scored_at.get(layer)
    seen, scale = [], 0.0
    if at in call.attended:
        q, k, scale = call.attended.pop(at)
        seen = [q, k]
    coming = call.layers.coming[call.layers.stage_of[layer] + 1]
    width, *keys, _ = coming.sizes.shape
    out = torch.ops.illava.merge.default(hidden, *rotary, seen, scale, layer, width, keys, coming.forms)
    made = iter(out[3:])
    masks = [next(made) if form else None for form in coming.forms]
    call.layers.now = LayerInputs(masks, (out[1], out[2]))
    return out[0]


@torch.library.impl("illava::merge", "CompositeExplicitAutograd", lib=_LIBRARY)
def _run(
    hidden: Tensor, cos: Tensor, sin: Tensor, seen: list[Tensor], scale: float, layer: int, width: int,
    keys: list[int], forms: list[str],
) -> list[Tensor]:  # fmt: skip
    call = under_way.LANGUAGE.get()
    if call is None:
        raise RuntimeError("illava's merge called outside a call of the language model")
    if seen:
        call.attended[call.scored_at[layer]] = seen[0], seen[1], scale
    hidden = call.leave_layer(layer, hidden, (cos, sin))
    now = call.layers.now
    if now.rotary is None:
        raise RuntimeError(
            f"the merge after decoder layer {layer} left no positions for the layers behind it"
        )
    return [hidden, *now.rotary, *(mask for mask in now.masks if mask is not None)]


@torch.library.register_fake("illava::merge", lib=_LIBRARY)
def _shapes(
    hidden: Tensor, cos: Tensor, sin: Tensor, seen: list[Tensor], scale: float, layer: int, width: int,
    keys: list[int], forms: list[str],
) -> list[Tensor]:  # fmt: skip
    rows = hidden.shape[0]
    out = [x.new_empty((*x.shape[:-2], width, x.shape[-1])) for x in (hidden, cos, sin)]
    for total, form in zip(keys, forms, strict=True):
        if not form:
            continue
        if form.startswith("flash"):
            out.append(hidden.new_empty((rows, total), dtype=torch.bool))
        else:
            dtype = torch.bool if form == "sdpa" else hidden.dtype
            out.append(hidden.new_empty((rows, 1, width, total), dtype=dtype))
    return out


def attend(call: VisionCall, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """A block's attention, traced: `[rows, width, H, D]` in and out."""
    return torch.ops.illava.attend.default(q, k, v, call.bounds, scale, call.attending)


@torch.library.impl("illava::attend", "CompositeExplicitAutograd", lib=_LIBRARY)
def _attend(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, scale: float, block: int) -> Tensor:
    call = under_way.VISION.get()
    if call is None:
        raise RuntimeError("illava's attention called outside a call of the encoder")
    call.begin_attention(block, None if bounds is None else bounds.clone())
    if call.by_attention and block in call.scoring:
        # The merge reads them later, when the graph may have used their memory again.
        q, k = q.clone(), k.clone()
    return call.attend(q, k, v, scale).contiguous()


@torch.library.register_fake("illava::attend", lib=_LIBRARY)
def _attended(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor | None, scale: float, block: int) -> Tensor:
    return v.new_empty(v.shape)


def merge_units(call: VisionCall, block: int, hidden: Tensor) -> Tensor:
    """The merge within `block`, traced: `[N, d]` or `[rows, width, d]` in and out."""
    *sizes, _ = call.sizes[block].shape
    out, tokens, before = torch.ops.illava.merge_units.default(hidden, block, sizes)
    call.now = BlockInputs(tokens, before, None)
    call.merged[block] = out
    return out


@torch.library.impl("illava::merge_units", "CompositeExplicitAutograd", lib=_LIBRARY)
def _merge_units(hidden: Tensor, block: int, sizes: list[int]) -> list[Tensor]:
    call = under_way.VISION.get()
    if call is None:
        raise RuntimeError("illava's merge called outside a call of the encoder")
    out = call.merge(block, hidden)
    after = call.now
    if after is None:
        raise RuntimeError("a merge that leaves no stage behind")
    # Copies: a compiled graph uses the memory of what an operation put out again, and the call keeps these.
    return [out, after.tokens.clone(), after.before.clone()]


@torch.library.register_fake("illava::merge_units", lib=_LIBRARY)
def _merged_units(hidden: Tensor, block: int, sizes: list[int]) -> list[Tensor]:
    tokens, full, rows, width = sizes
    shape = (tokens,) if hidden.ndim == 2 else (rows, width)
    return [
        hidden.new_empty((*shape, hidden.shape[-1])),
        hidden.new_empty((tokens,), dtype=torch.long),
        hidden.new_empty((full,), dtype=torch.int32),
    ]
