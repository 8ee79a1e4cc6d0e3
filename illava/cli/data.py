"""Items from the paths given on a command line."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from illava.cli.console import busy, notes, stages
from illava.errors import DataError
from illava.jobs import Item, Items, Skipped, decode, read_items


class First:
    """The first so many items; read anew each time, and with a length for progress bars."""

    def __init__(self, items: Items, limit: int | None) -> None:
        self._items, self._limit = items, limit

    def __iter__(self) -> Iterator[Item | Skipped]:
        return islice(iter(self._items), self._limit)

    def __len__(self) -> int:
        # Of a million, those beyond the limit need not be counted.
        return len(self._items) if self._limit is None else sum(1 for _ in self)


def first_items(path: Path, prompt: str, limit: int | None) -> First:
    """The first items of a folder, a JSONL file, a picture or a video.

    Raises:
        DataError: nothing there, or nothing in it.
    """
    with busy(f"looking into {path}"):
        return First(read_items(path, prompt=prompt), limit)


def readable_items(path: Path, prompt: str, limit: int | None, frames: int) -> list[Item]:
    """The same with their pictures; what cannot be read is said and left out.

    Raises:
        DataError: nothing there, or nothing that can be read.
    """
    found: list[Item] = []
    reasons: list[str] = []
    with busy(f"looking into {path}"):
        items = read_items(path, prompt=prompt)
        total = len(First(items, limit))
    with stages("reading") as show:
        for item in items:
            if limit is not None and len(found) == limit:
                break
            show("reading", len(found), total)
            ready = decode(item, frames)
            if isinstance(ready, Skipped):
                reasons.append(f"{ready.source}: {ready.reason}")
                notes.print(f"left out: {reasons[-1]}", markup=False, soft_wrap=True)
            else:
                found.append(ready)
        show("reading", len(found), total)
    if not found:
        raise DataError(f"nothing in {path} can be read: {reasons[0]}")
    return found


def asked_item(images: list[Path], videos: list[Path], prompt: str, frames: int) -> Item:
    """One prompt about the pictures and videos given.

    Raises:
        DataError: one of them cannot be read.
    """
    item = Item("", tuple(images), tuple(videos), prompt, ", ".join(map(str, [*images, *videos])))
    with busy(f"reading {item.source}"):
        ready = decode(item, frames)
    if isinstance(ready, Skipped):
        raise DataError(f"{ready.reason}; give another file")
    return ready
