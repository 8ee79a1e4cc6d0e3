"""What is written down at the merges of a traced call, and how it is put together afterwards.

Nothing here runs unless `illava.patch(..., trace=True)` asked for it. Records hold small tensors on the
CPU; copying them there waits for the device.

Notation for tensor shapes: U units in all, Z sources in all, T visual tokens of a picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from illava.families.layout import Layout
from illava.merge import Merge
from illava.sparse import one_each, product, sparse


@dataclass(frozen=True, eq=False)
class MergeRecord:
    """One merge, in names that do not change from one to the next.

    Attributes:
        layer: the layer that merged.
        kept, recycled: names of the surviving units, and of those that took in others.
        sources: three tensors `[Z]`: the name of a surviving unit, of a unit before the merge that is in it,
            and the weight; a surviving unit's weights sum to 1, and where it took in none it is itself alone.
        ranked: names of the units that could be chosen, and `importance` by what.
    """

    layer: int
    kept: Tensor
    recycled: Tensor
    sources: tuple[Tensor, Tensor, Tensor]
    ranked: Tensor
    importance: Tensor


def record_merge(layer: int, names: Tensor, decision: Merge) -> MergeRecord:
    """Write down a decision.

    Args:
        layer: the layer that merges.
        names: `[U]` what each unit is called; negative for one that is none.
        decision: the merge.
    """
    names, keep = names.flatten().cpu(), decision.keep.cpu()
    index, importance = decision.index.cpu(), decision.importance.float().cpu()
    real = torch.arange(index.shape[1]) < torch.tensor(decision.counts)[:, None]  # [S, N]
    unit, source, weight = _sources(decision, keep)
    others = torch.bincount(unit[unit != source], minlength=len(names)) > 0
    recycled = others.nonzero().flatten() if decision.grows else decision.recycled.cpu()
    own = names[unit] >= 0
    return MergeRecord(
        layer,
        kept=names[keep & (names >= 0)],
        recycled=names[recycled],
        sources=(names[unit[own]], names[source[own]], weight[own]),
        ranked=names[index[real]],
        importance=importance[real],
    )


def _sources(decision: Merge, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`Merge.blend` as a sparse matrix: units, sources, weights."""
    if decision.owner is not None and decision.sizes is not None:
        owner, sizes = decision.owner.cpu(), decision.sizes.float().cpu()
        total = torch.zeros_like(sizes).index_add(0, owner, sizes)
        return owner, torch.arange(len(owner)), sizes / total[owner]
    if decision.mixture is None:
        weights, sources = decision.weights.cpu(), decision.sources.cpu()
        used = weights != 0
        unit, source, weight = (
            decision.recycled.cpu()[:, None].expand_as(sources)[used],
            sources[used],
            weights[used],
        )
        made = decision.recycled.cpu()
    else:
        index, table, weights = (x.cpu() for x in (decision.index, decision.kept_table, decision.mixture))
        segment, place, column = weights.nonzero(as_tuple=True)
        real = place < torch.tensor(decision.kept_counts)[segment]
        segment, place, column = segment[real], place[real], column[real]
        unit, source = table[segment, place], index[segment, column]
        weight = weights[segment, place, column]
        made = unit
    alone = keep.index_fill(0, made, False).nonzero().flatten()
    return torch.cat([alone, unit]), torch.cat([alone, source]), torch.cat([torch.ones(len(alone)), weight])


@dataclass(frozen=True, eq=False)
class EncoderTrace:
    """One encoder call: its merges, with units called by their number in the call.

    Attributes:
        layout: of the call's tokens.
        merges: in order.
        reads: where visual tokens are not the units themselves, for one group of frames after another
            the weights `[rows, units]`, sparse, with which packing, pooling or a resampler makes them; a
            row without weights is no visual token (a newline).
    """

    layout: Layout
    merges: list[MergeRecord] = field(default_factory=list)
    reads: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class LanguageTrace:
    """One language model call, with tokens called by their place in `[B, L]`.

    Attributes:
        length: B * L.
        tokens: of each segment the names of its visual tokens, ascending.
        alive: `[B * L]` bool, those that enter.
        merges: in order.
    """

    length: int
    tokens: list[Tensor]
    alive: Tensor
    merges: list[MergeRecord] = field(default_factory=list)

    @classmethod
    def entered(cls, segment: Tensor, segments: int, keep: Tensor) -> LanguageTrace:
        """Of a call that begins.

        Args:
            segment: `[B, L]` on the CPU, the segment of each visual token, -1 elsewhere.
            segments: how many there are.
            keep: `[B, L]` bool, who enters.
        """
        flat = segment.flatten()
        tokens = [(flat == number).nonzero().flatten() for number in range(segments)]
        return cls(len(flat), tokens, keep.flatten())


def follow(merges: Sequence[MergeRecord], number: int) -> Iterator[Tensor]:
    """After each merge, of which first units each unit is made: `[number, number]` by name, sparse."""
    sources = one_each(torch.arange(number), number)
    for merge in merges:
        unit, source, weight = merge.sources
        sources = product(sparse(unit, source, weight.double(), (number, number)), sources)
        yield sources
