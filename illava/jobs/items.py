"""What a job is about: items read one by one from a folder of pictures or a JSONL file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

from illava.errors import DataError
from illava.extras import pillow

DEFAULT_PROMPT = "Describe the picture."
VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm"})
_SHOWN = 60  # characters of a broken line in its reason


@dataclass(frozen=True)
class Item:
    """One prompt with its pictures and videos.

    Attributes:
        key: tells it from all others, and is the same when the same data is read again.
        images, videos: files.
        prompt: what is asked.
        source: where it comes from, for people: `"pictures/cat.jpg"`, `"questions.jsonl:17"`.
        pictures: the images decoded, `PIL.Image.Image` in RGB and upright; filled in by `decode`, and so
            in every item that a job's work is given.
        clips: the videos decoded likewise, each a pair of frames `[frames, height, width, 3]` uint8 and
            the `transformers.video_utils.VideoMetadata` that a processor takes as `video_metadata`.
    """

    key: str
    images: tuple[Path, ...]
    videos: tuple[Path, ...]
    prompt: str
    source: str
    pictures: tuple[Any, ...] = ()
    clips: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Skipped:
    """An item that cannot be had, and why; `key` and `source` as an `Item`'s."""

    key: str
    source: str
    reason: str


def read_items(path: str | Path, *, prompt: str = DEFAULT_PROMPT) -> Items:
    """The items of a folder, of a JSONL file, or of a single picture or video.

    A folder's items are its pictures and videos, those of folders inside it included; their keys are their
    paths within it. In a JSONL file each line is an object with `image` or `images`, `video` or `videos`
    (paths, from the file's own folder), and if it likes `prompt` and `key` (or `id`); a line without a key
    gets one from what it says, so that lines may be added and moved between runs. Other names are left
    alone.

    Args:
        prompt: what is asked about items that bring no prompt of their own.

    Returns:
        An iterable, read anew each time and never held as a whole, of `Item`, and of `Skipped` for lines
        that are no items. Its length is counted on demand.

    Raises:
        DataError: nothing there, nothing in it, or no JSONL.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path} does not exist; give a folder of pictures or a JSONL file")
    items = Items(path, prompt)
    if next(iter(items), None) is None:
        what = "holds no picture or video" if path.is_dir() else "is empty"
        raise DataError(f"{path} {what}; give a folder with pictures ({_examples()}) or a JSONL file")
    return items


@dataclass(frozen=True)
class Items:
    """Items to be read; see `read_items`."""

    path: Path
    prompt: str = DEFAULT_PROMPT

    def __iter__(self) -> Iterator[Item | Skipped]:
        if self.path.is_dir():
            return self._of_folder()
        if self.path.suffix.lower() in picture_suffixes() | VIDEO_SUFFIXES:
            return iter([self._of_file(self.path, self.path.name)])
        return self._of_lines()

    def __len__(self) -> int:
        return self._length

    @cached_property
    def _length(self) -> int:
        if self.path.is_dir():
            return sum(1 for _ in self._files())
        if self.path.suffix.lower() in picture_suffixes() | VIDEO_SUFFIXES:
            return 1
        with self.path.open("rb") as file:
            return sum(1 for line in file if line.strip())

    def _of_folder(self) -> Iterator[Item]:
        for file in self._files():
            yield self._of_file(file, file.relative_to(self.path).as_posix())

    def _files(self) -> Iterator[Path]:
        """Pictures and videos in the order of their names; hidden files and folders are left out."""
        known = picture_suffixes() | VIDEO_SUFFIXES
        for folder, inner, names in os.walk(self.path):
            inner[:] = sorted(name for name in inner if not name.startswith("."))
            for name in sorted(names):
                if not name.startswith(".") and os.path.splitext(name)[1].lower() in known:
                    yield Path(folder, name)

    def _of_file(self, file: Path, key: str) -> Item:
        video = file.suffix.lower() in VIDEO_SUFFIXES
        images, videos = ((), (file,)) if video else ((file,), ())
        return Item(key, images, videos, self.prompt, str(file))

    def _of_lines(self) -> Iterator[Item | Skipped]:
        seen: dict[str, int] = {}
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line := line.removeprefix(b"\xef\xbb\xbf").strip():
                    if not seen and line.startswith(b"["):
                        raise DataError(
                            f"{self.path} holds a JSON array; write one object on each line instead (JSONL)"
                        )
                    yield self._of_line(line, number, seen)

    def _of_line(self, line: bytes, number: int, seen: dict[str, int]) -> Item | Skipped:
        source = f"{self.path}:{number}"
        digest = blake2b(line, digest_size=8).hexdigest()
        own = ""
        item: Item | Skipped
        try:
            values = _parsed(line)
            own = _key(values)
            if own in seen:
                raise _BadLineError(f"key {own!r} is that of line {seen[own]} too; give each line its own")
            item = Item(
                own or _unused(digest, seen),
                self._paths(values, "image"),
                self._paths(values, "video"),
                _text(values, "prompt", self.prompt),
                source,
            )
            if not item.images and not item.videos:
                raise _BadLineError(f"names no image or video, only {', '.join(values) or 'nothing at all'}")
        except _BadLineError as bad:
            item = Skipped(_unused(digest, seen), source, str(bad))
        seen[item.key] = number
        return item

    def _paths(self, values: Mapping[str, Any], name: str) -> tuple[Path, ...]:
        given = [values[key] for key in (name, f"{name}s") if values.get(key) is not None]
        if len(given) == 2:
            raise _BadLineError(f"says both {name} and {name}s; give one of them")
        paths = given[0] if given else []
        paths = [paths] if isinstance(paths, str) else paths
        if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
            raise _BadLineError(f"{name}={paths!r} is neither a path nor a list of paths")
        if addresses := [path for path in paths if "://" in path]:
            raise _BadLineError(f"{name}={addresses[0]!r} is an address; save the file and give its path")
        return tuple(self.path.parent / path for path in paths)


class _BadLineError(ValueError):
    """Why a line is no item."""


@cache
def picture_suffixes() -> frozenset[str]:
    """Suffixes of the picture files that PIL reads, in lower case.

    Raises:
        MissingExtraError: PIL is not installed.
    """
    image = pillow().Image
    readable = {suffix for suffix, name in image.registered_extensions().items() if name in image.OPEN}
    # Formats of video, document and data files that PIL knows as well.
    return frozenset(readable - {".mpg", ".mpeg", ".pdf", ".eps", ".ps", ".h5", ".hdf", ".wmf", ".emf"})


def _examples() -> str:
    return ", ".join(suffix for suffix in (".jpg", ".png", ".webp") if suffix in picture_suffixes())


def _parsed(line: bytes) -> Mapping[str, Any]:
    shown = line[:_SHOWN].decode(errors="replace") + ("..." if len(line) > _SHOWN else "")
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _BadLineError(f"is not JSON: {error}, in {shown}") from error
    if not isinstance(values, dict):
        raise _BadLineError(f"is no JSON object: {shown}")
    return values


def _key(values: Mapping[str, Any]) -> str:
    key = values.get("key", values.get("id"))
    if key is None:
        return ""
    if not isinstance(key, (str, int)) or isinstance(key, bool) or key == "":
        raise _BadLineError(f"key={key!r} is neither a text nor a whole number")
    return str(key)


def _text(values: Mapping[str, Any], name: str, default: str) -> str:
    text = values.get(name)
    if text is None:
        return default
    if not isinstance(text, str):
        raise _BadLineError(f"{name}={text!r} is no text")
    return text


def _unused(digest: str, seen: dict[str, int]) -> str:
    """The digest of a line, numbered if the same line came before."""
    key, again = digest, 1
    while key in seen:
        again += 1
        key = f"{digest}-{again}"
    return key
