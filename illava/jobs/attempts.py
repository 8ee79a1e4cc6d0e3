"""Work done on a batch, so that one item that cannot be done does not take the others with it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from illava.errors import JobError, OutOfMemoryError
from illava.jobs.items import Item, Skipped
from illava.memory import free, is_memory

Work = Callable[[list[Item]], list[dict[str, Any]]]
Factory = Callable[[], Work]
Record = dict[str, Any]

_log = logging.getLogger("illava.jobs")


def records(work: Work, items: Sequence[Item | Skipped]) -> list[Record]:
    """What `work` makes of decoded items, as records with `key` and `source`, skipped ones included.

    A batch that does not fit in memory is halved until it does; a batch that fails otherwise is done item by
    item. An item that fails alone becomes a record with the reason under `failed`.

    Raises:
        JobError: work that does not return one dict for each item.
    """
    unread = [
        {"key": item.key, "source": item.source, "skipped": item.reason}
        for item in items
        if isinstance(item, Skipped)
    ]
    return unread + _attempt(work, [item for item in items if isinstance(item, Item)])


def _attempt(work: Work, items: list[Item]) -> list[Record]:
    if not items:
        return []
    try:
        results = work(items)
    except JobError:
        raise
    except Exception as error:  # whatever a model may raise: the job goes on, the reason is recorded
        failure = error
    else:
        return _checked(items, results)
    if not is_memory(failure):
        if len(items) > 1:
            return [record for item in items for record in _attempt(work, [item])]
        return [_failed(items[0], f"{type(failure).__name__}: {failure}")]
    said = str(failure) if isinstance(failure, OutOfMemoryError) else ""  # the work knows better than we
    del failure  # its traceback holds the tensors that did not fit
    free()
    if len(items) == 1:
        remedy = said or "smaller or fewer pictures, or fewer frames of a video, need less"
        return [_failed(items[0], f"out of memory with this item alone; {remedy}")]
    half = len(items) // 2
    parts = half, len(items) - half
    _log.warning("a batch of %d does not fit in memory; doing it in parts of %d and %d", len(items), *parts)
    return _attempt(work, items[:half]) + _attempt(work, items[half:])


def _checked(items: list[Item], results: Any) -> list[Record]:
    if (
        not isinstance(results, list)
        or len(results) != len(items)
        or not all(isinstance(result, dict) for result in results)
    ):
        raise JobError(
            f"the work must return a list of {len(items)} dicts, one for each item, and returned "
            f"{results!r:.200}"
        )
    return [
        {"key": item.key, "source": item.source}
        | {name: value for name, value in result.items() if name not in ("key", "source")}
        for item, result in zip(items, results, strict=True)
    ]


def _failed(item: Item, reason: str) -> Record:
    return {"key": item.key, "source": item.source, "failed": reason}
