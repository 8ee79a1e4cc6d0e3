"""What the decoder layers of one call are given, stage by stage: masks, rotary embeddings, cache layers.

A *stage* lasts from one merge to the next. How long its rows are is known before the first layer runs, which
of their slots survive is not: all that follows from lengths is laid out at once, the rest when the stage
begins.

Notation for tensor shapes: B rows, n slots of a stage, K keys of a layer, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from illava import sequence
from illava.language_stage import Stage

# Cosine and sine of the positions, as decoder layers are given them: `[B, n, D]`, 4.57 `[3, B, n, D]`.
Rotary = tuple[Tensor, Tensor]


@dataclass
class LayerInputs:
    """What a stage's decoder layers are given in place of what the model would give them.

    Made where the stage begins: a layer's own hook only hands it over, which torch.compile can trace.

    Attributes:
        masks: the attention masks its layers share, by `Layers.mask_of`.
        rotary: `None` where the model's own fits.
    """

    masks: list[Tensor | None]
    rotary: Rotary | None


@dataclass
class Coming:
    """A stage as far as the host knows it before the first layer runs.

    Attributes:
        first_layer, row_lengths: as in `Stage`.
        width: slots per row.
        masks: of each mask its layers share, one of these layers.
        forms: likewise its form as `sequence.attention_mask` has it, "" for none.
        sizes: the width, and each mask's keys, as the shape of a tensor without elements: torch.compile
            guards on numbers in Python, and compiles anew for others; sizes of tensors it lets vary.
    """

    first_layer: int
    row_lengths: tuple[int, ...]
    width: int
    masks: list[int]
    forms: list[str]
    sizes: Tensor

    @property
    def ragged(self) -> bool:
        return min(self.row_lengths) < self.width


class Layers:
    """The layers of one call.

    Args:
        cache: of the call, whose layers become `MergedLayer`s; or `None`.
        ahead: first layer and row lengths of every stage.
        device: where the call's positions are.
        depth: how many layers there are; `scorable` those with softmax attention.
        implementation: of their attention.
        padding_mask: `[B, past + L]` the caller's 2-D attention mask, or `None`.
        unpadded: whether it masks nothing.
        length: of the caller's call.
        dtype: of hidden states.
        plan_id: tells one handle's merges from another's in a cache; `None` for a call that merges nothing.

    Attributes:
        coming: the stages.
        now: what layers of the stage under way are given.
        stage_of, mask_of: per layer, its stage and its mask among the stage's.
    """

    def __init__(
        self,
        cache: Any,
        ahead: Sequence[tuple[int, tuple[int, ...]]],
        device: torch.device,
        depth: int,
        scorable: frozenset[int],
        *,
        implementation: str,
        padding_mask: Tensor | None,
        unpadded: bool,
        length: int,
        dtype: torch.dtype,
        plan_id: int | None,
    ) -> None:
        self._implementation, self._padding_mask, self._unpadded = implementation, padding_mask, unpadded
        self._length, self._dtype, self._scorable, self._plan_id = length, dtype, scorable, plan_id
        self.coming: list[Coming] = []
        self.now = LayerInputs([], None)
        self.stage_of: list[int] = []
        self.mask_of: list[int] = []
        self._caches: dict[int, sequence.MergedLayer] = {}
        self._promised: dict[int, sequence.Held] = {}  # what they will hold after this call
        if cache is not None:
            for layer in sorted(scorable):
                self._caches[layer] = sequence.cache_layer(cache, layer, len(ahead[0][1]), device)
        ends = [*(first for first, _ in ahead[1:]), depth]
        try:
            for (first, rows), end in zip(ahead, ends, strict=True):
                self._foresee(first, end, rows)
        except BaseException:
            self.end()
            raise

    def _foresee(self, first: int, end: int, rows: tuple[int, ...]) -> None:
        """Lay out the stage of the layers from `first` up to `end`; tell their caches what will come."""
        coming = Coming(first, rows, max(rows), [], [], torch.empty(0))
        mark = None if self._plan_id is None else (self._plan_id, first)
        known: dict[Any, int] = {}
        sizes = [coming.width]
        for layer in range(first, end):
            cached = self._caches.get(layer)
            kind = None if layer not in self._scorable else () if cached is None else cached.history
            if kind not in known:
                known[kind] = len(known)
                keys, form = self._mask_needed(layer, coming)
                sizes.append(keys)
                coming.masks.append(layer)
                coming.forms.append(form)
            self.mask_of.append(known[kind])
            self.stage_of.append(len(self.coming))
            if cached is not None:
                self._promised[layer] = cached.expect(None, self._length, coming.ragged, mark)
        coming.sizes = torch.empty((*sizes, 0), dtype=torch.int32)
        self.coming.append(coming)

    def _mask_needed(self, layer: int, coming: Coming) -> tuple[int, str]:
        """For how many keys, and in which form."""
        held, unpadded = 0, self._unpadded and not coming.ragged
        if layer not in self._scorable:  # linear attention only asks which slots are real
            return coming.width, "" if self._length == 1 or unpadded else "flash"
        if (cached := self._caches.get(layer)) is not None and cached.positions is not None:
            held, unpadded = cached.positions.shape[1], unpadded and not cached.ragged
        keys = held + coming.width
        needed = sequence.needs_mask(self._implementation, coming.width, keys, unpadded)
        return keys, self._implementation if needed else ""

    def make_ready(self, stage: Stage, rotary: Rotary | None) -> None:
        """A stage begins: what its layers are given, and where their caches' new keys stand."""
        number = self.stage_of[stage.first_layer] if stage.first_layer < len(self.stage_of) else -1
        coming = self.coming[number]
        for layer, at in enumerate(self.stage_of):
            if at == number and layer in self._promised:
                self._promised[layer].positions = self._caches[layer].followed_by(stage.positions)
        masks = [self._mask(stage, *of) for of in zip(coming.masks, coming.forms, strict=True)]
        self.now = LayerInputs(masks, rotary)

    def _mask(self, stage: Stage, layer: int, form: str) -> Tensor | None:
        if not form:
            return None
        keys = sequence.valid_positions(self.key_positions(stage, layer), self._padding_mask)
        return sequence.attention_mask(form, stage.positions, keys, unpadded=False, dtype=self._dtype)

    def key_positions(self, stage: Stage, layer: int) -> Tensor:
        """`[B, K]` of a layer's keys: what its cache will hold, or else the stage's own slots."""
        held = self._promised.get(layer)
        return stage.positions if held is None or held.positions is None else held.positions

    def end(self) -> None:
        """Also after an exception: no cache waits for what will not come."""
        for cached in self._caches.values():
            cached.withdraw()
