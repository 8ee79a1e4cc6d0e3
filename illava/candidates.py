"""What a method of your own is given: the units among which one merge chooses, and what is known of them.

A plan takes functions where it takes names. `score(candidates)` ranks: the highest are kept. A choice of
whole sets is a score too, high for those chosen. `merge(candidates, kept)` says of what each kept unit
is made. Both work on all segments at once, in tables padded at the end of each row; `real` tells.

Notation for tensor shapes: S segments, N units of the largest, P kept units of the largest, U units in all,
g tokens per unit, H query heads, K key heads, D head size, d hidden size, B rows, n slots of a row, T text
tokens of the row with most.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from illava import bipartite, merge
from illava.attention import streaming
from illava.errors import PlanError
from illava.rotary import unrotate
from illava.schedule import ModelPlan
from illava.transfer import on


@dataclass(frozen=True)
class Sequences:
    """The rows of a language model call that candidates stand in.

    Attributes:
        positions: `[B, n]` position of each slot, -1 for padding.
        text: `[B, n]` bool, the slots that are text; `text_width` their largest number in a row.
        keys: `[B, K, keys, D]` of the layer, those of a cache included, and their positions
            `[B, keys]`; `None` before the first layer.
        rotation: the cosines and sines `[B, n, D]` that turned the slots' queries and keys.
    """

    positions: Tensor
    text: Tensor
    text_width: int
    keys: tuple[Tensor, Tensor] | None = None
    rotation: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Candidates:
    """The units among which one merge chooses.

    Attributes:
        stage: `"vit"` or `"llm"`.
        layer: encoder block or decoder layer; the encoder's depth for its output, -1 for the language
            model's input.
        index: `[S, N]` where each segment's units stand among all `U`, ascending.
        counts, keep_counts: units of each segment now, and after the merge.
        features: `[U, g, d]` what is merged. In the encoder hidden states between attention and
            feed-forward network, in the language model behind the layer; there units are slots, those of
            text among them, row by row.
        sizes: `[U]` how many of the original units each stands for.
        queries, keys: `[U, g, H, D]` and `[U, g, K, D]` of the layer as they meet, `None` where none
            has run.
        scale: factor on their products.
        sequences: the rows they stand in, in the language model.
    """

    stage: str
    layer: int
    index: Tensor
    counts: tuple[int, ...]
    keep_counts: tuple[int, ...]
    features: Tensor
    sizes: Tensor
    queries: Tensor | None = None
    keys: Tensor | None = None
    scale: float = 1.0
    sequences: Sequences | None = None
    _attention: Callable[[], Tensor] | None = None
    _class_attention: Callable[[], Tensor] | None = None
    _place: Callable[[], Tensor] | None = None
    _inputs: Callable[[], Tensor] | None = None

    @cached_property
    def real(self) -> Tensor:
        """`[S, N]` bool, which entries of a table are units."""
        step = torch.arange(self.index.shape[1], device=self.index.device)
        return step < on(self.index.device, self.counts)[:, None]

    @cached_property
    def attention(self) -> Tensor:
        """`[S, N]` attention received, as the plan's `queries` and `window_score` say."""
        return self._table(self._attention, "attention")

    @cached_property
    def class_attention(self) -> Tensor | None:
        """`[S, N]` attention received from the class token; `None` where there is none."""
        return None if self._class_attention is None else self._class_attention()[self.index]

    @cached_property
    def place(self) -> Tensor:
        """`[S, N, 3]` frame or tile, row and column of each unit on its picture's grid of units.

        In the language model one long row where features came from the caller, or a family packs them.
        """
        return self._table(self._place, "grid of places")

    @cached_property
    def inputs(self) -> Tensor:
        """`[U, d]` what the language model was given at the slots that are left."""
        if self._inputs is None:
            raise PlanError(f"{self.stage} layer {self.layer} is given nothing by its caller")
        return self._inputs()

    @cached_property
    def text(self) -> tuple[Tensor, Tensor]:
        """The text that comes after each segment: `[S, T]` places among all `U`, and `[S, T]` bool, real."""
        inside = self._sequences()
        width = inside.positions.shape[1]
        columns = merge.compact(inside.text, inside.text_width)  # [B, T]
        real = inside.text.gather(1, columns)
        rows = self.index[:, 0] // width  # [S]
        places = columns[rows] + rows[:, None] * width
        last = self._positions(self.index).masked_fill(~self.real, -1).max(dim=1, keepdim=True).values
        return places, real[rows] & (self._positions(places) > last)

    def text_attention(self, asking: Tensor) -> Tensor:
        """`[S, N]` mean attention received from some of the text behind each segment.

        Args:
            asking: `[S, T]` bool, whose attention counts.
        """
        inside, (places, real) = self._sequences(), self.text
        if inside.keys is None or self.queries is None:
            raise PlanError(f"{self.stage} layer {self.layer}: nothing attends before the first layer")
        keys, positions = inside.keys
        slots = inside.positions.shape[1]
        rows = self.index[:, 0] // slots
        received = streaming.attention_received(
            self.queries[places, 0].transpose(1, 2),  # [S, H, T, D]
            keys[rows],
            scale=self.scale,
            q_positions=self._positions(places).masked_fill(~(asking & real), -1),
            k_positions=positions[rows],
            asked=slice(keys.shape[2] - slots, None),
        )  # [S, n]
        return received.gather(1, self.index % slots)

    @cached_property
    def unrotated(self) -> tuple[Tensor, Tensor]:
        """The language model's queries and keys before rotary embedding turned them."""
        inside = self._sequences()
        if inside.rotation is None or self.queries is None or self.keys is None:
            raise PlanError(f"{self.stage} layer {self.layer}: no rotary embedding has turned anything")
        cos, sin = (x.flatten(0, 1)[:, None, None] for x in inside.rotation)  # [U, 1, 1, D]
        return unrotate(self.queries, cos, sin), unrotate(self.keys, cos, sin)

    def _positions(self, places: Tensor) -> Tensor:
        return self._sequences().positions.flatten()[places]

    def _sequences(self) -> Sequences:
        if self.sequences is None:
            raise PlanError("the vision encoder has read no text; only scores of decoder layers know it")
        return self.sequences

    def _table(self, values: Callable[[], Tensor] | None, what: str) -> Tensor:
        return self._by_unit(values, what)[self.index]

    def _by_unit(self, values: Callable[[], Tensor] | None, what: str) -> Tensor:
        if values is None:
            raise PlanError(f"{self.stage} layer {self.layer} has no {what} to tell")
        return values()


