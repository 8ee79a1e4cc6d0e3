"""One call of the vision encoder: what survives each merging block. Touches no module.

Notation for tensor shapes: N tokens held now (packed), U units held now (U = N / g), g tokens per
unit, H heads, D head size, d hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from illava import merge
from illava.attention import (
    Spans,
    choose_backend,
    varlen_attention,
    varlen_attention_received,
    varlen_log_sum_exp,
)
from illava.families.seams import Seams
from illava.plan import ModelPlan, SegmentSchedule


@dataclass
class Stage:
    """What the encoder holds from one block on.

    Attributes:
        first_block: the first block that sees it.
        units: `[U]` the surviving units, numbered over the full packing, ascending.
        frame_counts: units of each frame, known on the host.
    """

    first_block: int
    units: Tensor
    frame_counts: tuple[int, ...]
    _memo: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def tokens(self, unit: int) -> Tensor:
        """`[N]` the surviving tokens, numbered over the full packing."""
        return (self.units[:, None] * unit + torch.arange(unit, device=self.units.device)).flatten()

    def select(self, x: Tensor, unit: int) -> Tensor:
        """Rows of survivors from something with a row per token of the full packing."""
        return self._once(x, lambda: x[self.tokens(unit).to(x.device)])

    def recount(self, cu_seqlens: Tensor, unit: int, total_units: int) -> Tensor:
        """Span boundaries by counting the survivors of each original span; empty spans go."""

        def count() -> Tensor:
            alive = torch.zeros(total_units + 1, dtype=torch.int32, device=self.units.device)
            alive[self.units + 1] = unit
            before = alive.cumsum(0, dtype=torch.int32).to(cu_seqlens.device)
            # Spans hold whole units: windows and frames are cut along them.
            return before[cu_seqlens.long() // unit].unique_consecutive().to(cu_seqlens.dtype)

        return self._once(cu_seqlens, count)

    def _once(self, source: Tensor, make) -> Tensor:  # type: ignore[no-untyped-def]
        """Every block is handed the same few tensors; each is shortened once per stage."""
        if id(source) not in self._memo:
            self._memo[id(source)] = (source, make())  # holding the source keeps its id its own
        return self._memo[id(source)][1]


@dataclass(frozen=True)
class EncoderRecord:
    """What is remembered of an encoder call for the report.

    Attributes:
        grids: `(frames, height, width)` in patches per picture.
        schedules: what the plan did to each.
        backend: the kernel that gave the attention statistics, `None` where nothing merged.
    """

    grids: list[tuple[int, int, int]]
    schedules: list[SegmentSchedule]
    backend: str | None


class VisionCall:
    """State of one encoder call.

    Args:
        plan: what to merge.
        seams: the model's parts.
        grids: `(frames, height, width)` in patches per picture.
        device: of the pixels.
        implementation: the attention implementation the user chose.
    """

    def __init__(
        self,
        plan: ModelPlan,
        seams: Seams,
        grids: list[tuple[int, int, int]],
        device: torch.device,
        implementation: str,
    ) -> None:
        self.settings, self.seams, self.unit = plan.settings, seams, seams.unit_patches
        self.grids = grids
        self.schedules: list[SegmentSchedule] = plan.schedule(grids)
        frames = [s.tokens // s.frames for s in self.schedules for _ in range(s.frames)]
        self.total_units = sum(frames)
        per_size = {size: plan.vit_removed(size) for size in set(frames)}
        self.removed = {
            block: tuple(per_size[size][i] for size in frames) for i, block in enumerate(plan.vit_layers)
        }
        self.implementation = implementation
        self.backend: str | None = None
        self.stages = [Stage(0, torch.arange(self.total_units, device=device), tuple(frames))]
        self.attending: int | None = None
        self.merged: dict[int, Tensor] = {}
        self._spans: Spans | None = None
        self._decisions: dict[int, merge.Merge] = {}

    def record(self) -> EncoderRecord:
        return EncoderRecord(self.grids, self.schedules, self.backend)

    @property
    def removes(self) -> bool:
        return any(any(counts) for counts in self.removed.values())

    def merges_at(self, block: int) -> bool:
        return any(self.removed.get(block, ()))

    def stage(self, block: int) -> Stage:
        """What `block` is given."""
        return next(s for s in reversed(self.stages) if s.first_block <= block)

    def begin_attention(self, block: int, cu_seqlens: Tensor) -> None:
        """Announce that `block`'s attention runs next; it is handed all its spans at once."""
        counts = self.stage(block).frame_counts
        if block in self.seams.full_attention_blocks:
            self._spans = Spans.from_lengths([n * self.unit for n in counts], cu_seqlens.device)
        else:
            self._spans = Spans.from_cu_seqlens(cu_seqlens)
        self.attending = block

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attention of a merging block, `[N, H, D]` in and out; decides its merge on the way."""
        block, spans = self.attending, self._spans
        if block is None or spans is None:
            raise RuntimeError("attend() without begin_attention()")
        self.backend = choose_backend(self.implementation, q.device, q.dtype)
        out, lse = varlen_attention(q, k, v, spans, scale=scale, backend=self.backend)
        with torch.no_grad():
            self._decisions[block] = self._decide(block, q.detach(), k.detach(), lse.detach(), spans, scale)
        return out

    def _decide(
        self, block: int, q: Tensor, k: Tensor, lse: Tensor, spans: Spans, scale: float
    ) -> merge.Merge:
        counts = self.stage(block).frame_counts
        windowed = block not in self.seams.full_attention_blocks
        if windowed and self.settings.window_score == "picture":
            spans = Spans.from_lengths([n * self.unit for n in counts], q.device)
            lse = varlen_log_sum_exp(q, k, spans, scale=scale)
        if self.settings.score == "lse":
            tokens = lse.mean(dim=1)  # [N]
        else:
            tokens = varlen_attention_received(q, k, lse, spans, scale=scale)
        importance = tokens.view(-1, self.unit).mean(dim=1)  # [U]
        starts = torch.tensor([0, *counts[:-1]], device=q.device).cumsum(0)[:, None]
        index = (starts + torch.arange(max(counts), device=q.device)).clamp(max=sum(counts) - 1)
        return merge.select(
            importance[index],
            index,
            counts,
            [n - r for n, r in zip(counts, self.removed[block], strict=True)],
            total_units=sum(counts),
            rule=self.settings.merge,
            recycled_share=self.settings.recycled,
            members=self.settings.members,
            queries=q.unflatten(0, (-1, self.unit)),  # [U, g, H, D]
            keys=k.unflatten(0, (-1, self.unit)),
            scale=scale,
        )

    def merge(self, block: int, hidden: Tensor) -> Tensor:
        """Apply `block`'s decision to `[N, d]`; later blocks are given the survivors."""
        decision, stage = self._decisions.pop(block), self.stage(block)
        counts = tuple(n - r for n, r in zip(stage.frame_counts, self.removed[block], strict=True))
        kept = merge.compact(decision.keep[None], sum(counts))[0]  # [U'] ascending
        units = decision.blend(hidden.unflatten(0, (-1, self.unit)))  # [U, g, d]
        self.stages.append(Stage(block + 1, stage.units[kept.to(stage.units.device)], counts))
        self.merged[block] = units[kept].flatten(0, 1)  # [N', d]
        return self.merged[block]

    def full_grid(self, rows: Tensor, per_unit: int, block: int | None = None) -> Tensor:
        """Put survivors back at the full length; rows of units merged away are -inf.

        No encoder writes -inf in every feature of a token, so the mark travels with the features
        through whatever the caller does with them: stacking, slicing, repeating for beams.

        Args:
            rows: `[U * per_unit, d]` survivors that `block` is given; `None` for the last ones.
            per_unit: rows per unit, 1 after the projector.
        """
        stage = self.stages[-1] if block is None else self.stage(block)
        place = stage.tokens(per_unit).to(rows.device)
        full = rows.new_full((self.total_units * per_unit, rows.shape[1]), float("-inf"))
        return full.index_copy(0, place, rows)


def is_dead(features: Tensor) -> Tensor:
    """Which tokens were merged away in the encoder: `[..., d]` to `[...]` bool."""
    return torch.isneginf(features).all(dim=-1)
