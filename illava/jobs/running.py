"""A job from its items to its file of results, on one process or on Ray."""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterable, Mapping, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from illava.errors import JobError
from illava.jobs.attempts import Factory, Record, records
from illava.jobs.batches import in_batches
from illava.jobs.items import Item, Skipped
from illava.jobs.pictures import DEFAULT_FRAMES
from illava.jobs.results import Results

MOST_FAILURES_IN_A_ROW = 20


@dataclass
class Summary:
    """What a run did.

    Attributes:
        results: the file.
        answered, skipped, failed: items of this run: done by the work; unreadable; readable, but the work
            could not do them.
        before: items that earlier runs had finished.
        seconds: of this run, from its first batch on.
    """

    results: Path
    before: int = 0
    answered: int = 0
    skipped: int = 0
    failed: int = 0
    seconds: float = 0.0

    @property
    def items(self) -> int:
        """Items of this run."""
        return self.answered + self.skipped + self.failed

    def __str__(self) -> str:
        earlier = f", {self.before:,} were there before" if self.before else ""
        return (
            f"{self.answered:,} answered, {self.skipped:,} unreadable, {self.failed:,} failed in "
            f"{self.seconds:.1f} s{earlier}: {self.results}"
        )


def run(
    items: Iterable[Item | Skipped],
    factory: Factory,
    results: str | Path,
    *,
    batch_size: int = 8,
    engine: Literal["process", "ray"] = "process",
    workers: int | None = None,
    gpus_per_worker: float | None = None,
    readers: int | None = None,
    frames: int = DEFAULT_FRAMES,
    settings: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> Summary:
    """Do `work` on every item that the results do not hold yet, and append what it returns.

    Each line of the results is what the work returned for an item, with the item's `key` and `source`.
    What cannot be read is a line with the reason under `skipped`; what the work cannot do, alone in its
    batch, one with the reason under `failed`. Results stand in the order they were made. After a kill, an
    interruption or an error, call it again: nothing is lost and nothing repeated. To try an item again,
    delete its line.

    Args:
        items: for example `read_items(path)`; read once and never held as a whole.
        factory: called once in each process that holds a model; returns the work, which turns decoded
            items into as many dicts of plain JSON. For Ray it must be picklable.
        results: a file, made if it is not there. Of all items, only their keys are held in memory.
        batch_size: most items the work is given at once; a batch that does not fit is halved.
        engine: `"process"`: here. `"ray"`: on Ray Data (`pip install "illava[ray]"`), which schedules,
            retries and keeps back; on the cluster this process is connected to, else the one at
            `RAY_ADDRESS`, else a new one on this machine. Every machine must see the files.
        workers: with Ray, processes that hold a model; by default one for each GPU of the cluster, or one.
        gpus_per_worker: with Ray; by default 1 where the cluster has GPUs, else 0.
        readers: threads that read and decode ahead; by default one a core, at most 8.
        frames: of each video, spread evenly over it.
        settings: what else these results depend on, such as model and plan: written beside the file, and a
            run with others is refused.
        console: for the progress bar.

    Raises:
        JobError: nothing succeeded for 20 items in a row, none of which is then written; or another job
            writes to the file; or the work does not return one dict for each item.
        DataError: a file of results that holds something else.
        MissingExtraError: an optional package is not installed.
    """
    if batch_size < 1:
        raise JobError(f"batch_size={batch_size} is no batch; give at least 1")
    if engine not in ("process", "ray"):
        raise JobError(f"engine={engine!r} is not known; choose 'process' or 'ray'")
    if engine == "process" and (workers not in (None, 1) or gpus_per_worker is not None):
        raise JobError("one process holds one model; for several workers give engine='ray'")
    readers = readers or min(8, os.cpu_count() or 1)
    console = console or Console(stderr=True)
    with Results(results, settings) as file:
        if engine == "process":
            made = _in_this_process(items, factory, file, batch_size, readers, frames)
        else:
            from illava.jobs.on_ray import on_ray

            made = on_ray(
                items, factory, file.keys,
                batch_size=batch_size, workers=workers, gpus_per_worker=gpus_per_worker, frames=frames,
            )  # fmt: skip
        total = None
        if isinstance(items, Sized):
            with console.status("counting the items"):  # files of folders, lines of a file
                total = len(items)
        return _write(made, file, total, console)


def _in_this_process(
    items: Iterable[Item | Skipped],
    factory: Factory,
    file: Results,
    batch_size: int,
    readers: int,
    frames: int,
) -> Generator[list[Record], None, None]:
    work = None
    batches = in_batches(items, file.keys, batch_size=batch_size, readers=readers, frames=frames)
    try:
        for batch in batches:
            # The first batch is read while the model loads; a finished job loads none.
            work = work or factory()
            yield records(work, batch)
    finally:
        batches.close()


def _write(
    made: Generator[list[Record], None, None], file: Results, total: int | None, console: Console
) -> Summary:
    """Append records as they come, and show how far they are."""
    writer = _Writer(file, Summary(file.path, before=len(file.keys)))
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[trouble]}"),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        before = writer.summary.before
        task = progress.add_task("items", total=total, completed=before, trouble="")
        try:
            for batch in made:
                writer.take(batch)
                summary = writer.summary
                trouble = f"{summary.skipped:,} unreadable, {summary.failed:,} failed"
                shown = trouble if summary.skipped or summary.failed else ""
                progress.update(task, completed=before + summary.items, trouble=shown)
        finally:
            made.close()
        writer.finish()
    return writer.summary


@dataclass
class _Writer:
    """Keeps failures back until something succeeds: where nothing does, they say nothing about the items."""

    file: Results
    summary: Summary
    began: float = field(default_factory=time.perf_counter)
    held_back: list[Record] = field(default_factory=list)

    def take(self, batch: list[Record]) -> None:
        answers = [record for record in batch if "failed" not in record]
        self.held_back += [record for record in batch if "failed" in record]
        if any("skipped" not in record for record in answers):
            answers += self._released()
        elif len(self.held_back) >= MOST_FAILURES_IN_A_ROW:
            self._give_up()
        self._append(answers)

    def finish(self) -> None:
        if self.held_back and not self.summary.answered and not self.summary.before:
            self._give_up()
        self._append(self._released())

    def _released(self) -> list[Record]:
        released, self.held_back = self.held_back, []
        return released

    def _append(self, batch: list[Record]) -> None:
        new = [record for record in batch if record["key"] not in self.file.keys]
        self.file.append(new)
        skipped, failed = (sum(name in record for record in new) for name in ("skipped", "failed"))
        self.summary.skipped += skipped
        self.summary.failed += failed
        self.summary.answered += len(new) - skipped - failed
        self.summary.seconds = time.perf_counter() - self.began

    def _give_up(self) -> None:
        last = self.held_back[-1]
        raise JobError(
            f"{len(self.held_back)} items failed and none succeeded since, the last ({last['source']}) with "
            f"{last['failed']}. What was finished before is in {self.file.path}; run it again when this is "
            "set right"
        )
