"""A smaller picture: what a user would do instead. The model is left alone, the picture is shrunk."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from PIL import Image

from rivals.common import Rival


def size_of(height: int, width: int, final_ratio: float, unit: int) -> tuple[int, int]:
    """Height and width in pixels, whole units, nearest to the share of tokens and then to the aspect."""
    tokens = (height / unit) * (width / unit)
    target = max(1.0, final_ratio * round(height / unit) * round(width / unit))
    aspect = math.log(height / width)
    best = (math.inf, math.inf, 1, 1)
    for rows in range(1, max(2, math.ceil(math.sqrt(tokens)) * 2 + 1)):
        for columns in {max(1, math.floor(target / rows)), max(1, math.ceil(target / rows))}:
            bent = abs(math.log(rows / columns) - aspect)
            # Missing the number of tokens by a tenth is worth bending the picture by nearly a half.
            miss = abs(math.log(rows * columns / target))
            best = min(best, (4 * miss + bent, bent, rows, columns))
    return best[2] * unit, best[3] * unit


def resize(picture: Any, final_ratio: float, unit: int) -> Any:
    """A PIL picture, or the frames `[T, H, W, 3]` of a video all alike, bicubic."""
    if isinstance(picture, Image.Image):
        height, width = size_of(picture.height, picture.width, final_ratio, unit)
        return picture.resize((width, height), Image.Resampling.BICUBIC)
    return np.stack([np.asarray(resize(Image.fromarray(f), final_ratio, unit)) for f in np.asarray(picture)])


RIVAL = Rival(
    "smaller picture",
    "bicubic resampling of the input",
    "input",
    "Works on pictures, by `prepare`: whole tokens in both directions, so their number is the nearest that "
    "keeps the picture's shape. Models that cut pictures into tiles of one size (InternVL) cannot be shown "
    "fewer tokens than one tile has.",
    resize=resize,
)