Score = Callable[[Candidates], Tensor]
Rule = Callable[[Candidates, Tensor], Tensor]


def decide(candidates: Candidates, plan: ModelPlan) -> merge.Merge:
    """Select and group as a plan says, by name or by function.

    Raises:
        PlanError: a function returned something of another shape.
    """
    c, settings = candidates, plan.settings
    rule = settings.vit_rule if c.stage == "vit" else settings.merge
    if rule == "bipartite":
        grid = None
        if plan.distance_penalty:
            grid = c._by_unit(c._place, "grid of places").to(c.features.device)
        return bipartite.join(
            c.features, c.sizes, c.index, c.counts, c.keep_counts,
            distance_penalty=plan.distance_penalty, grid=grid,
        )  # fmt: skip
    importance = ranked(c, settings.score) if callable(settings.score) else c.attention
    return merge.select(
        importance,
        c.index,
        c.counts,
        c.keep_counts,
        total_units=len(c.sizes),
        rule=partial(weighted, c, rule) if callable(rule) else rule,
        recycled_share=settings.recycled,
        members=settings.members,
        queries=c.queries,
        keys=c.keys,
        scale=c.scale,
    )


def ranked(c: Candidates, score: Score) -> Tensor:
    """What a function gives as scores, `[S, N]`, checked."""
    scores = score(c)
    if not isinstance(scores, Tensor) or scores.shape != c.index.shape:
        raise PlanError(_wrong("score", score, "[segments, units]", tuple(c.index.shape), scores))
    return scores


def weighted(c: Candidates, rule: Rule, kept: Tensor) -> Tensor:
    """What a function gives as weights, `[S, P, N]`, checked; nothing is made of padding."""
    weights = rule(c, kept)
    shape = (*kept.shape, c.index.shape[1])
    if not isinstance(weights, Tensor) or weights.shape != shape:
        raise PlanError(_wrong("merge", rule, "[segments, kept, units]", shape, weights))
    return weights * c.real[:, None]


def _wrong(name: str, function: Any, meaning: str, shape: tuple[int, ...], given: Any) -> str:
    got = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
    called = getattr(function, "__name__", repr(function))
    return f"{name}={called} must return a tensor {meaning}, here {shape}; it returned {got}"
