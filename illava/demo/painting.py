"""A picture with the state of its patches painted over it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from illava.demo.media import Clip, Picture
from illava.provenance import GONE, RECYCLED, Provenance

SIDE = 448  # pixels of a painted frame's longer side
ORANGE, BLUE = (230, 159, 0), (0, 114, 178)  # of Okabe and Ito, told apart by everyone
PAPER = (246, 247, 249)
MOST_FRAMES = 8


def frames_of(item: Picture | Clip) -> list[Any]:
    """A picture, or frames of a clip, at the size they are painted."""
    images = [item.image] if isinstance(item, Picture) else [Image.fromarray(f) for f in item.frames]
    return [_sized(image) for image in images]


def _sized(image: Any) -> Any:
    factor = SIDE / max(image.size)
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.LANCZOS)


def paint(frames: Sequence[Any], history: Provenance, number: int) -> list[Any]:
    """Frames after merge `number`."""
    step = history.merges[number]
    states = history.maps(step.state)
    absorbed = history.maps(step.absorbed)
    stride = max(1, len(frames) // len(states))
    return [
        _paint(frame, state.numpy(), taken.numpy(), history.unit_side)
        for frame, state, taken in zip(frames[::stride], states, absorbed, strict=False)
    ]


def _paint(frame: Any, state: Any, absorbed: Any, unit: int) -> Any:
    pixels = np.asarray(frame, np.float32)
    rows = np.arange(pixels.shape[0]) * state.shape[0] // pixels.shape[0]
    columns = np.arange(pixels.shape[1]) * state.shape[1] // pixels.shape[1]
    state, absorbed = state[rows][:, columns], absorbed[rows][:, columns]
    grey = pixels.mean(-1, keepdims=True)
    gone = (state == GONE) & ~absorbed
    pixels = np.where(gone[..., None], 0.12 * grey + 0.88 * np.array(PAPER), pixels)
    pixels = np.where(
        absorbed[..., None], 0.15 * grey + 0.4 * np.array(PAPER) + 0.45 * np.array(ORANGE), pixels
    )
    recycled = state == RECYCLED
    edge = np.zeros_like(recycled)
    for shift in range(1, 4):
        for axis in (0, 1):
            for way in (-shift, shift):
                edge |= recycled & ~np.roll(recycled, way, axis)
    pixels[edge] = BLUE
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
