"""The whole figure: pictures by merges, as in the paper's figure 5."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from PIL import Image

from illava.provenance import Provenance, Step
from illava.see.panels import (
    ABSORBED,
    DARK,
    EARLIER_EDGE,
    GROUP_EDGES,
    HEAT,
    INFORMATIVE_EDGE,
    draw_importance,
    draw_picture,
    draw_step,
)
from illava.see.views import View
from illava.sparse import entries

PANEL_INCHES = 2.1
TALLEST = 1.6  # of a panel, in widths
DOTS_PER_INCH = 160
GAP, LINE, MARGIN = 0.1, 0.2, 0.15  # inches
SMALL, LARGE = 9, 11  # points
LEGEND_INCHES = 2.15  # of one entry, on average


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
        own = [place.provenance for place in self.view.places]
        return {} if self.merge is None else {id(p): p.merges[self.merge] for p in own}

    @property
    def caption(self) -> str:
        """How many tokens stand here."""
        if self.heat:
            return ""
        if self.merge is None:
            units = sum(
                _patches(p.provenance, p.frame) // p.provenance.unit_side**2 for p in self.view.places
            )
            return f"{units:,} tokens"
        left = sum(_standing(p.provenance, p.frame, self.steps[id(p.provenance)]) for p in self.view.places)
        return f"{left:,} left"


def compose(
    found: Sequence[View], merges: Sequence[int], *, importance: bool, title: str | None, down: bool
) -> Figure:
    """Views down and merges across; with `down` (the frames of a video) the other way round."""
    kinds = (False, True) if importance else (False,)
    stages: list[int | None] = [None, *merges]
    rows: list[list[Cell | None]] = []
    beside: list[str] = []
    first = found[0].places[0].provenance
    if down:
        above = [view.name for view in found]
        for stage in stages:
            for heat in kinds if stage is not None else (False,):
                rows.append([Cell(view, stage, heat) for view in found])
                beside.append(_stage_name(first, stage, heat))
    else:
        above = [_stage_name(first, stage) for stage in stages]
        for view in found:
            for heat in kinds:
                rows.append([None if heat and m is None else Cell(view, m, heat) for m in stages])
                beside.append("attention" if heat else view.name if len(found) > 1 else "")
    return _draw(rows, above, beside, title, importance)


def image(figure: Figure) -> Image.Image:
    """The figure in pixels."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.frombytes("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba())).convert("RGB")


def _draw(
    rows: Sequence[Sequence[Cell | None]],
    above: Sequence[str],
    beside: Sequence[str],
    title: str | None,
    importance: bool,
) -> Figure:
    heights = [PANEL_INCHES * max(_shape(cell) for cell in row if cell is not None) for row in rows]
    captions = [LINE if any(cell is not None and cell.caption for cell in row) else 0.0 for row in rows]
    left = MARGIN + (0.3 if any(beside) else 0.0)
    width = left + len(above) * (PANEL_INCHES + GAP) - GAP + MARGIN
    entries = _legend(importance)
    columns = max(1, int(width / LEGEND_INCHES))
    lines = -(-len(entries) // columns)
    top = MARGIN + LINE * 1.2 + (LINE * 1.6 if title else 0.0)
    bottom = MARGIN + LINE * lines * 1.2
    height = top + sum(heights) + sum(captions) + GAP * len(rows) + bottom
    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, facecolor="white")
    if title:
        figure.text(left / width, 1 - MARGIN / height, title, size=LARGE, weight="bold", va="top")
    y = height - top
    for number, (row, tall, caption) in enumerate(zip(rows, heights, captions, strict=True)):
        y -= tall
        if beside[number]:
            figure.text(
                (left - 0.08) / width, (y + tall / 2) / height, beside[number],
                size=SMALL, rotation=90, ha="right", va="center",
            )  # fmt: skip
        for column, cell in enumerate(row):
            x = left + column * (PANEL_INCHES + GAP)
            middle = (x + PANEL_INCHES / 2) / width
            if number == 0:
                figure.text(middle, (y + tall + 0.06) / height, above[column], size=SMALL, ha="center")
            if cell is None:
                continue
            axes = figure.add_axes((x / width, y / height, PANEL_INCHES / width, tall / height))
            if cell.merge is None:
                draw_picture(axes, cell.view)
            elif cell.heat:
                draw_importance(axes, cell.view, cell.steps)
            else:
                draw_step(axes, cell.view, cell.steps)
            figure.text(middle, (y - 0.05) / height, cell.caption, size=SMALL, ha="center", va="top")
        y -= caption + GAP
    figure.legend(
        handles=entries, loc="lower center", ncols=-(-len(entries) // lines), frameon=False, fontsize=SMALL,
        handlelength=1.4, columnspacing=1.4, borderaxespad=0.3,
    )  # fmt: skip
    return figure


def _legend(importance: bool) -> list[Patch | Line2D]:
    group = GROUP_EDGES[0]
    entries: list[Patch | Line2D] = [
        Patch(facecolor="0.85", edgecolor=INFORMATIVE_EDGE, linewidth=1.5, label="kept"),
        Line2D([], [], color=group, marker="o", markersize=4, label="took in these, now"),
        Patch(facecolor="0.6", edgecolor=EARLIER_EDGE, linewidth=2.0, label="took in others, earlier"),
        Patch(facecolor=str(ABSORBED), label="taken in by others"),
        Patch(facecolor=str(DARK), label="gone"),
    ]
    if importance:
        entries += [
            Patch(facecolor=colormaps[HEAT](1.0), label="most attention"),
            Patch(facecolor=colormaps[HEAT](0.0), label="least attention"),
        ]
    return entries


def _stage_name(own: Provenance, merge: int | None, heat: bool = False) -> str:
    if merge is None:
        return "as given"
    return f"attention, {own.merges[merge].name}" if heat else f"after {own.merges[merge].name}"


def _shape(cell: Cell) -> float:
    """Height by width, bounded."""
    return min(cell.view.picture.height / cell.view.picture.width, TALLEST)


def _patches(own: Provenance, frame: int) -> int:
    height, width = own.frames[frame]
    return height * width


def _standing(own: Provenance, frame: int, step: Step) -> int:
    """How many tokens stand on a frame."""
    first = sum(_patches(own, i) for i in range(frame))
    rows, patches, _ = entries(step.stands)
    inside = (patches >= first) & (patches < first + _patches(own, frame))
    return len(torch.unique(rows[inside]))
