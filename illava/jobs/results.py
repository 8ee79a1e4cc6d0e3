"""The file of results: JSON lines that are only ever appended, and what a killed job left of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from rich.progress import open as open_with_progress

from illava.errors import DataError, JobError

_BAR_FROM_BYTES = 50_000_000  # about as much as is read in a second


def as_line(record: Mapping[str, Any]) -> bytes:
    """A record as a line of JSON in UTF-8; raises JobError where it is none."""
    try:
        text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise JobError(
            f"the result of {record['source']} cannot be written as JSON: {error}; let the work return "
            "texts, finite numbers, lists and dicts of them"
        ) from error
    return text.encode(errors="backslashreplace")  # half a character, which models do say, stays JSON


def _read_settings(beside: Path, results: Path) -> dict[str, Any]:
    try:
        settings = json.loads(beside.read_bytes())
        if not isinstance(settings, dict):
            raise ValueError("it holds no object")
    except ValueError as error:
        raise DataError(
            f"{beside} cannot be read ({error}), so nobody can tell which settings the results in {results} "
            "are of. If they are of this same command, delete it and run the command again; otherwise give "
            "another file for the results"
        ) from error
    return settings


def _write_whole(path: Path, text: str) -> None:
    """Whenever this is killed, the file is as it was or as it should be."""
    beside = Path(f"{path}.new")
    with beside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


class Results:
    """Results of one job, open for appending by one process; use it in `with`.

    Every line is an object with `key` and `source`, and either what the work returned, or `skipped` (the item
    could not be read) or `failed` (the work could not do it), with the reason.

    Attributes:
        keys: of all items in the file.

    Raises:
        JobError: on entry, if another job has the file open.
        DataError: on entry, if the file holds something else, or the results of other settings.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any] | None = None) -> None:
        self.path = Path(path)
        self.keys: set[str] = set()
        self._settings = settings
        self._file: BinaryIO | None = None
        self._lock: Any = None

    def __enter__(self) -> Results:
        from filelock import FileLock, Timeout

        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.is_dir():
            raise DataError(f"{self.path} is a folder; results go into a file, for example answers.jsonl")
        self._lock = FileLock(f"{self.path}.lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout as taken:
            raise JobError(
                f"another job is writing to {self.path}; wait for it, or give this one a file of its own"
            ) from taken
        try:
            self._check_settings()
            self._file = self.path.open("ab")
            self._drop_unfinished_line()
            self._read_keys()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        self._lock.release()

    def append(self, records: Iterable[Mapping[str, Any]]) -> int:
        """Write records and see them safely on the disk; keys that are there already are left out.

        Returns:
            How many were written.

        Raises:
            JobError: a record that is not plain JSON.
        """
        new = []
        for record in records:
            if record["key"] in self.keys:
                continue
            new.append(as_line(record))
            self.keys.add(record["key"])
        if new:
            if self._file is None:
                raise JobError(f"{self.path} is not open; use Results in a with statement")
            self._file.write(b"\n".join(new) + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        return len(new)

    def _check_settings(self) -> None:
        """Results of one model and plan are not gone on with by another."""
        if self._settings is None:
            return
        beside = Path(f"{self.path}.settings.json")
        now = json.loads(json.dumps(self._settings, default=str))
        if beside.exists() and self.path.exists() and self.path.stat().st_size:
            before = _read_settings(beside, self.path)
            if changed := [name for name in {**before, **now} if before.get(name) != now.get(name)]:
                said = "; ".join(
                    f"{name} was {before.get(name)!r} and is now {now.get(name)!r}" for name in changed
                )
                raise DataError(
                    f"{self.path} holds results of other settings: {said}. Give another file, "
                    "or delete this one"
                )
            return
        _write_whole(beside, json.dumps(now, indent=2) + "\n")

    def _drop_unfinished_line(self) -> None:
        """A kill in the middle of a write leaves the start of a line: its item is done again."""
        if self._file is None or not (size := self._file.tell()):
            return
        with self.path.open("rb") as file:
            end = size
            while end:
                start = max(0, end - 65_536)
                file.seek(start)
                if (newline := file.read(end - start).rfind(b"\n")) >= 0:
                    end = start + newline + 1
                    break
                end = start
        if end < size:
            self._file.truncate(end)

    def _read_keys(self) -> None:
        large = self.path.stat().st_size > _BAR_FROM_BYTES
        opened = open_with_progress(
            self.path, "rb", description="reading finished results", transient=True, disable=not large
        )
        with opened as file:
            for number, line in enumerate(file, start=1):
                try:
                    self.keys.add(json.loads(line)["key"])
                except (ValueError, TypeError, KeyError) as error:
                    raise DataError(
                        f"{self.path}:{number} is no result of a job; give a new file, or the one of this job"
                    ) from error
