"""Items in batches of like size, decoded ahead of the work by threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice

from illava.jobs.items import Item, Skipped
from illava.jobs.pictures import decode, pixels_of

# Batches among which sizes are matched, and batches decoded while the work is busy with one.
WINDOW_BATCHES = 32
AHEAD_BATCHES = 2


def in_batches(
    items: Iterable[Item | Skipped], done: Container[str], *, batch_size: int, readers: int, frames: int
) -> Generator[list[Item | Skipped], None, None]:
    """Batches of decoded items that are not `done`.

    Of the items to come, 32 batches' worth are measured by their headers and put in the order of their
    pixels, so that a batch holds pictures of like size and little padding; at most 3 batches are held
    decoded. Threads are enough: PIL and PyAV decode outside Python's lock.
    """
    pool = ThreadPoolExecutor(readers, thread_name_prefix="illava-read")
    waiting: deque[list[Future[Item | Skipped]]] = deque()
    try:
        todo = (item for item in items if item.key not in done)
        for batch in by_size(todo, batch_size, pool):
            waiting.append([pool.submit(partial(decode, frames=frames), item) for item in batch])
            if len(waiting) > AHEAD_BATCHES:
                yield [future.result() for future in waiting.popleft()]
        while waiting:
            yield [future.result() for future in waiting.popleft()]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def by_size(
    items: Iterable[Item | Skipped], batch_size: int, pool: ThreadPoolExecutor
) -> Iterator[list[Item | Skipped]]:
    """Batches of items of like size, not decoded."""
    items = iter(items)
    while window := list(islice(items, WINDOW_BATCHES * batch_size)):
        pixels = pool.map(pixels_of, window)
        ordered = [item for _, item in sorted(zip(pixels, window, strict=True), key=lambda pair: pair[0])]
        for start in range(0, len(ordered), batch_size):
            yield ordered[start : start + batch_size]
