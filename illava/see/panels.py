"""Drawing one panel: a picture, and what one merge made of its patches.

Colours are Okabe and Ito's, which colour-blind readers tell apart; shapes say the same once more: kept
patches keep their colours, gone ones are dark, tokens that took in others have a thick outline, and those of
this merge lines to what they took in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.image import AxesImage
from PIL import Image
from torch import Tensor

from illava.provenance import GONE, Provenance, Step
from illava.see.views import Box, Place, View
from illava.sparse import entries

INFORMATIVE_EDGE = "#56B4E9"  # sky blue
# Orange, green, purple, vermilion, yellow, blue: one group after another.
GROUP_EDGES = ("#E69F00", "#009E73", "#CC79A7", "#D55E00", "#F0E442", "#0072B2")
EARLIER_EDGE = "#FFFFFF"
HEAT = "cividis"
LONGEST_SIDE = 512  # pixels of a picture as it is drawn
DARK, ABSORBED = 0.12, 0.45  # brightness of what is gone, and of what a token took in
# A token that reads more patches than this many merge units stands nowhere in particular.
PLACED_UNITS = 9
# Lines thinner than this share of a token are left out.
THIN = 0.02


@dataclass(frozen=True)
class Grid:
    """One frame's patches on a drawn picture, in pixels."""

    rows: int
    columns: int
    box: Box

    def corners(self) -> tuple[np.ndarray, np.ndarray]:
        """The lines between patches: across `[columns + 1]` and down `[rows + 1]`."""
        left, top, right, bottom = self.box
        return np.linspace(left, right, self.columns + 1), np.linspace(top, bottom, self.rows + 1)


def drawn(picture: Image.Image) -> np.ndarray:
    """A picture at the size it is drawn at, `[height, width, 3]` from 0 to 1."""
    scale = LONGEST_SIDE / max(picture.size)
    size = tuple(max(1, round(length * scale)) for length in picture.size)
    return np.asarray(picture.convert("RGB").resize(size, Image.Resampling.LANCZOS), dtype=float) / 255


def draw_picture(axes: Axes, view: View) -> None:
    """The picture as it is."""
    _blank(axes)
    axes.imshow(drawn(view.picture), interpolation="none")


def draw_step(axes: Axes, view: View, steps: dict[int, Step]) -> None:
    """What a merge left of a view's frames.

    Args:
        steps: of each provenance on the view, by its `id`.
    """
    _blank(axes)
    canvas = drawn(view.picture)
    placed = all(_is_placed(x.provenance, steps[id(x.provenance)]) for x in view.places)
    brightness = np.full(canvas.shape[:2], DARK)
    for place in view.places:
        step = steps[id(place.provenance)]
        values = _brightness(step) if placed else _read_share(step)
        _paint(brightness, place, place.provenance.maps(values)[place.frame].numpy())
    grey = canvas.mean(axis=2, keepdims=True) * 0.8 + 0.1
    kept = np.clip((brightness - ABSORBED) / (1 - ABSORBED), 0, 1)[..., None]
    axes.imshow(canvas * kept + grey * brightness[..., None] * (1 - kept), interpolation="none")
    axes.autoscale(False)
    if placed:
        for place in view.places:
            _outline(axes, canvas.shape, place, steps[id(place.provenance)])


def draw_importance(axes: Axes, view: View, steps: dict[int, Step]) -> AxesImage | None:
    """By what a merge ranked: the image matplotlib made, or `None` where it ranked nothing here."""
    _blank(axes)
    canvas = drawn(view.picture)
    heat = np.full(canvas.shape[:2], np.nan)
    for place in view.places:
        importance = steps[id(place.provenance)].importance
        if importance is not None:
            _paint(heat, place, place.provenance.maps(_ranks(importance))[place.frame].numpy())
    axes.imshow(canvas.mean(axis=2) * 0.25, cmap="gray", vmin=0, vmax=1, interpolation="none")
    if np.isnan(heat).all():
        return None
    return axes.imshow(heat, cmap=HEAT, vmin=0, vmax=1, interpolation="none")


def _ranks(importance: Tensor) -> Tensor:
    """`[P]` from 0 for the least important to 1 for the most: a few large values would hide all others."""
    ranked = torch.full_like(importance, float("nan"))
    known = ~importance.isnan()
    values, rank = importance[known].unique(return_inverse=True)
    ranked[known] = rank.float() / max(1, len(values) - 1)
    return ranked


