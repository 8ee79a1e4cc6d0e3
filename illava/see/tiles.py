"""How a picture's tiles and slices lie on it, told from its shape and their number."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image

from illava.provenance import Provenance

# Left, top, right and bottom, as shares of the drawn picture's width and height.
Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
PADDING = (0, 0, 0)  # what processors pad with


def laid_out(picture: Image.Image, tiles: int, *, padded: bool) -> tuple[Image.Image, list[Box]]:
    """The picture as its tiles show it, with padding around it if need be, and where each tile lies."""
    columns, rows = grid_of(picture.width / picture.height, tiles, padded=padded)
    boxes = [
        (c / columns, r / rows, (c + 1) / columns, (r + 1) / rows)
        for r in range(rows)
        for c in range(columns)
    ]
    if not padded:
        return picture, boxes
    scale = max(picture.width / columns, picture.height / rows)
    canvas = Image.new("RGB", (round(columns * scale), round(rows * scale)), PADDING)
    canvas.paste(picture, ((canvas.width - picture.width) // 2, (canvas.height - picture.height) // 2))
    return canvas, boxes


def grid_of(shape: float, tiles: int, *, padded: bool) -> tuple[int, int]:
    """Columns and rows of square tiles for a picture whose width is `shape` times its height.

    Args:
        padded: whether the picture is fitted into them, so that least is wasted; otherwise it is stretched
            over them, so that it keeps its shape best.
    """

    def loss(columns: int) -> float:
        other = columns * columns / tiles  # columns by rows
        if padded:
            return -min(shape / other, other / shape)
        return abs(math.log(shape / other))

    columns = min((c for c in range(1, tiles + 1) if tiles % c == 0), key=loss)
    return columns, tiles // columns


def grouped(own: Sequence[Provenance], shown: Sequence[Image.Image]) -> list[list[Provenance]] | None:
    """Which of the slices in a row belong to which picture, by their shapes; `None` if they cannot.

    A picture is its whole, and slices of one size that together have its shape.
    """
    best: dict[tuple[int, int], tuple[float, list[int]]] = {(0, 0): (0.0, [])}
    for number, picture in enumerate(shown):
        for end in range(number + 1, len(own) + 1):
            choices = [
                (
                    best[number, start][0] + _unlikeness(own[start:end], picture),
                    [*best[number, start][1], end],
                )
                for start in range(number, end)
                if (number, start) in best
            ]
            if choices:
                best[number + 1, end] = min(choices)
    if (len(shown), len(own)) not in best:
        return None
    ends = best[len(shown), len(own)][1]
    return [list(own[a:b]) for a, b in zip([0, *ends], ends, strict=False)]


def _unlikeness(own: Sequence[Provenance], picture: Image.Image) -> float:
    """How far a whole and slices are from a picture's shape."""
    shape = picture.width / picture.height
    sizes = [p.frames[0] for p in own]
    far = abs(math.log(sizes[0][1] / sizes[0][0] / shape))
    if len(own) == 1:
        return far
    if len({*sizes[1:]}) > 1 or len(own) == 2:
        return math.inf
    columns, rows = grid_of(shape, len(own) - 1, padded=False)
    height, width = sizes[1]
    return far + abs(math.log(width * columns / (height * rows) / shape))
