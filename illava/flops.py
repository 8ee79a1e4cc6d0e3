"""Floating-point operations of a prefill, with and without merging: the bound on its speed-up.

Counted are the matrix products: linear layers (2 per weight and token) and attention (4 per query,
key and channel; half of the pairs under a causal mask). Windows are taken to lose tokens evenly.
Merging itself, norms and activations are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        return total.without / total.with_


def count_flops(
    plan: ModelPlan,
    seams: Seams,
    schedules: Sequence[SegmentSchedule],
    row_tokens: Sequence[tuple[int, Sequence[SegmentSchedule]]],
) -> Flops:
    """Operations of one prefill.

    Args:
        plan: whose layers merge.
        seams: the model.
        schedules: every picture the encoder encodes.
        row_tokens: per batch row, its text tokens and its pictures.
    """
    vision = Cost(0, 0)
    for schedule in schedules:
        vision += Cost(_vision(seams, schedule, {}), _vision(seams, schedule, dict(_outs(schedule.vit))))
    language = Cost(0, 0)
    for text, pictures in row_tokens:
        full = text + sum(p.tokens for p in pictures)
        start = text + sum(p.encoder_tokens for p in pictures)
        after: dict[int, int] = {}
        for layer in plan.llm_layers:
            after[layer] = text + sum(dict(_outs(p.llm))[layer] for p in pictures)
        language += Cost(_language(seams, full, {}), _language(seams, start, after))
    return Flops(vision, language)


def _outs(layers: Sequence[tuple[int, int, int]]) -> list[tuple[int, int]]:
    return [(layer, out) for layer, _, out in layers]


def _vision(seams: Seams, schedule: SegmentSchedule, after: dict[int, int]) -> float:
    unit, frames = seams.unit_patches, schedule.frames
    hidden = linear_weights(getattr(seams.blocks[0], seams.block_attention), outputs=True)
    tokens = schedule.tokens * unit
    total = 2.0 * conv_weights(seams.tower) * tokens
    for number, block in enumerate(seams.blocks):
        attention = getattr(block, seams.block_attention)
        span = tokens / frames
        if number not in seams.full_attention_blocks:
            alive = tokens / (schedule.tokens * unit)
            span = min(span, seams.window_patches * alive)
        total += 2.0 * linear_weights(attention) * tokens + 4.0 * hidden * tokens * span
        tokens = after.get(number, tokens // unit) * unit
        total += 2.0 * (linear_weights(block) - linear_weights(attention)) * tokens
    return total + 2.0 * linear_weights(seams.projector) * tokens / unit


def _language(seams: Seams, tokens: int, after: dict[int, int]) -> float:
    attention = getattr(seams.layers[0], seams.layer_attention)
    hidden = linear_weights(attention, outputs=True)
    config: Any = seams.language_model.config
    total = 2.0 * config.hidden_size * config.vocab_size
    for number, layer in enumerate(seams.layers):
        total += 2.0 * linear_weights(layer) * tokens + 4.0 * hidden * tokens * (tokens + 1) / 2
        tokens = after.get(number, tokens)
    return total


def linear_weights(module: nn.Module, *, outputs: bool = False) -> int:
    """Weights of a module's linear layers; with `outputs`, the input width of the last of them.

    The last linear layer of an attention module is its output projection, whose input is as wide
    as all heads together.
    """
    layers: list[Any] = [m for m in module.modules() if hasattr(m, "in_features")]
    layers = [m for m in layers if not any(c is not m and hasattr(c, "in_features") for c in m.modules())]
    return layers[-1].in_features if outputs else sum(m.in_features * m.out_features for m in layers)


def conv_weights(tower: nn.Module) -> int:
    """Weights of the patch embedding: one use per patch."""
    return sum(m.weight.numel() for m in tower.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d)))
