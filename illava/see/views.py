"""Where on the pictures the encoder's frames lie: whole, as tiles, as slices, with padding around them.

A processor cuts a picture up before the model is called, and the call does not say how. From the number of
tiles and the picture's shape it follows as the family's processor decides it (`illava.families.cutting`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from illava.errors import PictureError
from illava.families import cutting
from illava.provenance import Provenance
from illava.see.given import Shown
from illava.see.tiles import WHOLE, Box, grouped, laid_out

REMEDY = (
    "pass those of one batch row (row=0 says which) as they went into the processor, a video as a list of "
    "its frames"
)


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

    @property
    def pictures(self) -> list[tuple[Provenance, list[Place]]]:
        """Each provenance on it (a slice may have its own), and which of the frames are its."""
        found: dict[int, tuple[Provenance, list[Place]]] = {}
        for place in self.places:
            found.setdefault(id(place.provenance), (place.provenance, []))[1].append(place)
        return list(found.values())


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
    knows_videos = any(p.kind == "video" for p in own)
    for kind in ("image", "video"):
        ours = [p for p in own if p.kind == kind]
        theirs = [x for x in shown if (knows_videos and isinstance(x, list)) == (kind == "video")]
        if kind == "video" and not _slices(ours):
            _check_number(len(ours), kind, len(theirs))
            for number, (one, video) in enumerate(zip(ours, theirs, strict=True)):
                found += _of_video(_prefix(number, theirs), one, video, most_frames)
        else:
            found += _of_pictures(kind, ours, theirs, most_frames)
    return found


def _of_pictures(
    kind: str, own: Sequence[Provenance], shown: Sequence[Shown], most_frames: int
) -> list[View]:
    """Pictures, and videos whose frames were encoded as pictures."""
    flat = [picture for one in shown for picture in (one if isinstance(one, list) else [one])]
    groups = grouped(own, flat) if _slices(own) else [[p] for p in own]
    if groups is None:
        raise PictureError(
            f"the report tells of {len(own)} pictures and slices of pictures, and they are not those of the "
            f"{len(flat)} that came to be drawn; {REMEDY}"
        )
    _check_number(len(groups), kind, len(flat))
    found: list[View] = []
    for number, one in enumerate(shown):
        if isinstance(one, list):
            ours, groups = groups[: len(one)], groups[len(one) :]
            for i in _spread(len(one), most_frames):
                found += _of_picture(f"{_prefix(number, shown)}frame {i + 1}", ours[i], one[i])
        else:
            name = "picture" if len(shown) == 1 else f"picture {number + 1}"
            found += _of_picture(name, groups.pop(0), one)
    return found


def _check_number(known: int, kind: str, given: int) -> None:
    if known != given:
        raise PictureError(
            f"the report tells of {known} {kind}{'' if known == 1 else 's'}, and {given} came to be drawn; "
            f"{REMEDY}"
        )


def _prefix(number: int, shown: Sequence[Shown]) -> str:
    return "" if len(shown) == 1 else f"video {number + 1}, "


def _spread(number: int, most: int) -> list[int]:
    """At most so many of a number of frames, evenly."""
    drawn = min(most, number)
    return [i * number // drawn for i in range(drawn)]


def _slices(own: Sequence[Provenance]) -> bool:
    return any(cutting(p.model_type).slices for p in own)


def _of_picture(name: str, group: Sequence[Provenance], picture: Image.Image) -> list[View]:
    """The whole and, where it was cut up as well, its tiles."""
    _check_known(group)
    frames = [Place(p, i) for p in group for i in range(len(p.frames))]
    if len(frames) == 1:
        _check_shape(frames[0], picture)
        return [View(name, picture, tuple(frames))]
    cut = cutting(group[0].model_type)
    if cut.whole is None:
        raise PictureError(
            f"how {group[0].model_type} lays {len(frames)} tiles on a picture is not known; draw each of "
            "them from `report.provenance`, or report this at the project's issue tracker"
        )
    whole, *tiles = frames if cut.whole == "first" else [frames[-1], *frames[:-1]]
    _check_shape(whole, picture)
    canvas, boxes = laid_out(picture, len(tiles), padded=cut.padded)
    laid = tuple(Place(x.provenance, x.frame, box) for x, box in zip(tiles, boxes, strict=True))
    return [View(f"{name}, whole", picture, (whole,)), View(f"{name}, {len(tiles)} tiles", canvas, laid)]


def _of_video(prefix: str, own: Provenance, frames: Shown, most: int) -> list[View]:
    """A view of each of at most so many frames that the encoder saw; one may be several of the video's."""
    _check_known([own])
    frames = frames if isinstance(frames, list) else [frames]
    seen = len(own.frames)
    if len(frames) < seen:
        raise PictureError(
            f"the encoder saw {seen} frames or pairs of frames of the video, and {len(frames)} came to be "
            "drawn; pass those that the processor took"
        )
    found = []
    for i in _spread(seen, most):
        start, end = (j * len(frames) // seen for j in (i, i + 1))
        which = f"frame {end}" if end - start == 1 else f"frames {start + 1}–{end}"
        _check_shape(Place(own, i), frames[start])
        found.append(View(prefix + which, frames[start], (Place(own, i),)))
    return found


def _check_known(group: Sequence[Provenance]) -> None:
    if not all(p.known for p in group):
        raise PictureError(
            "the picture's features came from the caller, so nobody knows which patches its tokens are made "
            "of; pass the pixels with the prompt, or have the patched model encode them"
        )


def _check_shape(place: Place, picture: Image.Image) -> None:
    """Where a family keeps a picture's shape, whether it is this one's but for rounding to whole units."""
    own = place.provenance
    if not cutting(own.model_type).keeps_shape:
        return
    rows, columns = (length // own.unit_side for length in own.frames[place.frame])
    width, height = picture.size
    if (columns - 1) * height > (rows + 1) * width or (rows - 1) * width > (columns + 1) * height:
        patches = "{}x{}".format(*own.frames[place.frame])
        raise PictureError(
            f"a picture {height} pixels high and {width} wide came to be drawn, where the report tells of "
            f"{patches} patches, which is another shape; {REMEDY}"
        )
