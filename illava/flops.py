"""Floating-point operations of a prefill, with and without merging: the bound on its speed-up.

Counted are the matrix products: linear layers (2 per weight and token) and attention (4 per query,
key and channel; half of the pairs under a causal mask). Windows are taken to lose tokens evenly.
Merging itself, norms and activations are not counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from illava.families.seams import Seams
from illava.plan import ModelPlan, SegmentSchedule


@dataclass(frozen=True)
class Cost:
    """Operations of one part, without merging and with it."""

    without: float
    with_: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.without + other.without, self.with_ + other.with_)


@dataclass(frozen=True)
class Flops:
    """Operations of a prefill.

    Attributes:
        vision: patch embedding, encoder blocks, projector.
        language: decoder layers, and the head for one token per row.
    """

    vision: Cost
    language: Cost

    @property
    def speedup_bound(self) -> float:
        """How many times faster a prefill could be if time were operations alone."""
        total = self.vision + self.language
        return total.without / total.with_ if total.with_ else 1.0


@dataclass(frozen=True)
class ModelShape:
    """Weights per token of a model's parts, measured once when it is patched.

    Attributes:
        embed, block_attention, block_ffn, projector, layer, head: weights each token meets (the
            projector's per visual token, all others per patch or token).
        block_width, layer_width: channels of attention, all heads together.
        block_spans: patches a block's attention spans at most, `None` for the whole frame.
        layers: decoder layers.
        unit_patches: patches of a merge unit.
    """

    embed: int
    block_attention: int
    block_ffn: int
    block_width: int
    block_spans: tuple[int | None, ...]
    projector: int
    layer: int
    layer_width: int
    layers: int
    head: int
    unit_patches: int


def measure(seams: Seams) -> ModelShape:
    """Read a model's shape off its linear layers, whatever wraps or quantises their weights."""
    block, layer = seams.blocks[0], seams.layers[0]
    block_attention = getattr(block, seams.block_attention)
    layer_attention = getattr(layer, seams.layer_attention)
    config: Any = seams.language_model.config
    whole = seams.full_attention_blocks
    return ModelShape(
        embed=sum(m.weight.numel() for m in seams.tower.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))),
        block_attention=_weights(block_attention),
        block_ffn=_weights(block) - _weights(block_attention),
        block_width=_width(block_attention),
        block_spans=tuple(None if i in whole else seams.window_patches for i in range(len(seams.blocks))),
        projector=_weights(seams.projector),
        layer=_weights(layer),
        layer_width=_width(layer_attention),
        layers=len(seams.layers),
        head=config.hidden_size * config.vocab_size,
        unit_patches=seams.unit_patches,
    )


def count_flops(
    plan: ModelPlan,
    shape: ModelShape,
    schedules: Sequence[SegmentSchedule],
    rows: Sequence[tuple[int, Sequence[SegmentSchedule]]],
) -> Flops:
    """Operations of one prefill.

    Args:
        plan: whose layers merge.
        shape: of the model.
        schedules: every picture the encoder encodes.
        rows: per batch row, its text tokens and its pictures.
    """
    vision = Cost(0, 0)
    for schedule in schedules:
        vision += Cost(_vision(shape, schedule, {}), _vision(shape, schedule, _after(schedule.vit)))
    language = Cost(0, 0)
    for text, pictures in rows:
        full = text + sum(p.tokens for p in pictures)
        start = text + sum(p.encoder_tokens for p in pictures)
        after = {layer: text + sum(_after(p.llm)[layer] for p in pictures) for layer in plan.llm_layers}
        language += Cost(_language(shape, full, {}), _language(shape, start, after))
    return Flops(vision, language)


def _after(layers: Sequence[tuple[int, int, int]]) -> dict[int, int]:
    return {layer: out for layer, _, out in layers}


def _vision(shape: ModelShape, schedule: SegmentSchedule, after: dict[int, int]) -> float:
    whole = tokens = schedule.tokens * shape.unit_patches
    total = 2.0 * shape.embed * tokens
    for number, window in enumerate(shape.block_spans):
        span = tokens / schedule.frames
        if window is not None:
            span = min(span, window * tokens / whole)
        total += 2.0 * shape.block_attention * tokens + 4.0 * shape.block_width * tokens * span
        tokens = after.get(number, tokens // shape.unit_patches) * shape.unit_patches
        total += 2.0 * shape.block_ffn * tokens
    return total + 2.0 * shape.projector * tokens / shape.unit_patches


def _language(shape: ModelShape, tokens: int, after: dict[int, int]) -> float:
    total = 2.0 * shape.head
    for number in range(shape.layers):
        total += 2.0 * shape.layer * tokens + 4.0 * shape.layer_width * tokens * (tokens + 1) / 2
        tokens = after.get(number, tokens)
    return total


def _linear_layers(module: nn.Module) -> Iterator[Any]:
    """Outermost linear layers: an adapter inside one is not counted again."""
    for child in module.children():
        if hasattr(child, "in_features"):
            yield child
        else:
            yield from _linear_layers(child)


def _weights(module: nn.Module) -> int:
    return sum(m.in_features * m.out_features for m in _linear_layers(module))


def _width(attention: nn.Module) -> int:
    """Channels of all heads together: what an attention's last layer, its output projection, takes."""
    return list(_linear_layers(attention))[-1].in_features
