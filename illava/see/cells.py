"""Which panels a figure has, and what stands above, beside and below them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from illava.provenance import Provenance, Step
from illava.see import paint
from illava.see.views import View
from illava.sparse import entries

TALLEST = 1.6  # of a panel, in widths
WRAPPED = 3  # panels side by side where more would be too small to read


@dataclass(frozen=True)
class Cell:
    """One panel.

    Attributes:
        view: what is seen.
        merge: which of the picture's merges; `None` for the picture itself.
        heat: whether to draw what the merge ranked the tokens by, instead of what it left.
    """

    view: View
    merge: int | None = None
    heat: bool = False

    @property
    def steps(self) -> dict[int, Step]:
        """What the merge left, of each provenance on the view by its `id`."""
        return {} if self.merge is None else {id(p): p.merges[self.merge] for p, _ in self.view.pictures}

    @property
    def caption(self) -> str:
        """How many tokens stand here."""
        if self.heat:
            return ""
        if self.merge is None:
            sizes = [(p.provenance.frames[p.frame], p.provenance.unit_side) for p in self.view.places]
            return f"{sum((height // side) * (width // side) for (height, width), side in sizes):,} tokens"
        left, recycled = self._standing()
        return f"{left:,} left, {recycled:,} recycled" if recycled else f"{left:,} left"

    def _standing(self) -> tuple[int, int]:
        """How many tokens stand here, and how many of them took in others in this merge."""
        steps, left, recycled = self.steps, 0, 0
        for own, places in self.view.pictures:
            step, here = steps[id(own)], torch.zeros(own.patches, dtype=torch.bool)
            frames = own.maps(here)
            for place in places:
                frames[place.frame].fill_(True)
            rows, patches, _ = entries(step.stands)
            tokens = rows[here[patches]].unique()  # packing may lay one across the edge of two tiles
            left, recycled = left + len(tokens), recycled + int(step.recycled[tokens].sum())
        return left, recycled

    @property
    def placed(self) -> bool:
        """Whether tokens stand somewhere on the picture."""
        return self.merge is None or paint.is_placed(self.view, self.steps)

    @property
    def shape(self) -> float:
        """Height by width, bounded."""
        return min(self.view.picture.height / self.view.picture.width, TALLEST)


@dataclass(frozen=True)
class Row:
    """Panels side by side; `None` leaves a place for a word on the row.

    Attributes:
        cells: of equal number in every row, but for the last.
        above: a name for each of them, or none.
        beside: of the row.
    """

    cells: tuple[Cell | None, ...]
    above: tuple[str, ...] = ()
    beside: str = ""


def arrange(
    found: Sequence[View], merges: Sequence[int], *, importance: bool, video: bool, readable: int
) -> list[Row]:
    """Pictures down and merges across; the frames of a video across and merges down.

    Args:
        found: pictures or frames.
        merges: those to draw, from 0.
        importance: whether to draw what they ranked the tokens by as well.
        video: whether the views are one video's frames.
        readable: the most merge units side by side, over a whole row, that can be told apart.
    """
    stages: list[int | None] = [None, *merges]
    if video:
        return _across_frames(found, stages, importance)
    number = len(stages)
    if len(found) == 1 and number > WRAPPED and _widest(found[0]) * number > readable:
        number = WRAPPED
    rows: list[Row] = []
    for view in found:
        name = view.name if len(found) > 1 else ""
        for start in range(0, len(stages), number):
            part = stages[start : start + number]
            own = view.places[0].provenance
            above = tuple(stage_name(own, m) for m in part) if view is found[0] else ()
            rows.append(Row(tuple(Cell(view, m) for m in part), above, name))
            if importance:
                heat = tuple(None if m is None else Cell(view, m, heat=True) for m in part)
                rows.append(Row(heat, beside="" if None in heat else "importance"))
    return rows


def _across_frames(found: Sequence[View], stages: Sequence[int | None], importance: bool) -> list[Row]:
    own = found[0].places[0].provenance
    above, rows = tuple(view.name for view in found), []
    for stage in stages:
        beside = f"{stage_name(own, stage)}\n{_total(found, stage):,} tokens"
        rows.append(Row(tuple(Cell(view, stage) for view in found), above if stage is None else (), beside))
        if importance and stage is not None:
            heat = tuple(Cell(view, stage, heat=True) for view in found)
            rows.append(Row(heat, beside=f"importance,\n{own.merges[stage].name}"))
    return rows


def stage_name(own: Provenance, merge: int | None) -> str:
    """What a panel of this merge shows."""
    return "as given" if merge is None else f"after {own.merges[merge].name}"


def _widest(view: View) -> float:
    """Merge units side by side on the picture."""
    return max(
        place.provenance.frames[place.frame][1] / place.provenance.unit_side / (place.box[2] - place.box[0])
        for place in view.places
    )


def _total(found: Sequence[View], merge: int | None) -> int:
    """The tokens of all pictures on some views, whichever of their frames are shown."""
    own = {id(p): p for view in found for p, _ in view.pictures}
    if merge is None:
        return sum(p.patches // p.unit_side**2 for p in own.values())
    return sum(len(p.merges[merge].tokens) for p in own.values())
