"""A job on Ray Data: Ray schedules, retries, restarts workers and keeps back; this process writes."""

from __future__ import annotations

import json
import logging
from collections.abc import Container, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from illava.errors import JobError
from illava.extras import required
from illava.jobs.attempts import Factory, Record, records
from illava.jobs.batches import WINDOW_BATCHES, by_size
from illava.jobs.items import Item, Skipped
from illava.jobs.pictures import decode
from illava.jobs.results import as_line

_BLOCK_ITEMS = 4096
_READERS = 4  # threads of a task that measures or decodes


def on_ray(
    items: Iterable[Item | Skipped],
    factory: Factory,
    done: Container[str],
    *,
    batch_size: int,
    workers: int | None,
    gpus_per_worker: float | None,
    frames: int,
) -> Generator[list[Record], None, None]:
    """Records of all items that are not `done`, as the cluster makes them; see `illava.jobs.run`.

    Items go into Ray's object store (which spills to disk), are put in the order of their sizes, decoded by
    tasks and worked on by actors, each of which calls `factory` once. A worker that dies is restarted by Ray
    and its batch done again; only what arrived here is written, so nothing comes twice.

    Raises:
        JobError: items that did not come back.
        MissingExtraError: Ray is not installed.
    """
    ray = required("ray", "ray")
    data = required("ray.data", "ray")
    # What goes wrong comes as an error; progress has a bar of the job's own.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    data.DataContext.get_current().enable_progress_bars = False
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    gpus = ray.cluster_resources().get("GPU", 0)
    if gpus_per_worker is None:
        gpus_per_worker = 1 if gpus else 0
    workers = workers or max(1, int(gpus // gpus_per_worker if gpus_per_worker else 1))

    blocks, asked = _stored(ray, (item for item in items if item.key not in done))
    if not asked:
        return
    # A row is a batch, and a block a row: results arrive batch by batch, and a retry repeats one.
    dataset = (
        data.from_arrow_refs(blocks)
        .map_batches(
            _sorted,
            batch_size=WINDOW_BATCHES * batch_size,
            batch_format="pyarrow",
            fn_kwargs={"batch_size": batch_size},
        )
        .repartition(target_num_rows_per_block=1)
        .map_batches(_decoded, batch_size=1, num_cpus=1, fn_kwargs={"frames": frames})
        .map_batches(
            _Worker,
            fn_constructor_args=(factory,),
            batch_size=1,
            compute=data.ActorPoolStrategy(size=workers),
            num_cpus=0,  # cores are for decoding; a worker that waits for one might wait for ever
            num_gpus=gpus_per_worker,
        )
    )
    came = 0
    try:
        for made in dataset.iter_rows():
            came += len(made["lines"])
            yield [json.loads(line) for line in made["lines"]]
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        if isinstance(cause, JobError):
            raise cause from error
        last = str(cause).strip().splitlines()[-1]
        raise JobError(
            f"Ray could not go on: {type(cause).__name__}: {last}. What arrived is kept; run it again"
        ) from error
    if came < asked:
        raise JobError(
            f"{asked - came} of {asked} items did not come back from Ray; run the same again to do them"
        )


def _stored(ray: Any, items: Iterator[Item | Skipped]) -> tuple[list[Any], int]:
    """Items in blocks of the object store, and how many there are."""
    pyarrow = required("pyarrow", "ray")
    blocks, count = [], 0
    while chunk := list(islice(items, _BLOCK_ITEMS)):
        blocks.append(ray.put(pyarrow.Table.from_pylist([_row(item) for item in chunk])))
        count += len(chunk)
    return blocks, count


def _row(item: Item | Skipped) -> dict[str, Any]:
    """An item as plain values, of the same names whatever it is."""
    if isinstance(item, Skipped):
        return {"key": item.key, "images": [], "videos": [], "prompt": "", "source": item.source,
                "reason": item.reason}  # fmt: skip
    images, videos = ([str(file) for file in files] for files in (item.images, item.videos))
    return {"key": item.key, "images": images, "videos": videos, "prompt": item.prompt, "source": item.source,
            "reason": None}  # fmt: skip


def _item(row: dict[str, Any]) -> Item | Skipped:
    if row["reason"] is not None:
        return Skipped(row["key"], row["source"], row["reason"])
    images, videos = (tuple(Path(file) for file in row[name]) for name in ("images", "videos"))
    return Item(row["key"], images, videos, row["prompt"], row["source"])


def _sorted(rows: Any, batch_size: int) -> dict[str, Any]:
    with ThreadPoolExecutor(_READERS) as pool:
        return _objects("items", by_size(map(_item, rows.to_pylist()), batch_size, pool))


def _decoded(batch: dict[str, Any], frames: int) -> dict[str, Any]:
    with ThreadPoolExecutor(_READERS) as pool:
        read = partial(decode, frames=frames)
        return _objects("items", (list(pool.map(read, items)) for items in batch["items"]))


def _objects(name: str, values: Iterable[Any]) -> dict[str, Any]:
    """A column of Python objects, one for each batch of items."""
    import numpy as np

    values = list(values)
    column = np.empty(len(values), object)
    for place, value in enumerate(values):  # all at once, lists of one length would become a table
        column[place] = value
    return {name: column}


class _Worker:
    """A process with its own model."""

    def __init__(self, factory: Factory) -> None:
        self._work = factory()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        # As text: Arrow would give every record the fields of its neighbours.
        made = ([as_line(record) for record in records(self._work, items)] for items in batch["items"])
        return _objects("lines", made)
