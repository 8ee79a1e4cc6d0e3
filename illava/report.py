"""What the last call did, in numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from illava.flops import Flops, ModelShape, count_flops
from illava.provenance import Provenance
from illava.retrace import Trace, TracedPicture, retrace
from illava.schedule import ModelPlan, SegmentSchedule

if TYPE_CHECKING:
    from illava.families.visual import VisualInput
    from illava.language import LanguageCall
    from illava.tracing import EncoderTrace
    from illava.vision import EncoderRecord


class Encoding(NamedTuple):
    """One grid of an encoder call: what the plan did to it, and the patches of its merge units.

    Attributes:
        trace: the call's, where calls are traced, and `frame`, which of its frames is the grid's first.
    """

    grid: tuple[int, int, int]
    schedule: SegmentSchedule
    unit_tokens: int
    trace: EncoderTrace | None
    frame: int


@dataclass(frozen=True)
class LayerRecord:
    """Visual tokens of one picture before and after one merging layer.

    Attributes:
        stage: `"vit"` or `"llm"`.
        layer: counted from 0; the encoder's depth for its output, -1 for the language model's input.
        tokens_in, tokens_out: visual tokens; in the encoder merge units, which in most families
            become one visual token each (see `PictureRecord.encoded_units`).
    """

    stage: str
    layer: int
    tokens_in: int
    tokens_out: int

    @property
    def tokens_removed(self) -> int:
        return self.tokens_in - self.tokens_out


@dataclass(frozen=True)
class PictureRecord:
    """What happened to one picture or video of one batch row.

    Attributes:
        kind: `"image"` or `"video"`.
        row: batch row, beams counted as rows.
        grid: `(frames, height, width)` in patches, of the first tile if there are several, or `None`
            if the features came from the caller.
        tiles: how many grids the picture was encoded as.
        tokens: visual tokens before any merge, as the language model counts them.
        encoded_units: merge units the encoder began with, or `None` if the features came from the
            caller. Where a family crops, pools or resamples features this is not `tokens`.
        entered_tokens: visual tokens the encoder left to the language model.
        layers: every merging layer in order. Encoder layers are missing where `grid` is.
        asked_reduction: the share the plan asks for, or `None` for a plan by ratio or count.
    """

    kind: str
    row: int
    grid: tuple[int, int, int] | None
    tiles: int
    tokens: int
    encoded_units: int | None
    entered_tokens: int
    layers: tuple[LayerRecord, ...]
    asked_reduction: float | None

    @property
    def frames(self) -> int:
        """Frames or tiles, which the encoder sees one by one; 1 if the grid is not known."""
        return 1 if self.grid is None else self.grid[0] * self.tiles

    @property
    def token_grid(self) -> tuple[int, int, int]:
        """`(frames or tiles, height, width)` in merge units; one long row if the grid is not known."""
        if self.grid is None or not self.encoded_units:
            return 1, 1, self.tokens
        _, height, width = self.grid
        side = math.isqrt(self.frames * height * width // self.encoded_units)  # a call may choose it
        return self.frames, height // side, width // side

    @property
    def final_tokens(self) -> int:
        """Visual tokens after the last merge."""
        merged = [r for r in self.layers if r.stage == "llm"]
        return merged[-1].tokens_out if merged else self.entered_tokens

    @property
    def reduction(self) -> float:
        """Share of the visual tokens gone after the last merge."""
        return 1 - self.final_tokens / self.tokens

    @property
    def note(self) -> str:
        """Says so where the picture is too small for what the plan asks."""
        if self.asked_reduction is None:
            return ""
        missing = self.final_tokens - (1 - self.asked_reduction) * self.tokens
        slack = self.frames / 2 + 1e-6  # every frame loses whole tokens
        if missing > slack or (self.asked_reduction and self.final_tokens == self.tokens):
            return "too small for the plan: merged less"
        return ""


@dataclass(frozen=True)
class Report:
    """What the last call that brought pictures did.

    Attributes:
        pictures: one record per picture and batch row.
        flops: operations of that prefill, without merging and with it.
        backend: the kernel that gave the encoder's attention statistics, `None` without an encoder
            call.
    """

    pictures: tuple[PictureRecord, ...]
    flops: Flops
    backend: str | None
    _trace: Trace | None = field(default=None, repr=False, compare=False)

    @cached_property
    def provenance(self) -> tuple[Provenance, ...] | None:
        """Where the tokens of each of the pictures came from; `None` without `patch(..., trace=True)`.

        Put together when first asked for; ask when the call has ended.
        """
        return None if self._trace is None else retrace(self._trace)

    @property
    def tokens(self) -> int:
        """Visual tokens before any merge, all pictures together."""
        return sum(p.tokens for p in self.pictures)

    @property
    def final_tokens(self) -> int:
        """Visual tokens after the last merge, all pictures together."""
        return sum(p.final_tokens for p in self.pictures)

    @property
    def reduction(self) -> float:
        """Share of all visual tokens gone after the last merge."""
        return 1 - self.final_tokens / self.tokens if self.tokens else 0.0

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table(
            title=f"illava: {self.tokens} visual tokens to {self.final_tokens} ({self.reduction:.1%} gone)"
        )
        for column in ("row", "picture", "grid", "tokens"):
            table.add_column(column, justify="left" if column == "picture" else "right")
        layers = sorted({(r.stage != "vit", r.layer, r.stage) for p in self.pictures for r in p.layers})
        for _, layer, stage in layers:
            table.add_column(f"{stage} {layer}", justify="right")
        for name in ("gone", "note"):
            table.add_column(name, justify="right" if name == "gone" else "left")
        for p in self.pictures:
            out = {(r.stage, r.layer): r.tokens_out for r in p.layers}
            cells = [str(out.get((stage, layer), "")) for _, layer, stage in layers]
            grid = "x".join(map(str, p.grid)) if p.grid else "?"
            grid += f" and {p.tiles - 1} more" if p.tiles > 1 else ""
            table.add_row(str(p.row), p.kind, grid, str(p.tokens), *cells, f"{p.reduction:.1%}", p.note)
        console = Console(width=140, color_system=None)
        with console.capture() as capture:
            console.print(table)
        v, t = self.flops.vision, self.flops.language
        return (
            capture.get()
            + f"TFLOPs of the prefill: vision {v.without / 1e12:.4g} -> {v.with_ / 1e12:.4g}, language "
            + f"{t.without / 1e12:.4g} -> {t.with_ / 1e12:.4g}; "
            + f"speed-up at most {self.flops.speedup_bound:.2f}x"
        )


def build_report(
    plan: ModelPlan,
    shape: ModelShape,
    call: LanguageCall,
    encoded: Iterable[EncoderRecord] | None,
    rows: int,
    model_type: str,
) -> Report:
    """Put a language model call and the encoder calls before it together.

    Args:
        plan, shape: of the patched model.
        call: the language model call that brought pictures.
        encoded: encoder calls since the last report; features handed in by the caller have none.
        rows: batch rows.
        model_type: of the patched model.
    """
    calls = list(encoded or ())
    visual = call.visual
    if visual is None:
        raise ValueError("a report needs a call that brought pictures")
    encodings, used = _encodings(calls, visual, call.segment_rows)
    pictures: list[PictureRecord] = []
    traced: list[TracedPicture] = []
    by_row: list[list[SegmentSchedule]] = [[] for _ in range(rows)]
    for number, kind in enumerate(visual.kinds):
        row, tokens, alive = call.segment_rows[number], call.tokens[number], call.counts[0][number]
        tiles = encodings[number]
        if tiles and sum(e.schedule.tokens for e in tiles) == tokens != alive + _removed(tiles):
            tiles = []  # not encoded under this plan
        vit = [
            LayerRecord("vit", entries[0][0], sum(e[1] for e in entries), sum(e[2] for e in entries))
            for entries in zip(*(e.schedule.vit for e in tiles), strict=True)
        ]
        llm, left = [], alive
        for layer, removed in call.removed.items():
            llm.append((layer, left, left := left - removed[number]))
        layers = (*vit, *(LayerRecord("llm", *entry) for entry in llm))
        if call.trace is not None:
            origins = tuple((e.trace, e.frame, e.grid[0]) for e in tiles if e.trace is not None)
            traced.append(TracedPicture(kind, row, tuple((r.stage, r.layer) for r in layers), origins))
        by_row[row].append(SegmentSchedule(1, tokens, ((-1, tokens, alive),), tuple(llm)))
        pictures.append(
            PictureRecord(
                kind=kind,
                row=row,
                grid=tiles[0].grid if tiles else None,
                tiles=len(tiles),
                tokens=tokens,
                encoded_units=sum(e.schedule.tokens for e in tiles) if tiles else None,
                entered_tokens=alive,
                layers=layers,
                asked_reduction=plan.reduction,
            )
        )
    texts = [call.length - sum(s.tokens for s in row) for row in by_row]
    flops = count_flops(
        plan, shape, [(e.schedule, e.unit_tokens) for e in used], list(zip(texts, by_row, strict=True))
    )
    backend = next((c.backend for c in calls if c.backend), None)
    trace = None
    if call.trace is not None:
        trace = Trace(model_type, call.trace, tuple(traced))
    return Report(tuple(pictures), flops, backend, trace)


def _removed(tiles: Sequence[Encoding]) -> int:
    return sum(e.schedule.tokens - e.schedule.encoder_tokens for e in tiles)


def _encodings(
    calls: Sequence[EncoderRecord], visual: VisualInput, rows: Sequence[int]
) -> tuple[list[list[Encoding]], list[Encoding]]:
    """The grids behind each segment, none for features that the caller brought along, and those this
    call used: the last ones encoded, for earlier pictures may have been encoded for nobody.

    `generate` encodes first and repeats rows for beams and several answers afterwards: the first row
    of each group is the one they came from.
    """
    counter: Counter[tuple[str, int]] = Counter()
    places = []  # kind, row, and which picture of its kind in that row
    for kind, row in zip(visual.kinds, rows, strict=True):
        places.append((kind, row, counter[kind, row]))
        counter[kind, row] += 1
    for repeats in range(1, max(rows) + 2):
        pool = _groups(calls)
        origin: dict[tuple[str, int, int], list[Encoding]] = {}
        for i in reversed([i for i, (_, row, _) in enumerate(places) if row % repeats == 0]):
            tiles = _take_last(pool, visual.encoded_units[i], visual.tokens[i])
            if tiles is None:
                break
            origin[places[i]] = tiles
        else:
            used = [tile for tiles in reversed(origin.values()) for tile in tiles]
            return [origin[kind, row - row % repeats, nth] for kind, row, nth in places], used
    return [[] for _ in places], []


def _groups(calls: Sequence[EncoderRecord]) -> list[tuple[list[Encoding], int | None]]:
    """What was encoded, in order: grids that became one picture, and its tokens if packing told."""
    groups: list[tuple[list[Encoding], int | None]] = []
    for call in calls:
        firsts = [*accumulate((t for t, _, _ in call.grids), initial=0)][:-1]
        encodings = [
            Encoding(g, s, call.unit_tokens, call.trace, first)
            for g, s, first in zip(call.grids, call.schedules, firsts, strict=True)
        ]
        whole: list[tuple[int, int | None]] = [(1, None)] * len(encodings)
        for tiles, tokens in call.packed or whole:
            groups.append((encodings[:tiles], tokens))
            encodings = encodings[tiles:]
    return groups


def _take_last(
    pool: list[tuple[list[Encoding], int | None]], units: tuple[int, ...] | None, tokens: int
) -> list[Encoding] | None:
    """Take a picture's grids off the end of the pool; `None` if what is there is another's."""
    if units is None:
        return pool.pop()[0] if pool and pool[-1][1] == tokens else None
    if not units or len(units) > len(pool):
        return None
    last = pool[len(pool) - len(units) :]
    del pool[len(pool) - len(units) :]
    tiles = [encoding for group, _ in last for encoding in group]
    return tiles if tuple(e.schedule.tokens for e in tiles) == units else None