def _blank(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _brightness(step: Step) -> Tensor:
    values = torch.full(step.state.shape, DARK)
    values[step.absorbed] = ABSORBED
    values[step.state != GONE] = 1.0
    return values


def _read_share(step: Step) -> Tensor:
    """Where tokens stand nowhere in particular: how much they are made of each patch."""
    share = step.share
    return DARK + (1 - DARK) * (share / share.max().clamp(min=torch.finfo(share.dtype).tiny)).sqrt()


def _is_placed(own: Provenance, step: Step) -> bool:
    read = entries(step.stands)[0]
    return len(read) <= PLACED_UNITS * own.unit_side**2 * max(1, len(step.tokens))


def _grid(shape: tuple[int, ...], place: Place) -> Grid:
    height, width = shape[:2]
    left, top, right, bottom = place.box
    rows, columns = place.provenance.frames[place.frame]
    return Grid(rows, columns, (left * width, top * height, right * width, bottom * height))


def _paint(canvas: np.ndarray, place: Place, values: np.ndarray) -> None:
    """Fill a frame's patches on `[height, width]`."""
    x, y = (np.round(lines).astype(int) for lines in _grid(canvas.shape, place).corners())
    rows = np.repeat(np.arange(len(y) - 1), np.diff(y))
    columns = np.repeat(np.arange(len(x) - 1), np.diff(x))
    canvas[y[0] : y[-1], x[0] : x[-1]] = values[rows][:, columns]


def _outline(axes: Axes, shape: tuple[int, ...], place: Place, step: Step) -> None:
    """Thin lines around what is kept, thick ones around what took in others, and lines to what it took in."""
    own, grid = place.provenance, _grid(shape, place)
    state = own.maps(step.state)[place.frame].numpy()
    axes.add_collection(LineCollection(_edges(grid, state != GONE), colors=INFORMATIVE_EDGE, linewidths=0.7))
    earlier = own.maps(_where(step, step.mixed & ~step.recycled))[place.frame].numpy()
    axes.add_collection(LineCollection(_edges(grid, earlier), colors=EARLIER_EDGE, linewidths=1.4))
    for number, group in enumerate(_groups(own, step, place.frame)):
        colour = GROUP_EDGES[number % len(GROUP_EDGES)]
        hub = _middle(grid, group.hub)
        near = [(_middle(grid, point), weight) for point, weight in group.sources if weight >= THIN]
        for colours, wider in (("black", 1.2), (colour, 0.0)):  # a dark rim shows lines on any picture
            spokes = LineCollection(
                [(hub, point) for point, _ in near],
                colors=colours,
                linewidths=[0.7 + 1.6 * weight + wider for _, weight in near],
            )
            axes.add_collection(spokes)
            around = LineCollection(_edges(grid, group.cells), colors=colours, linewidths=1.8 + wider)
            axes.add_collection(around)
        axes.plot(*hub, "o", color=colour, markersize=3.2, markeredgecolor="black", markeredgewidth=0.5)


def _where(step: Step, tokens: Tensor) -> Tensor:
    """`[P]` bool, where those of the tokens `[n]` stand."""
    rows, patches, _ = entries(step.stands)
    marked = torch.zeros(step.stands.shape[1], dtype=torch.bool)
    marked[patches[tokens[rows]]] = True
    return marked


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


Point = tuple[float, float]


@dataclass(frozen=True)
class Group:
    """A token that took in others, on one frame.

    Attributes:
        hub: the middle of where it stands, in patches.
        cells: `[rows, columns]` bool, where it stands.
        sources: the middles of the merge units it took in, in patches, and their weights.
    """

    hub: Point
    cells: np.ndarray
    sources: list[tuple[Point, float]]


def _groups(own: Provenance, step: Step, frame: int) -> Iterator[Group]:
    """Those of this merge alone: lines of earlier ones would hide them."""
    first = sum(h * w for h, w in own.frames[:frame])
    height, width = own.frames[frame]
    for row, patches, weights in step.groups():
        if not step.recycled[row]:
            continue
        standing = _own(*_row(step.stands, row), first, height * width)
        stand = _units(*standing, width, own.unit_side)
        if not stand:
            continue
        total = sum(stand.values())
        hub = (
            sum(x * w for (x, _), w in stand.items()) / total,
            sum(y * w for (_, y), w in stand.items()) / total,
        )
        cells = torch.zeros(height * width, dtype=torch.bool)
        cells[standing[0]] = True
        sources = _units(*_own(patches, weights, first, height * width), width, own.unit_side)
        taken = [(place, weight) for place, weight in sources.items() if place not in stand]
        yield Group(hub, cells.view(height, width).numpy(), taken)


def _row(x: Tensor, row: int) -> tuple[Tensor, Tensor]:
    rows, columns, values = entries(x)
    return columns[rows == row], values[rows == row]


def _own(patches: Tensor, weights: Tensor, first: int, number: int) -> tuple[Tensor, Tensor]:
    """Those of one frame, numbered from its first patch."""
    inside = (patches >= first) & (patches < first + number)
    return patches[inside] - first, weights[inside]


def _units(patches: Tensor, weights: Tensor, width: int, side: int) -> dict[Point, float]:
    """Weights by the middle of each merge unit, in patches."""
    found: dict[Point, float] = {}
    for patch, weight in zip(patches.tolist(), weights.tolist(), strict=True):
        row, column = patch // width // side, patch % width // side
        place = (column * side + side / 2, row * side + side / 2)
        found[place] = found.get(place, 0.0) + weight
    return found


def _middle(grid: Grid, point: Point) -> Point:
    """A place in patches, in pixels."""
    left, top, right, bottom = grid.box
    return (
        left + (right - left) * point[0] / grid.columns,
        top + (bottom - top) * point[1] / grid.rows,
    )
