"""Floating-point operations of a prefill, with and without merging: the bound on its speed-up.

Counted are the matrix products: linear layers (2 per weight and token) and attention (4 per query,
key and channel; half of the pairs under a causal mask). Windows are taken to lose tokens evenly.
Merging itself, norms, activations, CLS tokens, a resampler, the router of experts, the products of
linear attention and the attention inside a module that joins patches are not counted: together under
1 % of a prefill, in models with linear attention under 4 %.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from illava.families.seams import Seams
from illava.schedule import ModelPlan, SegmentSchedule


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
        embed, block_attention, block_ffn: weights each patch meets.
        block_width: channels of attention, all heads together.
        block_spans: patches each block's attention spans at most, `None` for the whole frame.
        unit_tokens: tokens of a merge unit in each block.
        projectors: of each, the block whose output it reads, and its weights per unit.
        regrid: the block after which patches are joined, and that module's weights per unit.
        layers: of each decoder layer, its weights and its channels of attention (0 for linear
            attention, whose cost grows with the weights alone).
        head: weights of the language model's head.
        depth: encoder blocks whose output is used.
    """

    embed: int
    block_attention: int
    block_ffn: int
    block_width: int
    block_spans: tuple[int | None, ...]
    unit_tokens: tuple[int, ...]
    projectors: tuple[tuple[int, int], ...]
    regrid: tuple[int, int] | None
    layers: tuple[tuple[int, int], ...]
    head: int
    depth: int


def measure(seams: Seams) -> ModelShape:
    """Read a model's shape off its linear layers, whatever wraps or quantises their weights."""
    block = seams.blocks[0]
    block_attention = getattr(block, seams.block_attention)
    config: Any = seams.language_model.config
    whole, depth = seams.full_attention_blocks, len(seams.blocks)
    total = depth + seams.unread_blocks
    spans = [None if i in whole or i >= depth else seams.window_patches for i in range(total)]
    unit, regrid = seams.merge_size**2, None
    unit_tokens = [unit] * total
    if seams.regrid is not None and seams.regrid.block >= 0:
        for number in range(seams.regrid.block + 1, total):
            unit_tokens[number] = unit // 4
        regrid = (seams.regrid.block, _regrid_weights(seams.regrid.module, _width(block_attention), unit))
    layers = []
    for number, layer in enumerate(seams.layers):
        attends = number in seams.scoring_layers
        width = _width(getattr(layer, seams.layer_attention)) if attends else 0
        layers.append((_weights(layer) + _expert_weights(layer, config), width))
    return ModelShape(
        embed=sum(m.weight.numel() for m in seams.tower.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))),
        block_attention=_weights(block_attention),
        block_ffn=_weights(block) - _weights(block_attention),
        block_width=_width(block_attention),
        block_spans=tuple(spans),
        unit_tokens=tuple(unit_tokens),
        projectors=tuple((p.block, _weights(p.module)) for p in seams.projectors),
        regrid=regrid,
        layers=tuple(layers),
        head=config.hidden_size * config.vocab_size,
        depth=depth,
    )


def count_flops(
    plan: ModelPlan,
    shape: ModelShape,
    encoded: Sequence[tuple[SegmentSchedule, int]],
    rows: Sequence[tuple[int, Sequence[SegmentSchedule]]],
) -> Flops:
    """Operations of one prefill.

    Args:
        plan: whose layers merge.
        shape: of the model.
        encoded: every picture the encoder encodes, and the patches of its merge units.
        rows: per batch row, its text tokens and its pictures.
    """
    vision = Cost(0, 0)
    for schedule, unit in encoded:
        without: dict[int, int] = {}
        with_ = _after(schedule.vit)
        vision += Cost(_vision(shape, schedule, unit, without), _vision(shape, schedule, unit, with_))
    language = Cost(0, 0)
    for text, pictures in rows:
        full = text + sum(p.tokens for p in pictures)
        start = text + sum(p.encoder_tokens for p in pictures)
        after = {layer: text + sum(_after(p.llm)[layer] for p in pictures) for layer in plan.llm_layers}
        language += Cost(_language(shape, full, {}), _language(shape, start, after))
    return Flops(vision, language)


def _after(layers: Sequence[tuple[int, int, int]]) -> dict[int, int]:
    return {layer: out for layer, _, out in layers}


def _vision(shape: ModelShape, schedule: SegmentSchedule, unit: int, after: dict[int, int]) -> float:
    whole = units = schedule.tokens
    total = 2.0 * shape.embed * units * unit
    regrid = shape.regrid if unit == shape.unit_tokens[0] else None  # left out for units of another size
    unit_tokens = shape.unit_tokens if regrid else (unit,) * len(shape.unit_tokens)
    for number, (window, per_unit) in enumerate(zip(shape.block_spans, unit_tokens, strict=True)):
        tokens = units * per_unit
        span = tokens / schedule.frames
        if window is not None:
            span = min(span, window * units / whole)
        total += 2.0 * shape.block_attention * tokens + 4.0 * shape.block_width * tokens * span
        units = after.get(number, units)
        total += 2.0 * shape.block_ffn * units * per_unit
        if number + 1 == shape.depth:
            units = after.get(shape.depth, units)
        total += sum(2.0 * weights * units for block, weights in shape.projectors if block == number)
        if regrid is not None and regrid[0] == number:
            total += 2.0 * regrid[1] * units
    return total


def _language(shape: ModelShape, tokens: int, after: dict[int, int]) -> float:
    total = 2.0 * shape.head
    tokens = after.get(-1, tokens)
    for number, (weights, width) in enumerate(shape.layers):
        total += 2.0 * weights * tokens + 4.0 * width * tokens * (tokens + 1) / 2
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


def _expert_weights(layer: nn.Module, config: Any) -> int:
    """Weights of the experts a token meets; transformers stacks all experts of a layer.

    In 5.x those it is sent to; before, a model that is not being trained ran all of them on all tokens.
    """
    chosen = getattr(config, "num_experts_per_tok", None)
    if chosen is None:
        return 0
    import transformers

    if transformers.__version__.startswith("4.") and not layer.training:
        chosen = config.num_experts
    stacks = (p for m in layer.modules() if not isinstance(m, nn.Conv1d) for p in m.parameters(recurse=False))
    return sum(p[0].numel() * chosen for p in stacks if p.ndim == 3)


def _regrid_weights(module: nn.Module, width: int, unit_tokens: int) -> int:
    """Per unit: what reads single patches meets all of them, the rest only every fourth."""
    return sum(
        m.in_features * m.out_features * (unit_tokens if m.in_features == width else unit_tokens // 4)
        for m in _linear_layers(module)
    )


def _width(attention: nn.Module) -> int:
    """Channels of all heads together: what an attention's last layer, its output projection, takes."""
    return list(_linear_layers(attention))[-1].in_features
