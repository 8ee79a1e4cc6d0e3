"""Where on the pictures the encoder's frames lie: whole, as tiles, as slices, with padding around them.

A processor cuts a picture up before the model is called, and the call does not say how. From the number of
tiles and the picture's shape it follows as the family's processor decides it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from illava.errors import PictureError
from illava.provenance import Provenance

# Left, top, right and bottom, as shares of the drawn picture's width and height.
Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
# Families whose processors put a thumbnail of the whole behind its tiles, or ahead of them.
THUMBNAIL_LAST = ("internvl", "internvl_chat")
THUMBNAIL_FIRST = ("llava_next", "llava_onevision")
# Families that encode the whole and its slices as pictures of their own.
SLICING = ("minicpmv", "minicpmv4_6", "minicpmv4_7")
PADDING = (128, 128, 128)


@dataclass(frozen=True)
class Place:
    """One frame on a picture: the provenance it belongs to, which of its frames it is, and where it lies."""

    provenance: Provenance
    frame: int
    box: Box = WHOLE


@dataclass(frozen=True)
class View:
    """One picture to draw, and the frames on it."""

    name: str
    picture: Image.Image
    places: tuple[Place, ...]


# A picture, or the frames of a video.
Shown = Image.Image | list[Image.Image]


def views(own: Sequence[Provenance], shown: Sequence[Shown], most_frames: int) -> list[View]:
    """What to draw for the pictures of one batch row.

    Args:
        own: their provenance in the report's order.
        shown: the pictures and videos as they were given to the processor, in the prompt's order.
        most_frames: how many frames of a video to draw at most, evenly spread.

    Raises:
        PictureError: others than those of the report, or as many frames as it does not know.
    """
    found: list[View] = []
    kinds = {kind: [p for p in own if p.kind == kind] for kind in ("image", "video")}
    pictures = [x for x in shown if isinstance(x, Image.Image)]
    videos = [x for x in shown if not isinstance(x, Image.Image)]
    if videos and not kinds["video"]:  # a family that takes its frames for pictures
        pictures = [frame for x in shown for frame in (x if isinstance(x, list) else [x])]
        videos = []
    for (kind, ours), theirs in zip(kinds.items(), (pictures, videos), strict=True):
        groups = _grouped(ours, theirs) if theirs and _slices(ours) else [[p] for p in ours]
        if len(groups) != len(theirs):
            raise PictureError(
                f"the report tells of {len(groups)} {kind}{'' if len(groups) == 1 else 's'}, and {len(theirs)} "
                "came to be drawn; pass those of one batch row (row=0 says which) as they went into the "
                "processor, a video as a list of its frames"
            )
        for number, (group, one) in enumerate(zip(groups, theirs, strict=True)):
            name = kind if len(theirs) == 1 else f"{kind} {number + 1}"
            if isinstance(one, list):
                found += _of_video("" if len(theirs) == 1 else f"{name}, ", group, one, most_frames)
            else:
                found += _of_picture(name, group, one)
    return found


def _slices(own: Sequence[Provenance]) -> bool:
    return any(p.model_type in SLICING for p in own)


def _of_picture(name: str, group: Sequence[Provenance], picture: Image.Image) -> list[View]:
    """The whole and, where it was cut up as well, its tiles."""
    frames = [Place(p, i) for p in group for i in range(len(p.frames))]
    if not group[0].known:
        raise PictureError(
            "the picture's features came from the caller, so nobody knows which patches its tokens are made "
            "of; pass the pixels with the prompt, or have the patched model encode them"
        )
    if len(frames) == 1:
        return [View(name, picture, tuple(frames))]
    family = group[0].model_type
    if family in THUMBNAIL_LAST:
        *tiles, whole = frames
    elif family in (*THUMBNAIL_FIRST, *SLICING):
        whole, *tiles = frames
    else:
        raise PictureError(
            f"how {family} lays {len(frames)} tiles on a picture is not known; draw each of them from "
            "`report.provenance`, or report this at the project's issue tracker"
        )
    canvas, boxes = _laid_out(picture, len(tiles), padded=family in THUMBNAIL_FIRST)
    cut = tuple(Place(x.provenance, x.frame, box) for x, box in zip(tiles, boxes, strict=True))
    return [View(f"{name}, whole", picture, (whole,)), View(f"{name}, {len(tiles)} tiles", canvas, cut)]


def _of_video(name: str, group: Sequence[Provenance], frames: list[Image.Image], most: int) -> list[View]:
    """A view for each of at most so many frames the encoder saw, each of which may be several of the video's."""
    places = [Place(p, i) for p in group for i in range(len(p.frames))]
    if not places or len(frames) < len(places):
        raise PictureError(
            f"the encoder saw {len(places)} frames or pairs of frames of the video, and {len(frames)} came to be "
            "drawn; pass those that the processor took"
        )
    drawn = min(most, len(places))
    chosen = [i * len(places) // drawn for i in range(drawn)]
    own = [i * len(frames) // len(places) for i in chosen]
    return [View(f"{name}frame {f + 1}", frames[f], (places[i],)) for i, f in zip(chosen, own, strict=True)]


def _laid_out(picture: Image.Image, tiles: int, *, padded: bool) -> tuple[Image.Image, list[Box]]:
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


def _grouped(own: Sequence[Provenance], shown: Sequence[Shown]) -> list[list[Provenance]]:
    """Which of the slices in a row belong to which picture or video, by their shapes.

    A picture is its whole, and slices of one size that together have its shape; a video is frames.
    """
    if len(shown) == 1:
        return [list(own)]
    if isinstance(shown[0], list):
        counts = [len(x) for x in shown if isinstance(x, list)]
        if len(set(counts)) == 1 and len(own) % len(shown) == 0:
            size = len(own) // len(shown)
            return [list(own[i * size : (i + 1) * size]) for i in range(len(shown))]
        return []
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
        return []
    ends = best[len(shown), len(own)][1]
    return [list(own[a:b]) for a, b in zip([0, *ends], ends, strict=False)]


def _unlikeness(own: Sequence[Provenance], picture: Shown) -> float:
    """How far a whole and slices are from a picture's shape."""
    if isinstance(picture, list):
        return math.inf
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


def as_pictures(given: object, *, video: bool) -> list[Shown]:
    """What a caller gave, as pictures and videos.

    Args:
        given: a picture (PIL, or an array `[height, width, 3]` of uint8), a video (a list of pictures, or an
            array `[frames, height, width, 3]`), or a list of such.
        video: whether the report tells of a single video, so that a list of pictures is its frames.

    Raises:
        PictureError: none of these.
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
        frames = [_shown(x) for x in given]
        return [x for x in frames if isinstance(x, Image.Image)]
    array = np.asarray(given)
    if array.dtype == np.uint8 and array.ndim in (3, 4) and array.shape[-1] == 3:
        return Image.fromarray(array) if array.ndim == 3 else [Image.fromarray(x) for x in array]
    what = f"{type(given).__name__} of {array.dtype} and shape {array.shape}"
    raise PictureError(
        f"a picture is a PIL image or an array [height, width, 3] of uint8, a video a list of them or an array "
        f"[frames, height, width, 3]; got {what}"
    )
