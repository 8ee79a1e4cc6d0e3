"""One call of the vision encoder: what survives each merging block. Touches no module.

Notation for tensor shapes: N tokens held now (packed), U units held now, g tokens per unit, H heads,
D head size, d hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from illava import merge
from illava.attention import Choices, Spans, span_attention, varlen_attention, varlen_log_sum_exp
from illava.candidates import Candidates, decide
from illava.families.layout import Layout
from illava.families.seams import Seams
from illava.schedule import ModelPlan, SegmentSchedule
from illava.tracing import EncoderTrace, record_merge
from illava.transfer import on
from illava.vision_scores import BlockAttention, weigh
from illava.vision_stage import BlockInputs, Stage


@dataclass(frozen=True)
class EncoderRecord:
    """What is remembered of an encoder call for the report.

    Attributes:
        grids: `(frames, height, width)` in patches per picture or tile.
        schedules: what the plan did to each, counted in merge units.
        backend: the kernel that gave the attention statistics, `None` where nothing merged.
        unit_tokens: patches of a merge unit.
        finite: for each merging block, whether the attention it saw was finite; on the device, read
            only where something went wrong.
        packed: filled in by a model's packing: tiles of each picture, and visual tokens made of them.
        trace: its merges, where they are traced.
    """

    grids: tuple[tuple[int, int, int], ...]
    schedules: list[SegmentSchedule]
    backend: str | None
    unit_tokens: int
    finite: dict[int, Tensor] = field(default_factory=dict)
    packed: list[tuple[int, int]] = field(default_factory=list)
    trace: EncoderTrace | None = None


class VisionCall:
    """State of one encoder call.

    Args:
        plan: what to merge.
        seams: the model's parts.
        layout: of the call's tokens.
        device: of the pixels.
        implementation: the attention implementation the user chose.
        records: whether the caller wants every block's output.
        traced: whether to write down what each merge does.
        choices: how attention statistics are computed.
        plan_id: tells one handle's calls from another's.
    """

    def __init__(
        self,
        plan: ModelPlan,
        seams: Seams,
        layout: Layout,
        device: torch.device,
        implementation: str,
        records: bool = False,
        traced: bool = False,
        choices: Choices | None = None,
        plan_id: int = -1,
    ) -> None:
        self._choices = Choices() if choices is None else choices
        self.plan, self.settings = plan, plan.settings
        self.layout, self.depth = layout, plan.vit_depth
        # Not `seams`: a call that was interrupted waits in its thread's context, and must not keep the model.
        self.full_attention_blocks, self.dead_rows = seams.full_attention_blocks, seams.dead_rows
        self.window_patches = seams.window_patches
        sides = [layout.frame_units[i] for i in _first_frames(layout.grids)]
        self.schedules: list[SegmentSchedule] = [
            plan.segment(t, units) for (t, _, _), units in zip(layout.grids, sides, strict=True)
        ]
        per_size = {size: plan.vit_removed(size) for size in set(layout.frame_units)}
        self.removed = {
            block: tuple(per_size[size][i] for size in layout.frame_units)
            for i, block in enumerate(plan.vit_layers)
        }
        self.merging = frozenset(block for block, counts in self.removed.items() if any(counts))
        # Blocks whose attention a merge looks at: a merge at the output of the last block reads that block's.
        self.scoring = frozenset(min(block, self.depth - 1) for block in self.merging)
        self.by_attention = self.settings.vit_rule != "bipartite"  # or nobody reads queries and keys
        # Blocks whose attention is illava's. Where tokens attract attention by what they stand for, they do
        # in all blocks of the plan, whether or not a picture beside them is large enough to lose some there.
        weighed = self.removed if plan.proportional and self.merging else ()
        self.own_attention = self.scoring | {min(block, self.depth - 1) for block in weighed}
        self.plan_id, self.padded = plan_id, layout.padded
        self.outer: Any = None  # what was under way around it
        self.now: BlockInputs | None = None  # of the stage under way; `None` for the first
        # Whether what follows can be operations of a compiled graph, and their output sizes (`_foresee`).
        self.traceable = not layout.padded and seams.regrid is None
        self.sizes: dict[int, Tensor] = {}
        self.implementation = implementation
        self.backend: str | None = None
        units, tokens, members = (
            on(device, x) for x in (torch.arange(layout.total_units), layout.tokens(), layout.members())
        )
        self.stages = [Stage(0, layout, units, tokens, members, layout.frame_units)]
        self._foresee()
        self.attending: int | None = None
        self.bounds: Tensor | None = None  # of the spans the attending block was given
        self.merged: dict[int, Tensor] = {}
        self.observed: dict[str, Tensor] = {}
        self.outputs: dict[int, Tensor] | None = {} if records else None
        self.trace = EncoderTrace(layout) if traced else None
        self._spans: Spans | None = None
        self._seen: dict[int, BlockAttention] = {}
        self._finite: dict[int, Tensor] = {}

    def _foresee(self) -> None:
        """Sizes after each merge, as the shape of a tensor without elements, which torch.compile lets
        vary: tokens, tokens of the full grid and one more, rows and their width."""
        counts, layout = self.stages[0].frame_counts, self.layout
        for block in sorted(self.merging):
            counts = tuple(n - r for n, r in zip(counts, self.removed[block], strict=True))
            lengths = [layout.prefix + n * layout.unit_tokens for n in counts]
            rows = (1, sum(lengths)) if layout.row_tokens is None else (len(lengths), max(lengths))
            self.sizes[block] = torch.empty(
                (sum(lengths), layout.total_tokens + 1, *rows, 0), dtype=torch.int32
            )

    @cached_property
    def record(self) -> EncoderRecord:
        """Of the finished call."""
        return EncoderRecord(
            self.layout.grids, self.schedules, self.backend, self.layout.unit_tokens, self._finite,
            trace=self.trace,
        )  # fmt: skip

    @property
    def removes(self) -> bool:
        return bool(self.merging)

    def stage(self, block: int) -> Stage:
        """What `block` is given."""
        return next(s for s in reversed(self.stages) if s.first_block <= block)

    def begin_attention(self, block: int, cu_seqlens: Tensor | None) -> None:
        """Announce that `block`'s attention runs next; it is handed all its spans at once."""
        stage = self.stage(block)
        if cu_seqlens is None or block in self.full_attention_blocks:
            cu_seqlens = None
        self._spans = stage.spans(cu_seqlens, self.window_patches)
        self.attending = block

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """A block's attention, `[rows, width, H, D]` in and out; decides its merge on the way."""
        block, spans = self.attending, self._spans
        if block is None or spans is None:
            raise RuntimeError("attend() without begin_attention()")
        stage = self.stage(block)
        q, k, v = stage.pack(q), stage.pack(k), stage.pack(v)  # [N, H, D]
        if block not in self.own_attention:
            eager = self.implementation == "eager"
            return stage.unpack(span_attention(q, k, v, spans, scale=scale, eager=eager))
        self.backend = self._choices(self.implementation, q.device, q.dtype).kernel
        channels = v.shape[-1]
        if self.plan.proportional and stage.sizes is not None:
            q, k, v = weigh(q, k, v, stage.token_sizes(q.device), scale)
        out, lse = varlen_attention(q, k, v, spans, scale=scale, backend=self.backend)
        self._keep(block, q.detach(), k.detach(), lse.detach(), spans, scale, channels)
        return stage.unpack(out[..., :channels])

    def decide_observed(self, q: Tensor, k: Tensor, scale: float) -> None:
        """Decide the attending block's merge from `[rows, width, H, D]`, its attention done elsewhere."""
        block, spans = self.attending, self._spans
        if block is None or spans is None:
            raise RuntimeError("decide_observed() without begin_attention()")
        stage = self.stage(block)
        q, k = stage.pack(q), stage.pack(k)  # [N, H, D]
        self.backend = "blocks"
        if not self.by_attention:
            self._finite[block] = q.isfinite().all() & k.isfinite().all()
            return
        self._keep(block, q, k, varlen_log_sum_exp(q, k, spans, scale=scale), spans, scale, q.shape[-1])

    def _keep(
        self, block: int, q: Tensor, k: Tensor, lse: Tensor, spans: Spans, scale: float, channels: int
    ) -> None:
        """Keep `block`'s attention for the merge that reads it, if one does."""
        if block not in self.scoring:
            return
        self._finite[block] = lse.isfinite().all()
        if not self.by_attention:
            return
        if self.settings.window_score == "picture" and block not in self.full_attention_blocks:
            spans = Spans.from_lengths(self.stage(block).frame_tokens, q.device)
            lse = varlen_log_sum_exp(q, k, spans, scale=scale)
        self._seen[block] = BlockAttention(q, k, lse, spans, scale, channels)

    @torch.no_grad()
    def _decide(self, block: int, features: Tensor) -> merge.Merge:
        """Who survives a merge, and of what they are made, given `[U, g, d]`."""
        seen = self._seen.pop(min(block, self.depth - 1), None)
        stage, device = self.stage(block), features.device
        counts = stage.frame_counts
        starts = on(device, [*accumulate(counts, initial=0)][:-1])[:, None]
        index = (starts + torch.arange(max(counts), device=device)).clamp(max=sum(counts) - 1)
        candidates = Candidates(
            "vit", block, index, counts,
            tuple(n - r for n, r in zip(counts, self.removed[block], strict=True)),
            features.detach(),
            stage.unit_sizes(device),
            _place=lambda: on(device, self.layout.places)[stage.units.to(device)],
            **({} if seen is None else seen.of_units(stage, self.settings.score == "lse")),
        )  # fmt: skip
        return decide(candidates, self.plan)

    def merge(self, block: int, hidden: Tensor) -> Tensor:
        """Apply `block`'s decision to `[N, d]` or `[rows, width, d]`; later blocks get the survivors."""
        stage, removed = self.stage(block), self.removed[block]
        flat = stage.pack(hidden) if hidden.ndim == 3 else hidden  # [N, d]
        features = stage.by_unit(flat)  # [U, g, d]
        decision = self._decide(block, features)
        if self.trace is not None:
            self.trace.merges.append(record_merge(block, stage.units, decision))
        counts = tuple(n - r for n, r in zip(stage.frame_counts, removed, strict=True))
        keep = decision.keep.to(stage.units.device)  # [U]
        kept = merge.compact(keep[None], sum(counts))[0]  # [U'] ascending
        if stage.layout.consecutive:
            tokens = stage.by_unit(stage.tokens)[kept].flatten()  # [N']
            members = torch.arange(len(tokens), device=tokens.device).view(-1, stage.layout.unit_tokens)
        else:
            alive = torch.ones_like(stage.tokens, dtype=torch.bool)
            alive[stage.members] = keep[:, None]
            number = len(stage.tokens) - sum(removed) * stage.layout.unit_tokens
            kept_tokens = merge.compact(alive[None], number)[0]  # [N'] places among the old survivors
            tokens = stage.tokens[kept_tokens]
            rank = alive.long().cumsum(0) - 1
            members = rank[stage.members[kept]]  # [U', g] places among the new ones
        after = Stage(min(block + 1, self.depth), stage.layout, stage.units[kept], tokens, members, counts)
        if decision.grows:
            after.sizes = decision.grow(stage.unit_sizes(keep.device))[kept]
        self.stages.append(after)
        self.now = after.block_inputs()

        units = decision.blend(features)  # [U, g, d]
        rows = units[kept.to(flat.device)].flatten(0, 1)  # [U' * g, d]
        if not stage.layout.consecutive:  # tokens of no unit stay, and units' tokens go where they stand
            places = members.flatten().to(flat.device)
            rows = flat[kept_tokens.to(flat.device)].index_copy(0, places, rows)
        self.merged[block] = after.unpack(rows) if hidden.ndim == 3 else rows
        return self.merged[block]

    def enter_regrid(self, block: int) -> Tensor:
        """The module after `block` joins 2 x 2 patches: the survivors' windows, `[W, 2, 2]`.

        Windows come in raster order of the halved grid; their patches as places among the survivors.
        """
        stage = self.stage(block + 1)
        side, layout = stage.layout.side // 2, stage.layout.halved()
        # [U, side, 2, side, 2] to [U, windows, 2, 2]
        windows = stage.members.unflatten(1, (side, 2, side, 2)).transpose(2, 3).flatten(1, 2)
        tokens = on(stage.units.device, layout.members())[stage.units]  # [U, windows] over the halved grid
        order = tokens.flatten().argsort()
        members = torch.empty_like(order).index_copy(0, order, torch.arange(len(order), device=order.device))
        self.stages.append(
            Stage(
                block + 1, layout, stage.units, tokens.flatten()[order], members.view_as(tokens),
                stage.frame_counts, regrids=True, sizes=stage.sizes,
            )
        )  # fmt: skip
        self.now = self.stages[-1].block_inputs()
        return windows.flatten(0, 1)[order]

    def full_grid(self, x: Tensor, stage: Stage) -> Tensor:
        """Put a stage's tokens back at the full length; those merged away hold `dead_rows`.

        Args:
            x: `[N, d]` or `[rows, width, d]`.
        """
        rows = stage.pack(x) if x.ndim == 3 else x  # [N, d]
        full = rows.new_full((stage.layout.total_tokens, rows.shape[1]), self.dead_rows)
        full = full.index_copy(0, stage.tokens.to(rows.device), rows)
        if x.ndim == 2:
            return full
        return full.unflatten(0, (1 if stage.layout.row_tokens is None else x.shape[0], -1))

    def full_hidden_states(self, hidden_states: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """The same for the input of the first block and every block's output."""
        seen = list(hidden_states)
        for block, merged in (self.outputs or {}).items():
            if seen[block + 1] is not None:
                seen[block + 1] = merged  # 4.57 records what a block returns before hooks see it
        full: list[Tensor | None] = []
        for block, x in enumerate(seen, start=-1):
            stage = next(s for s in reversed(self.stages) if s.first_block + s.regrids <= block + 1)
            full.append(x if x is None or stage.first_block == 0 else self.full_grid(x, stage))
        return tuple(full)

    def forget(self) -> None:
        """Let go of what only the blocks needed."""
        for stage in self.stages:
            stage.forget()
        self.now = None
        self.merged.clear()
        self.outputs = None


def _first_frames(grids: Sequence[tuple[int, int, int]]) -> list[int]:
    """The number of each picture's first frame."""
    return [0, *accumulate(t for t, _, _ in grids)][:-1]


def is_dead(features: Tensor) -> Tensor:
    """Which tokens were merged away in the encoder: `[..., d]` to `[...]` bool."""
    return torch.isneginf(features.amax(dim=-1))  # a NaN in the row is its largest


def is_broken(features: Tensor) -> Tensor:
    """Which tokens hold NaN or infinite features without being marked as merged away."""
    low, high = features.amin(dim=-1), features.amax(dim=-1)
    return ~(low.isfinite() & high.isfinite()) & ~torch.isneginf(high)
