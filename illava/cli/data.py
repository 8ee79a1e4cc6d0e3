"""Items from the paths given on a command line."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from illava.cli.console import notes
from illava.errors import DataError
from illava.jobs import Item, Items, Skipped, decode, read_items


class First:
    """The first so many items; read anew each time, and with a length for progress bars."""

    def __init__(self, items: Items, limit: int | None) -> None:
        self._items, self._limit = items, limit

    def __iter__(self) -> Iterator[Item | Skipped]:
        return islice(iter(self._items), self._limit)

    def __len__(self) -> int:
        return len(self._items) if self._limit is None else min(self._limit, len(self._items))


def first_items(path: Path, prompt: str, limit: int | None) -> First:
    """The first items of a folder, a JSONL file, a picture or a video.

    Raises:
        DataError: nothing there, or nothing in it.
    """
    return First(read_items(path, prompt=prompt), limit)


def readable_items(path: Path, prompt: str, limit: int | None, frames: int) -> list[Item]:
    """The same with their pictures; what cannot be read is said and left out.

    Raises:
        DataError: nothing there, or nothing that can be read.
    """
    found: list[Item] = []
    reasons: list[str] = []
    for item in read_items(path, prompt=prompt):
        if limit is not None and len(found) == limit:
            break
        ready = decode(item, frames)
        if isinstance(ready, Skipped):
            reasons.append(f"{ready.source}: {ready.reason}")
            notes.print(f"left out: {reasons[-1]}", markup=False, soft_wrap=True)
        else:
            found.append(ready)
    if not found:
        raise DataError(f"nothing in {path} can be read: {reasons[0]}")
    return found


def asked_item(images: list[Path], videos: list[Path], prompt: str, frames: int) -> Item:
    """One prompt about the pictures and videos given.

    Raises:
        DataError: one of them cannot be read.
    """
    item = Item("", tuple(images), tuple(videos), prompt, ", ".join(map(str, [*images, *videos])))
    ready = decode(item, frames)
    if isinstance(ready, Skipped):
        raise DataError(f"{ready.reason}; give another file")
    return ready
