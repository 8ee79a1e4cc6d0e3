"""What a caller gave to be drawn, as pictures and videos."""

from __future__ import annotations

import numpy as np
from PIL import Image

from illava.errors import PictureError

# A picture, or the frames of a video.
Shown = Image.Image | list[Image.Image]


def as_pictures(given: object, *, video: bool) -> list[Shown]:
    """What a caller gave, as pictures and videos.

    Args:
        given: a picture (PIL, or an array `[height, width, 3]` of uint8), a video (a list of pictures, or an
            array `[frames, height, width, 3]`), or a list of such.
        video: whether the report tells of videos alone, so that a list of pictures is the frames of one.

    Raises:
        PictureError: none of these, or lists deeper than videos in a list.
    """
    if isinstance(given, list | tuple) and not (video and all(_is_picture(x) for x in given)):
        return [_shown(x) for x in given]
    return [_shown(given)]


def _is_picture(given: object) -> bool:
    return isinstance(given, Image.Image) or getattr(given, "ndim", 0) == 3


def _shown(given: object) -> Shown:
    if isinstance(given, Image.Image):
        return given.convert("RGB")
    if isinstance(given, list | tuple):
        return [_frame(x) for x in given]
    array = np.asarray(given)
    if array.dtype == np.uint8 and array.ndim in (3, 4) and array.shape[-1] == 3:
        return Image.fromarray(array) if array.ndim == 3 else [Image.fromarray(x) for x in array]
    what = f"{type(given).__name__} of {array.dtype} and shape {array.shape}"
    raise PictureError(
        "a picture is a PIL image or an array [height, width, 3] of uint8, a video a list of them or an "
        f"array [frames, height, width, 3]; got {what}"
    )


def _frame(given: object) -> Image.Image:
    """One of a video's."""
    shown = _shown(given)
    if isinstance(shown, list):
        raise PictureError(
            "a list of pictures in a list is a video, and one of its frames is itself a list of "
            f"{len(shown)}; pass those of one batch row (row= says which) as a list of pictures and videos, "
            "no deeper"
        )
    return shown
