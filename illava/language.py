"""One call of the language model: what survives each merging decoder layer. Touches no module.

Notation for tensor shapes: B rows, L tokens of this call at the caller's length, n slots held now,
K keys of a layer, S segments (pictures and videos), N their largest number of slots, H query heads,
D head size, d hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from illava import language_entry, merge, sequence
from illava.candidates import decide
from illava.families.seams import Additions, Seams
from illava.families.visual import VisualInput
from illava.language_layers import Layers, Rotary
from illava.language_stage import Stage
from illava.plan import name_of
from illava.rotary import rotation
from illava.schedule import ModelPlan
from illava.scores import Scores, attention_importance, slots_to_choose
from illava.tracing import LanguageTrace, record_merge
from illava.transfer import on


class LanguageCall:
    """State of one language model call.

    Args:
        plan: what to merge.
        seams: the model's parts.
        embeds: `[B, L, d]` tokens at the caller's length; rows the encoder merged away are -inf.
        visual: which tokens are visual; `None` when the call brings no picture.
        padding_mask: `[B, past + L]` the caller's 2-D attention mask, or `None`.
        past: tokens of the caller already in the cache.
        implementation: the attention implementation the user chose.
        plan_id: tells one handle's merges from another's in a cache.
        wanted: what the caller wants of every layer, `output_hidden_states` and `output_attentions`.
        prompt: the caller's position where the prompt of `generate` ends, if known. Behind it stand guesses
            of assisted decoding or, without a cache, the answer so far. They ask about no picture, or what
            survives would depend on them.
        traced: whether to write down what each merge does.
    """

    def __init__(
        self,
        plan: ModelPlan,
        seams: Seams,
        embeds: Tensor,
        visual: VisualInput | None,
        padding_mask: Tensor | None,
        past: int,
        implementation: str,
        plan_id: int,
        wanted: frozenset[str] = frozenset(),
        prompt: int | None = None,
        traced: bool = False,
    ) -> None:
        self.plan, self.settings = plan, plan.settings
        self.implementation, self.plan_id = implementation, plan_id
        self.scored_at = plan.scored_at
        self.wanted = wanted
        self.trace: LanguageTrace | None = None
        self.outputs: dict[int, Tensor] = {}
        self.additions: dict[int, Tensor] = {}
        self.visual, self.padding_mask, self.past = visual, padding_mask, past
        self.length, self.dtype = embeds.shape[1], embeds.dtype
        end = past + self.length
        self.asking_end = min(prompt, end) if prompt is not None and prompt > past else end
        self.depth, self.scorable = len(seams.layers), seams.scoring_layers
        self._config = seams.language_model.config
        self.outer: Any = None  # what was under way around it
        self.traceable = False  # whether merges can be operations of a compiled graph
        self.attending: int | None = None  # the layer whose attention a merge will read
        self.attended: dict[int, tuple[Tensor, Tensor, float]] = {}  # its queries and keys
        self._inputs: Tensor | None = None
        self.grids: Sequence[tuple[int, int, int]] = ()  # of each segment, as the report tells
        self.counts: list[list[int]] = []  # slots per segment, one entry per stage
        self._scores: dict[int, Scores] = {}
        self.removed: dict[int, list[int]] = {}
        self.merging: frozenset[int] = frozenset()  # layers after which something leaves
        self.scored: frozenset[int] = frozenset()  # layers whose attention they read
        rows = embeds.shape[0]
        if visual is None:
            self.unpadded = padding_mask is None or bool(padding_mask.all())
            self._lost_any = False
            place = torch.arange(self.length, device=embeds.device).expand(rows, -1)
            self.stages = [Stage(0, place + past, place, (self.length,) * rows)]
            return
        # Read now: an offloaded parameter is there only while its module runs.
        newline = None if seams.newline is None else getattr(seams.model, seams.newline)
        entry = language_entry.enter(embeds, visual, padding_mask, newline, past, self.asking_end, traced)
        self.stages, self.trace, self.entry_columns = [entry.stage], entry.trace, entry.columns
        self.unpadded, self._lost_any, self.broken = entry.unpadded, entry.lost_any, entry.broken
        self.tokens, self.counts, self.table = entry.tokens, [entry.counts], entry.table  # [S, N]
        self.segment_rows, self.has_later_text = entry.segment_rows, entry.has_later_text
        self._text, self._text_width = entry.text, entry.text_width  # [B, n]
        removed = [plan.llm_removed(t, a) for t, a in zip(entry.tokens, entry.counts, strict=True)]
        self.removed = {layer: [r[i] for r in removed] for i, layer in enumerate(plan.llm_layers)}
        self.merging = frozenset(layer for layer, counts in self.removed.items() if any(counts))
        self.scored = frozenset(self.scored_at[layer] for layer in self.merging if layer in self.scored_at)

    @property
    def changes_length(self) -> bool:
        """Whether a visual token is missing, or will be."""
        return self._lost_any or bool(self.merging)

    def stage(self, layer: int) -> Stage:
        """What `layer` is given."""
        return next(s for s in reversed(self.stages) if s.first_layer <= layer)

    def enter(self, x: Tensor) -> Tensor:
        """Drop what the encoder merged away: `[..., L, d]` to `[..., n, d]`."""
        return sequence.take_rows(x, self.entry_columns) if self.visual is not None else x

    def enter_features(self, embeds: Tensor) -> Tensor:
        """The same for token features; padding, which took the place of -inf rows, becomes zero."""
        features = self.enter(embeds)
        if not self.stages[0].ragged:
            return features
        return features.masked_fill(self.stages[0].positions[..., None] < 0, 0.0)

    def begin(self, cache: Any) -> None:
        """Before the first layer: the cache's layers are taken over, and what layers are given made ready."""
        rows = self.stages[0].row_lengths
        ahead = [(0, rows)]
        for layer in sorted(self.merging - {-1}):
            rows = self._rows_after(layer, rows)
            ahead.append((layer + 1, rows))
        self.layers = Layers(
            cache, ahead, self.stages[0].positions.device, self.depth, self.scorable,
            implementation=self.implementation, padding_mask=self.padding_mask, unpadded=self.unpadded,
            length=self.length, dtype=self.dtype, plan_id=None if self.visual is None else self.plan_id,
        )  # fmt: skip
        self.traceable = max(self.additions, default=-1) <= min(self.merging - {-1}, default=self.depth)
        try:
            self.layers.make_ready(self.stages[0], None)
        except BaseException:
            self.layers.end()
            raise

    def _rows_after(self, layer: int, rows: Sequence[int]) -> tuple[int, ...]:
        """What is left of rows of these lengths behind the merge after `layer`."""
        left = list(rows)
        for row, removed in zip(self.segment_rows, self.removed[layer], strict=True):
            left[row] -= removed
        return tuple(left)

    @torch.no_grad()
    def score(self, layer: int, rotary: Rotary) -> None:
        """Keep what merges read of a layer's attention, whose queries and keys have been seen.

        Args:
            rotary: cosines and sines of the stage under way, as a layer was given them.
        """
        q, k, scale = self.attended.pop(layer)  # [B, H, n, D], [B, K', K, D]
        stage = self.stages[-1]
        positions = self._key_positions(layer)
        slots = stage.positions.shape[1]
        self.table = self.table.to(q.device)
        lone = [s for s, later in enumerate(self.has_later_text) if not later]
        importance = attention_importance(  # [B, n]
            q, k, scale,
            k_positions=positions.to(q.device),
            asking_end=self.asking_end,
            score=name_of(self.settings.score or "attention"),
            queries=self.settings.queries,
            text=self._text.to(q.device),
            text_width=self._text_width,
            visual=self._slots_of(range(len(self.counts[-1]))) if self.settings.queries == "visual" else None,
            lone=self._slots_of(lone) if lone and self.settings.queries == "text" else None,
        )  # fmt: skip
        queries, keys = q.transpose(1, 2), k[:, :, -slots:].transpose(1, 2)  # [B, n, H, D]
        turned = rotation(rotary, self._config) if self.settings.by_function else None
        self._scores[layer] = Scores(importance, queries, keys, scale, (k, positions), turned)

    def _key_positions(self, layer: int) -> Tensor:
        """`[B, K]` positions of the keys `layer` attends to, the caller's padding marked -1."""
        positions = self.layers.key_positions(self.stage(layer), layer)
        return sequence.valid_positions(positions, self.padding_mask)

    @torch.no_grad()
    def _decide(self, layer: int, hidden: Tensor) -> merge.Merge:
        """Who survives a merge, and of what they are made, given `[B, n, d]`."""
        visual, device, counts = self.visual, self.table.device, self.counts[-1]
        if visual is None:
            raise RuntimeError("a merge in a call that brings no picture")
        stage, given = self.stages[-1], hidden if self._inputs is None else self._inputs
        positions = stage.positions.to(device)
        candidates = slots_to_choose(
            layer, self.table, counts, self.removed[layer], hidden.detach(),
            stage.slot_sizes().to(device),
            self._scores[self.scored_at[layer]] if layer in self.scored_at else None,
            positions, self._text.to(device), self._text_width,
            place=lambda: sequence.take_rows(
                on(device, sequence.visual_places(visual.segment, visual.tokens, self.grids)),
                (positions - self.past).clamp(min=0),
            ),
            inputs=lambda: sequence.take_rows(given.detach().to(device), stage.entry),
        )  # fmt: skip
        return decide(candidates, self.plan)

    def _slots_of(self, segments: Sequence[int]) -> Tensor:
        """`[B, n]` bool: the slots of these segments."""
        mask = torch.zeros_like(self.stages[-1].positions, dtype=torch.bool, device=self.table.device)
        own = torch.cat([self.table[s, : self.counts[-1][s]] for s in segments])
        return mask.view(-1).index_fill(0, own, True).view_as(mask)

    def take_additions(self, names: Additions, call: dict[str, Any]) -> dict[str, Any]:
        """Take over the features the model would add to the outputs of its first decoder layers.

        It would add them at the caller's length; instead they are kept as `[B, n, d]` per layer,
        zero for text, and added and merged with the layers' outputs.
        """
        places, features = call.get(names.places), call.get(names.features)
        if places is None or features is None:
            return call
        places = places.to(features[0].device)
        for layer, rows in enumerate(features):
            full = rows.new_zeros((*places.shape, rows.shape[-1]))  # [B, L, d]
            self.additions[layer] = self.enter_features(full.masked_scatter(places[..., None], rows))
        return call | {names.places: None, names.features: None}

    def merge_input(self, features: Tensor) -> Tensor:
        """Merge before the first layer: `[B, n, d]` to what that layer is given."""
        self._inputs = features.detach() if self.settings.by_function else None
        if -1 in self.merging:
            features = self.merge(-1, features)
            self._inputs = features.detach()
            stage = self.stages.pop()
            columns = self.entry_columns
            self.entry_columns = columns.gather(1, stage.entry.to(columns.device))
            places = torch.arange(stage.positions.shape[1], device=stage.entry.device)
            self.stages = [replace(stage, entry=places.expand_as(stage.entry), origin=None)]
        return features

    def add(self, layer: int, hidden: Tensor) -> Tensor:
        """What the model itself would add to `layer`'s output."""
        return hidden + self.additions[layer].to(hidden)

    def leave_layer(self, layer: int, hidden: Tensor, rotary: Rotary) -> Tensor:
        """Behind a merging layer: statistics, unless an earlier merge took them or none counts; the merge.

        Args:
            rotary: what the layer was given.
        """
        if (at := self.scored_at.get(layer)) in self.attended:
            self.score(at, rotary)
        hidden = self.merge(layer, hidden)
        stage = self.stages[-1]
        if stage.origin is None:
            raise RuntimeError(f"the merge after decoder layer {layer} does not say which slots it kept")
        cos, sin = (sequence.take_rows(x, stage.origin) for x in rotary)
        self.layers.make_ready(stage, (cos, sin))
        return hidden

    def merge(self, layer: int, hidden: Tensor) -> Tensor:
        """Merge after `layer`: `[B, n, d]` to `[B, n', d]`, padded on the left."""
        decision, stage = self._decide(layer, hidden), self.stages[-1]
        if self.trace is not None:
            self.trace.merges.append(record_merge(layer, self._names(stage), decision))
        rows = self._rows_after(layer, stage.row_lengths)
        batch, slots = stage.positions.shape
        width, device = max(rows), hidden.device  # layers may sit on different devices
        old = stage.positions.to(device)
        keep = decision.keep.view(batch, slots) & (old >= 0)
        index = merge.compact(keep, width)  # [B, n']
        kept = keep.gather(1, index)
        positions = old.gather(1, index).masked_fill(~kept, -1)
        entry = stage.entry.to(device).gather(1, index)
        sizes = None
        if decision.grows:
            grown = decision.grow(stage.slot_sizes().flatten().to(decision.keep.device))
            sizes = grown.view(batch, slots).to(device).gather(1, index)
        self.stages.append(Stage(layer + 1, positions, entry, rows, sizes, index))
        self._text = self._text.to(device).gather(1, index) & kept

        # A kept slot moves to its rank among its row's kept slots, counted from the right.
        rank = keep.long().cumsum(dim=1)
        column = rank - rank[:, -1:] + width - 1
        moved = column + torch.arange(batch, device=column.device)[:, None] * width
        self.table = moved.flatten()[decision.kept_table]
        self.counts.append(list(decision.kept_counts))

        at = self.scored_at.get(layer, layer)
        scores = self._scores.pop(at, None)
        if scores is not None and at in [
            self.scored_at.get(later) for later in self.removed if later > layer
        ]:
            self._scores[at] = scores.take(index)

        def apply(x: Tensor) -> Tensor:  # [B, n, d] to [B, n', d]
            blended = decision.blend(x.flatten(0, 1)).view(x.shape)
            return sequence.take_rows(blended, index)

        self.additions = {later: apply(x) for later, x in self.additions.items() if later > layer}
        return apply(hidden)

    def _names(self, stage: Stage) -> Tensor:
        """`[B, n]` what a trace calls each slot: its place in `[B, L]`, -1 for padding."""
        row = torch.arange(len(stage.positions), device=stage.positions.device)[:, None]
        return torch.where(stage.positions < 0, -1, stage.positions - self.past + row * self.length)

    def leave(self, x: Tensor, layer: int) -> Tensor:
        """The hidden states given to `layer`, back at the caller's length: `[B, L, d]`."""
        stage = self.stage(layer)
        if min(stage.row_lengths) == self.length:
            return x
        return sequence.expand_rows(x, stage.positions - self.past, self.length)

    def leave_weights(self, weights: Tensor | None, layer: int) -> Tensor | None:
        """`layer`'s attention weights, back at the caller's length: `[B, H, n, K]` to `[B, H, L, past + L]`.

        Nobody looks at a token merged away, and it looks at nobody: zero.
        """
        if weights is None:
            return None
        heads, queries = weights.shape[1:3]
        by_key = weights.permute(0, 3, 1, 2).flatten(2)  # [B, K, H*n]
        wide = sequence.expand_rows(by_key, self._key_positions(layer), self.past + self.length)
        wide = wide.unflatten(2, (heads, queries)).permute(0, 3, 2, 1)  # [B, n, H, past + L]
        full = sequence.expand_rows(wide.flatten(2), self.stage(layer).positions - self.past, self.length)
        return full.unflatten(2, (heads, -1)).transpose(1, 2)
