"""A picture of noise and a prompt of random words, as a family's processor would give them, without one."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

VISION_START, VISION_END, IMAGE, VIDEO, SLICE_START, SLICE_END, NEWLINE, FIRST_TEXT = range(8)
TILE, PATCH = 448, 14  # of InternVL and MiniCPM-V


@dataclass(frozen=True)
class Picture:
    """A picture in the form that a family's processor gives.

    Attributes:
        ids: its placeholders, and the markers around them.
        tokens: its visual tokens; placeholders for newline features are not counted.
        tensors: its pixels and sizes, by the names of the model's arguments.
    """

    ids: Tensor
    tokens: int
    tensors: dict[str, Tensor]


def noise_inputs(model: Any, size: tuple[int, int], *, text: int = 64) -> tuple[dict[str, Any], int]:
    """Inputs of a model that has no processor: one picture of noise among random words.

    Args:
        model: of any family in transformers, on any device.
        size: height and width in pixels; rounded to what the family can be shown.
        text: tokens of text.

    Returns:
        Inputs by name on the model's device, and the picture's visual tokens.
    """
    config, generator = model.config, torch.Generator().manual_seed(0)
    picture, step = _PICTURES[config.model_type](config)
    height, width = (max(step, round(side / step) * step) for side in size)
    shown = picture(config, (height, width), generator)
    inputs = build_inputs(model, shown, text, str(model.device), model.dtype)
    inputs["input_ids"] = _own_ids(config, inputs["input_ids"])
    return inputs, shown.tokens


def repeated(inputs: dict[str, Any], rows: int) -> dict[str, Any]:
    """The same prompt in every row of a batch."""
    return {name: torch.cat([x] * rows) for name, x in inputs.items()}


def _own_ids(config: Any, ids: Tensor) -> Tensor:
    """The ids that a config has for our markers and placeholders, and none of them among the words."""
    own = {
        marker: next((i for name in names if (i := getattr(config, name, None)) is not None), None)
        for marker, names in _NAMES.items()
    }
    special = {i for i in own.values() if i is not None}
    word = next(i for i in range(FIRST_TEXT, FIRST_TEXT + len(special) + 1) if i not in special)
    taken = torch.isin(ids, torch.tensor(sorted(special), device=ids.device)) & (ids >= FIRST_TEXT)
    result = torch.where(taken, word, ids)
    for marker, i in own.items():
        result[ids == marker] = word if i is None else i
    return result


def build_inputs(
    model: nn.Module, picture: Picture, text: int, device: str, dtype: torch.dtype
) -> dict[str, Any]:
    """A picture between `text` tokens of text."""
    vocabulary = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(FIRST_TEXT, vocabulary, (text,), generator=generator)
    ids = torch.cat([words[: text // 2], picture.ids, words[text // 2 :]])[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **picture.tensors}
    if "mm_token_type_ids" in inspect.signature(type(model).forward).parameters:  # transformers 5.x
        inputs["mm_token_type_ids"] = (ids == IMAGE).long()
    return {k: x.to(device, dtype if x.is_floating_point() else x.dtype) for k, x in inputs.items()}


def qwen_picture(config: Any, size: tuple[int, int], generator: torch.Generator) -> Picture:
    """Patches flattened and packed, each twice for the two frames of a patch in time."""
    vision = config.vision_config
    height, width = (side // vision.patch_size for side in size)
    channels = 3 * vision.temporal_patch_size * vision.patch_size**2
    tokens = height * width // vision.spatial_merge_size**2
    pixels = torch.randn(height * width, channels, generator=generator)
    grid = torch.tensor([[1, height, width]])
    return Picture(marked(tokens), tokens, {"pixel_values": pixels, "image_grid_thw": grid})


def internvl_picture(config: Any, size: tuple[int, int], generator: torch.Generator) -> Picture:
    """Tiles, and a thumbnail of the whole where there are several."""
    side = config.vision_config.image_size
    side = side if isinstance(side, int) else side[0]
    tiles = max(1, size[0] * size[1] // side**2)
    tiles += tiles > 1
    pixels = torch.randn(tiles, 3, side, side, generator=generator)
    tokens = tiles * config.image_seq_length
    return Picture(marked(tokens), tokens, {"pixel_values": pixels})


def llava_picture(config: Any, size: tuple[int, int], generator: torch.Generator) -> Picture:
    """A thumbnail and the tiles that fit best, features of their padding cropped, a newline per row.

    Raises:
        ValueError: a picture so large that the model would shrink its features.
    """
    vision = config.vision_config
    tile, side = vision.image_size, vision.image_size // vision.patch_size
    rows, columns, height, width = llava_grid(config, size)
    if rows * columns > 9:
        raise ValueError(f"a picture of {size} pixels takes {rows} x {columns} tiles; give one of at most 9")
    tokens = side**2 + height * width
    tensors = {
        "pixel_values": torch.randn(1, rows * columns + 1, 3, tile, tile, generator=generator),
        "image_sizes": torch.tensor([size]),
    }
    if config.model_type == "llava_onevision":
        tensors["batch_num_images"] = torch.tensor([1])
    return Picture(torch.full((tokens + height,), IMAGE), tokens, tensors)


def llava_grid(config: Any, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Rows and columns of tiles of a picture, and of patches that are left of them without padding."""
    from transformers.image_processing_utils import select_best_resolution
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    tile, patch = config.vision_config.image_size, config.vision_config.patch_size
    rows, columns = (length // tile for length in select_best_resolution(size, config.image_grid_pinpoints))
    side = tile // patch
    _, height, width = unpad_image(torch.zeros(1, rows * side, columns * side), size).shape
    return rows, columns, height, width


def minicpm_picture(config: Any, size: tuple[int, int], generator: torch.Generator) -> Picture:
    """A thumbnail and, if the picture is larger than one tile, its slices, with a newline per row."""
    del config
    token = 4 * PATCH  # pixels along a side of what becomes one token
    shrink = min(1.0, TILE / math.sqrt(size[0] * size[1]))
    grids = [tuple(round(side * shrink / token) * 4 for side in size)]
    ids = [marked(grids[0][0] * grids[0][1] // 16)]
    rows, columns = (side // TILE for side in size)
    if rows * columns > 1:
        grid = TILE // PATCH, TILE // PATCH
        grids += [grid] * (rows * columns)
        line = [marked(grid[0] * grid[1] // 16, SLICE_START, SLICE_END)] * columns
        for row in range(rows):
            ids += line if row == 0 else [torch.tensor([NEWLINE]), *line]
    patches = sum(height * width for height, width in grids)
    pixels = torch.randn(1, 3, PATCH, PATCH * patches, generator=generator)
    tensors = {"pixel_values": pixels, "target_sizes": torch.tensor(grids, dtype=torch.int32)}
    return Picture(torch.cat(ids), patches // 16, tensors)


def marked(tokens: int, start: int = VISION_START, end: int = VISION_END) -> Tensor:
    """Placeholders of one picture between markers."""
    return torch.tensor([start, *[IMAGE] * tokens, end])


# What the families call our markers and placeholders.
_NAMES = {
    VISION_START: ("vision_start_token_id", "image_start_id"),
    VISION_END: ("vision_end_token_id", "image_end_id"),
    IMAGE: ("image_token_id", "image_token_index"),
    VIDEO: ("video_token_id", "video_token_index"),
    SLICE_START: ("slice_start_id",),
    SLICE_END: ("slice_end_id",),
    NEWLINE: ("newline_id",),
}


def _qwen(config: Any) -> tuple[Any, int]:
    return qwen_picture, config.vision_config.patch_size * config.vision_config.spatial_merge_size


# Of each architecture, its picture and what a picture's sides are multiples of, in pixels.
_PICTURES: dict[str, Any] = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"), _qwen),
    **dict.fromkeys(("llava_next", "llava_onevision"), lambda config: (llava_picture, 1)),
    **dict.fromkeys(("minicpmv4_6", "minicpmv4_7"), lambda config: (minicpm_picture, TILE)),
    "internvl": lambda config: (internvl_picture, 1),
}
