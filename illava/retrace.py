"""Putting together, picture by picture, what a traced call has written down.

Notation for tensor shapes: V merge units of a picture in raster order, g patches of a unit, P patches,
T visual tokens before any merge, n tokens left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from illava.families.packing import TINY
from illava.origins import Encoded, Part, UnitsLeft, Unknown
from illava.provenance import GONE, INFORMATIVE, RECYCLED, Provenance, Step
from illava.sparse import diagonal, entries, one_each, product, reaches, row_counts, sparse, take
from illava.tracing import EncoderTrace, LanguageTrace, MergeRecord, follow


@dataclass(frozen=True, eq=False)
class TracedPicture:
    """One picture or video of a call.

    Attributes:
        kind, row: as its record has them.
        layers: stage and layer of every merging layer in order.
        origins: of each of its grids the encoder call, which of the call's frames is its first, and how
            many it has; none where its features came from the caller.
    """

    kind: str
    row: int
    layers: tuple[tuple[str, int], ...]
    origins: tuple[tuple[EncoderTrace, int, int], ...]


@dataclass(frozen=True, eq=False)
class Trace:
    """What one call has written down."""

    model_type: str
    language: LanguageTrace
    pictures: tuple[TracedPicture, ...]


def retrace(trace: Trace) -> tuple[Provenance, ...]:
    """Where the tokens of each picture came from."""
    language = trace.language
    sources = follow(language.merges, language.length)
    after = {record.layer: (record, x) for record, x in zip(language.merges, sources, strict=True)}
    encoded: dict[int, Encoded] = {}
    found = []
    for picture, names in zip(trace.pictures, language.tokens, strict=True):
        parts: list[Part | Unknown] = []
        for call, frame, frames in _joined(picture.origins):
            if id(call) not in encoded:
                encoded[id(call)] = Encoded(call)
            parts.append(Part(encoded[id(call)], frame, frames))
        seen = _Picture(parts or [Unknown(len(names))], names, language.alive)
        merges: list[Step] = []
        for stage, layer in picture.layers:
            if stage == "vit":
                merges.append(seen.in_encoder(layer))
            else:
                before = merges[-1] if merges and merges[-1].stage == "llm" else seen.entry
                merges.append(seen.in_language(layer, before, after.get(layer)))
        sizes = tuple(size for part in seen.parts for size in part.frames)
        found.append(
            Provenance(
                picture.kind, picture.row, trace.model_type, sizes, seen.parts[0].side, tuple(merges),
                seen.entry, known=bool(parts),
            )
        )  # fmt: skip
    return tuple(found)


def _joined(
    origins: Sequence[tuple[EncoderTrace, int, int]],
) -> list[tuple[EncoderTrace, int, int]]:
    """Grids one after another in one call as one: packing may make tokens of several of them."""
    joined: list[tuple[EncoderTrace, int, int]] = []
    for call, frame, frames in origins:
        if joined and joined[-1][0] is call and sum(joined[-1][1:]) == frame:
            joined[-1] = call, joined[-1][1], joined[-1][2] + frames
        else:
            joined.append((call, frame, frames))
    return joined


class _Picture:
    """One picture: its parts end to end, and what the language model was given of it.

    Args:
        parts: the grids it was encoded as.
        names: `[T]` what the language model's trace calls its tokens.
        alive: for each such name whether it entered.
    """

    def __init__(self, parts: Sequence[Part | Unknown], names: Tensor, alive: Tensor) -> None:
        self.parts, self.names, self.alive = parts, names, alive
        self.number = sum(len(p.patches) for p in parts)  # V
        starts = accumulate((p.patches.numel() for p in parts), initial=0)
        self.patches = torch.cat([p.patches + at for p, at in zip(parts, starts, strict=False)])  # [V, g]
        self.kept = torch.arange(self.number)
        self.itself = one_each(self.kept, self.number)
        self.units = self.itself  # [V, V] of which units each of those left is made

    def in_encoder(self, layer: int) -> Step:
        """The units after an encoder block has merged; blocks are asked in order."""
        left, start, merged = [], 0, False
        for part in self.parts:
            found, number = part.after(layer), len(part.patches)
            merged |= found is not None
            left.append((start, self._unchanged(start, number) if found is None else found))
            start += number
        self.kept = torch.cat([x.kept + at for at, x in left]).sort().values
        self.units = diagonal([x.sources for _, x in left])
        recycled = torch.cat([x.recycled + at for at, x in left])
        importance = torch.cat([x.importance for _, x in left]) if merged else None
        mixed = row_counts(self.units) > 1
        return self._step("vit", layer, self.kept, recycled, mixed, self.units, self.itself, importance)

    def _unchanged(self, start: int, number: int) -> UnitsLeft:
        """What is left of a part in whose call nothing merged."""
        own = torch.arange(start, start + number)
        kept = self.kept[torch.isin(self.kept, own)] - start
        return UnitsLeft(kept, kept[:0], take(self.units, own, own), torch.full((number,), float("nan")))

    @cached_property
    def stands(self) -> Tensor:
        """`[T, V]` of which units that are left each visual token is made; rows sum to 1 or are empty."""
        rows, columns, weights = entries(diagonal([part.reads for part in self.parts]))
        tokens = rows.unique()  # the other rows are newlines
        left = torch.isin(columns, self.kept)
        rows, columns, weights = torch.searchsorted(tokens, rows[left]), columns[left], weights[left]
        total = torch.zeros(len(tokens), dtype=weights.dtype).index_add(0, rows, weights)[rows]
        live = total >= TINY
        shares = weights[live] / total[live]
        return sparse(rows[live], columns[live], shares, (len(tokens), self.number))

    @cached_property
    def entry(self) -> Step:
        """What the language model was given."""
        tokens = self.alive[self.names].nonzero().flatten()
        mixed = reaches(self.stands, row_counts(self.units) > 1)
        return self._step("entry", -1, tokens, tokens[:0], mixed, self._entry_sources, self.stands)

    @cached_property
    def _entry_sources(self) -> Tensor:
        """`[T, V]` of which first units each visual token is made."""
        return product(self.stands, self.units)

    def in_language(self, layer: int, before: Step, merged: tuple[MergeRecord, Tensor] | None) -> Step:
        """The visual tokens after a decoder layer has merged.

        Args:
            layer: the layer.
            before: the step before.
            merged: its record, and of which tokens each of the call's is made; `None` where no picture
                of the call lost anything there.
        """
        if merged is None:
            state = torch.where(before.state == GONE, GONE, INFORMATIVE).to(torch.uint8)
            nobody = torch.zeros_like(before.recycled)
            return Step(
                "llm", layer, before.tokens, nobody, before.mixed, before.sources, before.stands, state
            )
        record, after = merged
        kept, recycled = (self._own(x) for x in (record.kept, record.recycled))
        own = torch.isin(record.ranked, self.names)
        importance = torch.full((len(self.names),), float("nan"))
        importance[self._own(record.ranked)] = record.importance[own]
        made = take(after, self.names, self.names)  # [T, T]
        was_mixed = torch.zeros(len(self.names), dtype=torch.bool)
        was_mixed[self.entry.tokens] = self.entry.mixed
        mixed = (row_counts(made) > 1) | reaches(made, was_mixed)
        sources = product(made, self._entry_sources)
        return self._step("llm", layer, kept.sort().values, recycled, mixed, sources, self.stands, importance)

    def _own(self, names: Tensor) -> Tensor:
        """The tokens behind those of some names that are its own, in their order."""
        return torch.searchsorted(self.names, names[torch.isin(names, self.names)])

    def _step(
        self,
        stage: str,
        layer: int,
        tokens: Tensor,
        recycled: Tensor,
        mixed: Tensor,
        sources: Tensor,
        stands: Tensor,
        importance: Tensor | None = None,
    ) -> Step:
        """Put into patches.

        Args:
            stage, layer, tokens: as in `Step`.
            recycled: those of the tokens that took in others.
            mixed, importance: `[T]`.
            sources, stands: `[T, V]` sparse, of which first units a token is made, and on which it stands.
        """
        rank = torch.zeros(stands.shape[0], dtype=torch.uint8)
        rank[tokens] = INFORMATIVE
        rank[recycled] = RECYCLED
        row, unit, _ = entries(stands)
        state = torch.zeros(self.number, dtype=torch.uint8).scatter_reduce(0, unit, rank[row], "amax")
        return Step(
            stage, layer, tokens, torch.isin(tokens, recycled), mixed[tokens],
            self._in_patches(take(sources, tokens)),
            self._in_patches(take(stands, tokens)),
            self._over_patches(state),
            None if importance is None else self._over_patches(_spread(stands, importance)),
        )  # fmt: skip

    def _over_patches(self, values: Tensor) -> Tensor:
        """`[V]` to `[P]`."""
        result = values.new_zeros(self.patches.numel())
        result[self.patches] = values[:, None].expand(self.patches.shape)
        return result

    def _in_patches(self, sources: Tensor) -> Tensor:
        """`[n, V]` to `[n, P]`, both sparse: a unit is each of its patches in equal parts."""
        (row, unit, weight), g = entries(sources), self.patches.shape[1]
        return sparse(
            row.repeat_interleave(g),
            self.patches[unit].flatten(),
            (weight / g).float().repeat_interleave(g),
            (sources.shape[0], self.patches.numel()),
        )


def _spread(stands: Tensor, values: Tensor) -> Tensor:
    """`[T]` values to `[V]`: the weighted mean of those standing on a unit, NaN where none does."""
    row, unit, weight = entries(stands)
    known = ~values[row].isnan()
    row, unit, weight = row[known], unit[known], weight[known].float()
    total, number = torch.zeros(2, stands.shape[1])
    return total.index_add(0, unit, weight * values[row]) / number.index_add(0, unit, weight)
