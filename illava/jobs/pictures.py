"""Files decoded: pictures by PIL, videos by PyAV through transformers' own reader."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from illava.errors import MissingExtraError
from illava.extras import pillow, required
from illava.jobs.items import Item, Skipped

DEFAULT_FRAMES = 16


def pixels_of(item: Item | Skipped) -> int:
    """Pixels of an item's pictures by their headers, to tell which items fill a batch evenly.

    A video counts by its file's size, above every picture; what cannot be read counts as 0: decoding it is
    what says why.
    """
    if isinstance(item, Skipped):
        return 0
    image = pillow().Image
    pixels = 0
    try:
        for file in item.images:
            with image.open(file) as opened:
                pixels += opened.width * opened.height
        return pixels + sum((1 << 40) + file.stat().st_size for file in item.videos)
    except Exception:  # what a broken header raises is up to each of PIL's readers
        return 0


def decode(item: Item | Skipped, frames: int = DEFAULT_FRAMES) -> Item | Skipped:
    """An item with its `pictures` and `clips`, or the reason why one of them cannot be read.

    Args:
        frames: how many frames of a video, spread evenly over it.

    Raises:
        MissingExtraError: PIL, PyAV or transformers is not installed.
    """
    if isinstance(item, Skipped):
        return item
    pillow()
    if item.videos:
        required("av", "jobs")
    pictures, clips = [], []
    for file in (*item.images, *item.videos):
        try:
            if file in item.images:
                pictures.append(_picture(file))
            else:
                clips.append(read_clip(file, frames))
        except MissingExtraError:
            raise
        except Exception as error:  # what a broken file raises is up to each reader
            return Skipped(item.key, item.source, _reason(file, error))
    return replace(item, pictures=tuple(pictures), clips=tuple(clips))


def _picture(file: Path) -> Any:
    pil = pillow()
    with pil.Image.open(file) as opened:
        return pil.ImageOps.exif_transpose(opened).convert("RGB")


def read_clip(file: Path, frames: int = DEFAULT_FRAMES) -> tuple[Any, Any]:
    """Frames `[frames, height, width, 3]` uint8 of a video, spread evenly over it, and its metadata.

    Raises whatever the reader raises for a file that it cannot read.
    """
    reader = required("transformers.video_utils", "jobs")
    import numpy as np

    if not file.is_file():
        raise FileNotFoundError

    def indices(metadata: Any, **_: Any) -> Any:
        # Some containers do not say how many frames they hold.
        metadata.total_num_frames = metadata.total_num_frames or _frames_counted(file)
        total = metadata.total_num_frames
        return np.linspace(0, total - 1, min(frames, total)).round().astype(int)

    return reader.load_video(str(file), sample_indices_fn=indices, backend="pyav")


def clip_options(clips: Sequence[tuple[Any, Any]]) -> dict[str, Any]:
    """What a processor is told of clips, each as `read_clip` gives it."""
    return {
        "videos": [frames for frames, _ in clips],
        "video_metadata": [about for _, about in clips],
        "do_sample_frames": False,
    }


def correct_times(inputs: MutableMapping[str, Any], processor: Any, clips: Sequence[tuple[Any, Any]]) -> None:
    """Write into a processor's inputs how many seconds lie between the frames of each clip.

    Where a model places frames by time (Qwen2.5-VL), the processor of transformers 4.57 takes every clip for
    one of two frames a second, whatever its metadata say; that of 5.x says what is written here.
    """
    times = inputs.get("second_per_grid_ts")
    if times is None or any(about.fps is None for _, about in clips):
        return
    joined = processor.video_processor.temporal_patch_size  # frames that become one
    rates = [about.fps * len(frames) / (about.total_num_frames or len(frames)) for frames, about in clips]
    inputs["second_per_grid_ts"] = times.new_tensor([joined / rate for rate in rates])


def _frames_counted(file: Path) -> int:
    with required("av", "jobs").open(str(file)) as container:
        return sum(1 for packet in container.demux(video=0) if packet.size)


def _reason(file: Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{file} does not exist"
    if isinstance(error, IsADirectoryError):
        return f"{file} is a folder"
    if isinstance(error, PermissionError):
        return f"{file} may not be read"
    if type(error).__name__ == "UnidentifiedImageError":
        return f"{file} is no picture that PIL can read"
    return f"{file} cannot be read: {error or type(error).__name__}"
