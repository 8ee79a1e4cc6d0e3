"""What one panel shows, as pixels.

Colours are Okabe and Ito's, which colour-blind readers tell apart; brightness, stripes and numbers say the
same once more. What is kept keeps its colours; a patch that a token took in is grey, in that token's tint if
it happened just now; what was dropped is striped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from PIL import Image
from torch import Tensor

from illava.provenance import GONE, Step
from illava.see.tiles import Box
from illava.see.views import Place, View
from illava.sparse import entries

# Orange, green, purple, vermilion, yellow, blue: one recycled token after another.
GROUPS = ("#E69F00", "#009E73", "#CC79A7", "#D55E00", "#F0E442", "#0072B2")
HEAT = "cividis"
LONGEST_SIDE = 512  # pixels of a picture as it is drawn
STRIPE = 16  # pixels from one stripe to the next
DROPPED, STRIPES = 0.08, 0.22  # brightness of what was dropped
ABSORBED = 0.25  # and of what lives on in a token that took it in, where the picture is black
VEIL = 0.7  # how much of the picture's own brightness is left out there
TINT, HEAT_COVER = 0.62, 0.68  # how much of a pixel is the colour laid on it
# A token that reads more patches than this many merge units stands nowhere in particular.
PLACED_UNITS = 9

# The step drawn of each picture on a view, by its provenance's `id`.
Steps = Mapping[int, Step]


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

    def paint(self, canvas: np.ndarray, values: np.ndarray) -> None:
        """Fill the patches on `[height, width]` or `[height, width, c]` with `[rows, columns]` or more."""
        x, y = (np.round(lines).astype(int) for lines in self.corners())
        rows = np.repeat(np.arange(len(y) - 1), np.diff(y))
        columns = np.repeat(np.arange(len(x) - 1), np.diff(x))
        canvas[y[0] : y[-1], x[0] : x[-1]] = values[rows][:, columns]


def grid(shape: tuple[int, ...], place: Place) -> Grid:
    """Where a frame lies on a drawn picture `[height, width, ...]`."""
    height, width = shape[:2]
    left, top, right, bottom = place.box
    rows, columns = place.provenance.frames[place.frame]
    return Grid(rows, columns, (left * width, top * height, right * width, bottom * height))


def drawn(picture: Image.Image) -> np.ndarray:
    """A picture at the size it is drawn at, `[height, width, 3]` from 0 to 1."""
    scale = LONGEST_SIDE / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return np.asarray(picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)) / 255.0


def colour(number: int) -> str:
    """Of the group with this number, counted from 1."""
    return GROUPS[(number - 1) % len(GROUPS)]


def is_placed(view: View, steps: Steps) -> bool:
    """Whether tokens stand somewhere on the picture; those of a resampler read all of it."""
    for own, _ in view.pictures:
        step = steps[id(own)]
        if len(entries(step.stands)[0]) > PLACED_UNITS * own.unit_side**2 * max(1, len(step.tokens)):
            return False
    return True


def numbering(view: View, steps: Steps) -> dict[int, int]:
    """By provenance's `id`, how many groups of others come before its own on the view."""
    found, number = {}, 0
    for own, _ in view.pictures:
        found[id(own)] = number
        number += int(steps[id(own)].recycled.sum())
    return found


def groups(step: Step) -> tuple[Tensor, Tensor]:
    """The groups of this merge, numbered from 1 in the order of their tokens; 0 is none.

    Returns:
        `[P]` of which recycled token a patch is the place, and `[P]` which took in most of a patch on which
        no token stands any more.
    """
    number = step.recycled.cumsum(0) * step.recycled  # [n]
    own, taken = torch.zeros(2, step.state.shape[0], dtype=torch.long)
    rows, patches, _ = entries(step.stands)
    own.scatter_reduce_(0, patches, number[rows], "amax")
    rows, patches, weights = entries(step.sources)
    here = (number[rows] > 0) & (step.state[patches] == GONE) & (weights > 0)
    rows, patches, weights = rows[here], patches[here], weights[here]
    order = weights.argsort(stable=True)
    order = order[patches[order].argsort(stable=True)]  # by patch, the heaviest of each last
    last = patches[order].diff(append=patches.new_tensor([-1])) != 0
    taken[patches[order][last]] = number[rows[order][last]]
    return own, taken


