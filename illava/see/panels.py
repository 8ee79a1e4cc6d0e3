"""Drawing one panel: its pixels, and on them outlines and numbers.

Tokens of a merge that took in others have a thick outline in their group's colour and a number in a circle;
what they took in has the same colour and number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from torch import Tensor

from illava.provenance import GONE, Step
from illava.see import paint
from illava.see.paint import Grid, Steps
from illava.see.tiles import WHOLE
from illava.see.views import Place, View
from illava.sparse import entries

INFORMATIVE_EDGE = "#56B4E9"  # sky blue
EARLIER_EDGE = "#FFFFFF"
GROUP_WIDTH, EARLIER_WIDTH = 1.8, 1.3  # points
RIM = 0.7  # around them, dark, by their width
FULL = 12.0  # points: outlines are as wide where units are at least as large
READABLE = 6.5  # points: numbers of groups are written where units are at least as large
LARGEST = 9.0  # points


def draw_picture(axes: Axes, view: View) -> None:
    """The picture as it is."""
    _show(axes, paint.drawn(view.picture))


def draw_importance(axes: Axes, view: View, steps: Steps) -> None:
    """By what a merge ranked."""
    _show(axes, paint.paint_importance(view, steps))
    _draw_tiles(axes, view)


def draw_step(axes: Axes, view: View, steps: Steps, width: float) -> None:
    """What a merge left of a view's frames.

    Args:
        steps: of each provenance on the view, by its `id`.
        width: of the panel, in points.
    """
    pixels = paint.paint_step(view, steps)
    _show(axes, pixels)
    if paint.is_placed(view, steps):
        before = paint.numbering(view, steps)
        for own, places in view.pictures:
            marks = _Marks.of(steps[id(own)], before[id(own)])
            for place in places:
                points = width * (place.box[2] - place.box[0]) / own.frames[place.frame][1]
                _mark(axes, paint.grid(pixels.shape, place), place, marks, points)
    _draw_tiles(axes, view)


def _show(axes: Axes, pixels: np.ndarray) -> None:
    axes.set_axis_off()
    axes.imshow(pixels, interpolation="none")
    axes.autoscale(False)


def _draw_tiles(axes: Axes, view: View) -> None:
    """Lines between the tiles of a picture."""
    height, width = axes.images[0].get_array().shape[:2]
    for left, top, right, bottom in {place.box for place in view.places} - {WHOLE}:
        x, y = (left * width, right * width), (top * height, bottom * height)
        axes.plot(
            (x[0], x[1], x[1], x[0], x[0]), (y[0], y[0], y[1], y[1], y[0]), color="white", linewidth=1.6
        )


@dataclass(frozen=True)
class _Marks:
    """What is marked on the patches `[P]` of one picture.

    Attributes:
        kept: where a token stands.
        earlier: where one stands that took in others in an earlier merge, and none in this one.
        hubs, taken: as `paint.groups` numbers groups.
        before: how many groups come before this picture's.
    """

    kept: Tensor
    earlier: Tensor
    hubs: Tensor
    taken: Tensor
    before: int

    @classmethod
    def of(cls, step: Step, before: int) -> _Marks:
        return cls(
            step.state != GONE, _standing(step, step.mixed & ~step.recycled), *paint.groups(step), before
        )


def _mark(axes: Axes, grid: Grid, place: Place, marks: _Marks, points: float) -> None:
    """Outlines of what is kept and of what took in others, and the numbers of groups.

    Args:
        points: the width of a patch on the page.
    """
    side = place.provenance.unit_side
    size = points * side
    thin = min(1.0, size / FULL)  # outlines of small units must leave something to see
    kept, earlier, hubs, taken = (
        paint.of_frame(place, x) for x in (marks.kept, marks.earlier, marks.hubs, marks.taken)
    )
    _outline(axes, grid, {INFORMATIVE_EDGE: [kept]}, 0.8 * thin)
    _outline(axes, grid, {EARLIER_EDGE: [earlier]}, EARLIER_WIDTH * thin, rim=True)
    regions: dict[str, list[np.ndarray]] = {}
    for number in np.unique(hubs[hubs > 0]).tolist():
        regions.setdefault(paint.colour(marks.before + number), []).append(hubs == number)
    _outline(axes, grid, regions, GROUP_WIDTH * thin, rim=True)
    if size < READABLE:
        return
    for numbers, circled in ((hubs, True), (taken, False)):
        for x, y, number in _units(numbers, side, grid):
            _write(axes, x, y, marks.before + number, size, circled)


def _standing(step: Step, tokens: Tensor) -> Tensor:
    """`[P]` bool, where those of the tokens `[n]` stand."""
    rows, patches, _ = entries(step.stands)
    marked = torch.zeros(step.stands.shape[1], dtype=torch.bool)
    marked[patches[tokens[rows]]] = True
    return marked


def _units(numbers: np.ndarray, side: int, grid: Grid) -> Iterator[tuple[float, float, int]]:
    """The middle of each merge unit that has a number, in pixels, and the number."""
    x, y = grid.corners()
    for row in range(0, numbers.shape[0], side):
        for column in range(0, numbers.shape[1], side):
            unit = numbers[row : row + side, column : column + side]
            if number := int(unit.max()):
                yield (
                    (x[column] + x[column + unit.shape[1]]) / 2,
                    (y[row] + y[row + unit.shape[0]]) / 2,
                    number,
                )


def _write(axes: Axes, x: float, y: float, number: int, unit: float, circled: bool) -> None:
    """A number in the middle of a unit that is so many points wide."""
    size = min(LARGEST, unit * (0.62, 0.62 if not circled else 0.5, 0.42)[min(2, len(str(number)) - 1)])
    fill = paint.colour(number)
    red, green, blue = to_rgb(fill)
    ink = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.4 else "white"
    circle = {"boxstyle": "circle,pad=0.18", "facecolor": fill, "edgecolor": "black", "linewidth": 0.6}
    axes.text(
        x, y, str(number), size=size, color=ink, ha="center", va="center_baseline",
        weight="bold" if circled else "normal", bbox=circle if circled else None,
    )  # fmt: skip


def _outline(
    axes: Axes, grid: Grid, regions: dict[str, list[np.ndarray]], width: float, *, rim: bool = False
) -> None:
    """The borders of regions of patches, by colour; a dark rim shows them on any picture."""
    edges = {
        colour: [x for inside in found for x in _edges(grid, inside)] for colour, found in regions.items()
    }
    if rim:
        around = [x for found in edges.values() for x in found]
        axes.add_collection(LineCollection(around, colors="black", linewidths=width * (1 + RIM)))
    for colour, found in edges.items():
        axes.add_collection(LineCollection(found, colors=colour, linewidths=width))


def _edges(grid: Grid, inside: np.ndarray) -> list[list[tuple[float, float]]]:
    """The border of a region of patches, as straight pieces."""
    x, y = grid.corners()
    around = np.pad(inside, 1)
    lines = []
    for r, c in zip(*np.nonzero(around[1:, 1:-1] != around[:-1, 1:-1]), strict=True):
        lines.append([(x[c], y[r]), (x[c + 1], y[r])])
    for r, c in zip(*np.nonzero(around[1:-1, 1:] != around[1:-1, :-1]), strict=True):
        lines.append([(x[c], y[r]), (x[c], y[r + 1])])
    return lines
