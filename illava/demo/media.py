"""Uploaded files as pictures and clips, within bounds, and nothing but pictures and clips.

A file is read by what its first bytes say it is, through an open file and never by a name of its own: no
container format that names other files is ever tried.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from illava.errors import UploadError
from illava.extras import required

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
# Where a container's mark stands in its first bytes, and the one demuxer that is tried then.
_CONTAINERS = ((4, b"ftyp", "mp4"), (0, b"\x1a\x45\xdf\xa3", "matroska"), (8, b"AVI ", "avi"))
_READ_BY_MARK = 16


@dataclass(frozen=True)
class Limits:
    """What users may bring along, and how many of them.

    Attributes:
        file_bytes: of one file.
        files: in one question.
        pixels: of a picture or frame as its header says, before anything is decoded.
        picture_side, clip_side: pixels of the longer side to which larger ones are shrunk.
        coded_frames: frames of a video's file.
        clip_frames: frames of a video the model is shown, spread evenly over it.
        question: characters.
        answer_tokens: length of an answer.
        waiting: questions in the queue, of all users together.
        tabs: known at once.
        folder_bytes: of all uploads together.
        unclaimed_seconds: how long an upload waits for a tab to show it.
    """

    file_bytes: int = 32 * 2**20
    files: int = 8
    pixels: int = 50_000_000
    picture_side: int = 2048
    clip_side: int = 768
    coded_frames: int = 5_000
    clip_frames: int = 16
    question: int = 1_000
    answer_tokens: int = 512
    waiting: int = 16
    tabs: int = 64
    folder_bytes: int = 4 * 2**30
    unclaimed_seconds: float = 600.0

    @property
    def request_bytes(self) -> int:
        """Of one upload: all files of a question, and what a browser writes between them."""
        return self.files * self.file_bytes + 2**20


@dataclass(frozen=True)
class Picture:
    """One picture, RGB."""

    name: str
    image: Image.Image


@dataclass(frozen=True)
class Clip:
    """Frames of a video.

    Attributes:
        frames: `[frames, height, width, 3]` uint8.
        fps: frames a second, of those kept.
    """

    name: str
    frames: np.ndarray
    fps: float


def read(file: Path, limits: Limits) -> Picture | Clip:
    """A picture or a clip from a file.

    Raises:
        UploadError: neither, broken, or larger than the limits; its message is for the user.
    """
    size = file.stat().st_size
    if size > limits.file_bytes:
        raise UploadError(
            f"{file.name} has {size / 2**20:.0f} MiB; bring files of at most "
            f"{limits.file_bytes / 2**20:.0f} MiB"
        )
    with file.open("rb") as opened:
        head = opened.read(_READ_BY_MARK)
    for place, mark, container in _CONTAINERS:
        if head[place:].startswith(mark):
            return _clip(file, container, limits)
    return _picture(file, limits)


def _picture(file: Path, limits: Limits) -> Picture:
    pil, ops = required("PIL.Image", "demo"), required("PIL.ImageOps", "demo")
    try:
        with file.open("rb") as opened, pil.open(opened, formats=PICTURE_FORMATS) as image:
            if image.width * image.height > limits.pixels:
                raise _too_large(file, f"{image.width} x {image.height}", limits)
            image.draft("RGB", (limits.picture_side, limits.picture_side))  # JPEG decodes smaller at once
            upright = ops.exif_transpose(image).convert("RGB")
    except UploadError:
        raise
    except pil.DecompressionBombError as error:  # PIL's own bound, above ours
        raise _too_large(file, "far too many", limits) from error
    except Exception as error:  # what a broken file raises is up to each of PIL's readers
        raise UploadError(
            f"{file.name} is no picture or video that can be read here, or it is broken; bring "
            f"{', '.join(PICTURE_FORMATS)}, MP4, WebM, MKV or AVI"
        ) from error
    upright.thumbnail((limits.picture_side, limits.picture_side))
    return Picture(file.name, upright)


def _too_large(file: Path, pixels: str, limits: Limits) -> UploadError:
    most = limits.pixels // 10**6
    return UploadError(f"{file.name} has {pixels} pixels; bring pictures of at most {most} million")


def _clip(file: Path, container: str, limits: Limits) -> Clip:
    av, np = required("av", "demo"), required("numpy", "demo")
    try:
        with file.open("rb") as opened, av.open(opened, format=container) as video:
            stream = video.streams.video[0]
            if stream.width * stream.height > limits.pixels:
                raise UploadError(
                    f"{file.name} has frames of {stream.width} x {stream.height} pixels; bring smaller ones"
                )
            rate = float(stream.average_rate or 24)
            total = sum(packet.size > 0 for packet in video.demux(stream))
            if total > limits.coded_frames:
                raise UploadError(
                    f"{file.name} has {total:,} frames; cut it to at most {limits.coded_frames:,}"
                )
        wanted = set(np.linspace(0, total - 1, min(limits.clip_frames, total)).round().astype(int).tolist())
        frames: list[Any] = []
        with file.open("rb") as opened, av.open(opened, format=container) as video:
            for number, frame in enumerate(video.decode(video=0)):
                if number in wanted:
                    factor = min(1.0, limits.clip_side / max(frame.width, frame.height))
                    size = {"width": round(frame.width * factor), "height": round(frame.height * factor)}
                    frames.append(frame.to_ndarray(format="rgb24", **size))
                if number >= max(wanted):
                    break
        if not frames:
            raise UploadError(f"{file.name} holds no frame that can be decoded; bring another video")
        fps = rate * len(frames) / total
        return Clip(file.name, np.stack(frames), fps if math.isfinite(fps) and fps > 0 else 1.0)
    except UploadError:
        raise
    except Exception as error:  # FFmpeg's errors are many
        raise UploadError(
            f"{file.name} is no video that can be read here, or it is broken; bring MP4 (H.264), WebM, MKV "
            "or AVI"
        ) from error