def paint_step(view: View, steps: Steps) -> np.ndarray:
    """What a merge left of a view's frames, `[height, width, 3]` from 0 to 1."""
    picture = drawn(view.picture)
    if not is_placed(view, steps):
        return picture * _read_shares(view, steps, picture.shape)
    grey = picture.mean(axis=2, keepdims=True).repeat(3, axis=2)
    absorbed = ABSORBED + (1 - VEIL) * grey
    untinted = (1 - TINT) * (0.25 + 0.6 * grey)
    palette = np.array([(0.0, 0.0, 0.0), *map(to_rgb, GROUPS)])
    before, result = numbering(view, steps), _striped(picture.shape)
    for own, places in view.pictures:
        step = steps[id(own)]
        _, taken = groups(step)
        taken[taken > 0] += before[id(own)]
        for place in places:
            where, numbers, tint = grid(picture.shape, place), of_frame(place, taken), np.zeros_like(picture)
            where.paint(tint, palette[np.where(numbers > 0, (numbers - 1) % len(GROUPS) + 1, 0)])
            for shown, inside in (
                (absorbed, of_frame(place, step.absorbed)),
                (TINT * tint + untinted, numbers > 0),
                (picture, of_frame(place, step.state) != GONE),
            ):
                mask = np.zeros(picture.shape[:2], dtype=bool)
                where.paint(mask, inside)
                result[mask] = shown[mask]
    return result


def paint_importance(view: View, steps: Steps) -> np.ndarray:
    """By what a merge ranked the tokens, on the picture in grey, `[height, width, 3]` from 0 to 1.

    Colours go by rank: a few large values would hide the differences between all others.
    """
    picture = drawn(view.picture)
    grey = picture.mean(axis=2, keepdims=True).repeat(3, axis=2)
    result = _striped(picture.shape)
    for own, places in view.pictures:
        importance = steps[id(own)].importance
        if importance is None:
            continue
        ranked = _ranks(importance)
        for place in places:
            ranks, where = of_frame(place, ranked), grid(picture.shape, place)
            heat, known = np.zeros_like(picture), np.zeros(picture.shape[:2], dtype=bool)
            where.paint(heat, colormaps[HEAT](np.nan_to_num(ranks))[..., :3])
            where.paint(known, ~np.isnan(ranks))
            result[known] = (HEAT_COVER * heat + (1 - HEAT_COVER) * grey)[known]
    return result


def of_frame(place: Place, values: Tensor) -> np.ndarray:
    """`[P]` values of the patches of a picture, those of one frame: `[height, width]`."""
    return place.provenance.maps(values)[place.frame].numpy()


def _striped(shape: tuple[int, ...]) -> np.ndarray:
    """Dark diagonal stripes, which no picture has."""
    y, x = np.indices(shape[:2])
    stripes = np.where((x + y) % STRIPE < STRIPE // 4, STRIPES, DROPPED)
    return stripes[..., None].repeat(3, axis=2)


def _ranks(importance: Tensor) -> Tensor:
    """`[P]` from 0 for the least important to 1 for the most, NaN where nothing was ranked."""
    ranked = torch.full_like(importance, float("nan"))
    known = ~importance.isnan()
    values, rank = importance[known].unique(return_inverse=True)
    ranked[known] = rank.float() / max(1, len(values) - 1)
    return ranked


def _read_shares(view: View, steps: Steps, shape: tuple[int, ...]) -> np.ndarray:
    """Where tokens stand nowhere in particular: brightness by how much they are made of each patch."""
    shares = np.full((*shape[:2], 1), DROPPED)
    for own, places in view.pictures:
        share = steps[id(own)].share
        bright = (share / share.max().clamp(min=torch.finfo(share.dtype).tiny)).sqrt()
        for place in places:
            grid(shape, place).paint(shares, of_frame(place, DROPPED + (1 - DROPPED) * bright)[..., None])
    return shares
