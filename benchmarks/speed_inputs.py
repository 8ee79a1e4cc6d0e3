"""What the models of speed.py are shown: one picture, several, or a video, of about so many visual tokens.

Sizes are what the family can take: Qwen any rectangle of 28 pixels, InternVL whole tiles of 256 tokens,
LLaVA tiles of 729 and what is left of them without padding, 196 tokens per video frame. Each row of a
batch is shown the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from illava.evaluate.synthetic import (
    IMAGE,
    TILE,
    VIDEO,
    VISION_END,
    VISION_START,
    Picture,
    build_inputs,
    llava_grid,
    llava_picture,
    marked,
    qwen_picture,
)

PICTURE, PICTURES, VIDEO_CLIP = "picture", "pictures", "video"
CONTENTS = (PICTURE, PICTURES, VIDEO_CLIP)
# How far the tokens of what a family can be shown may be from those asked for.
NEAR = 1.8


@dataclass(frozen=True)
class Shown:
    """What one row of a batch is asked to be shown.

    Attributes:
        content: one of `CONTENTS`.
        tokens: visual tokens, about.
        count: how many pictures, or frames of the video.
    """

    content: str
    tokens: int
    count: int = 1


@dataclass(frozen=True)
class Batch:
    """A call's arguments.

    Attributes:
        inputs: by name, on the device.
        rows: how many prompts.
        tokens: visual tokens of each.
        length: tokens of each prompt.
    """

    inputs: dict[str, Any]
    rows: int
    tokens: int
    length: int


def show(
    model: nn.Module,
    family: str,
    shown: Shown,
    rows: int,
    text: int,
    device: str,
    dtype: torch.dtype,
    near: float = NEAR,
) -> Batch | None:
    """A batch of equal prompts; `None` if the family can be shown nothing near that size."""
    generator = torch.Generator().manual_seed(0)
    content = _SHOWN[family](model.config, shown, generator)
    if content is None or not 1 / near <= content.tokens / shown.tokens <= near:
        return None
    inputs = build_inputs(model, content, text, device, dtype)
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] += 2 * (inputs["input_ids"] == VIDEO)
    length = inputs["input_ids"].shape[1]
    inputs = {name: torch.cat([x] * rows) for name, x in inputs.items()}
    return Batch(inputs, rows, content.tokens, length)


def rectangle(units: int) -> tuple[int, int]:
    """Sides of the rectangle, at most 5 : 2, whose area comes nearest; of equals the squarest."""
    sides = []
    for height in range(1, math.isqrt(units) + 1):
        width = max(height, round(units / height))
        if width <= 2.5 * height or units < 3:
            sides.append((abs(height * width - units), width - height, (height, width)))
    return min(sides)[2] if sides else (1, units)


def _joined(pictures: Sequence[Picture]) -> Picture:
    """Several pictures, one after the other."""
    names = pictures[0].tensors
    tensors = {name: torch.cat([p.tensors[name] for p in pictures]) for name in names}
    return Picture(torch.cat([p.ids for p in pictures]), sum(p.tokens for p in pictures), tensors)


def _qwen(config: Any, shown: Shown, generator: torch.Generator) -> Picture:
    vision = config.vision_config
    side = vision.patch_size * vision.spatial_merge_size
    if shown.content != VIDEO_CLIP:
        height, width = rectangle(max(1, round(shown.tokens / shown.count)))
        size = height * side, width * side
        return _joined([qwen_picture(config, size, generator) for _ in range(shown.count)])
    frames = max(1, shown.count // vision.temporal_patch_size)
    height, width = (2 * x for x in rectangle(max(1, round(shown.tokens / frames))))
    channels = 3 * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(frames * height * width, channels, generator=generator)
    tokens = frames * height * width // vision.spatial_merge_size**2
    ids = torch.tensor([VISION_START, *[VIDEO] * tokens, VISION_END])
    grid = torch.tensor([[frames, height, width]])
    return Picture(ids, tokens, {"pixel_values_videos": pixels, "video_grid_thw": grid})


def _internvl(config: Any, shown: Shown, generator: torch.Generator) -> Picture:
    """A picture's tiles and its thumbnail are tiles alike; a video is a picture of one tile per frame."""
    per_tile = config.image_seq_length
    tiles = 1
    if shown.content != VIDEO_CLIP:
        tiles = max(1, round(shown.tokens / shown.count / per_tile))
    tokens = tiles * per_tile
    pixels = torch.randn(tiles * shown.count, 3, TILE, TILE, generator=generator)
    ids = torch.cat([marked(tokens)] * shown.count)
    return Picture(ids, tokens * shown.count, {"pixel_values": pixels})


def _llava(config: Any, shown: Shown, generator: torch.Generator) -> Picture:
    vision = config.vision_config
    tile, side = vision.image_size, vision.image_size // vision.patch_size
    pixels = torch.randn(1, shown.count, 3, tile, tile, generator=generator)
    if shown.content == VIDEO_CLIP:
        tokens = shown.count * math.ceil(side / 2) ** 2
        ids = torch.full((tokens + 1,), VIDEO)  # and a newline at its end
        return Picture(ids, tokens, {"pixel_values_videos": pixels})
    if shown.content == PICTURE:
        return llava_picture(config, _llava_size(config, shown.tokens), generator)
    sizes = torch.tensor([[tile, tile]] * shown.count)
    tensors = {
        "pixel_values": pixels.transpose(0, 1),  # of several pictures each is one tile
        "image_sizes": sizes,
        "batch_num_images": torch.tensor([shown.count]),
    }
    return Picture(torch.full((shown.count * (side**2 + 1),), IMAGE), shown.count * side**2, tensors)


def _llava_size(config: Any, tokens: int) -> tuple[int, int]:
    """The size whose thumbnail and unpadded tiles, at most nine, come nearest."""
    tile = config.vision_config.image_size
    side = tile // config.vision_config.patch_size
    best, found = math.inf, (tile, tile)
    for rows in range(1, 7):
        for columns in range(1, 9 // rows + 1):
            for eighths in range(1, 9):
                height = tile * (rows - 1) + tile * eighths // 8
                grid = llava_grid(config, (height, tile * columns))
                left = abs(side**2 + grid[2] * grid[3] - tokens)
                if grid[0] * grid[1] <= 9 and left < best:
                    best, found = left, (height, tile * columns)
    return found


_SHOWN: dict[str, Callable[[Any, Shown, torch.Generator], Picture | None]] = {
    "qwen": _qwen,
    "internvl": _internvl,
    "llava": _llava,
}
