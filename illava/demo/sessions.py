"""What the page knows of each open tab, and forgets when the tab is closed."""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from illava.demo.asking import Answer, Prompt
from illava.demo.media import Clip, Limits, Picture
from illava.demo.overlays import Overlays
from illava.errors import DemoError, UploadError


@dataclass
class Session:
    """One tab.

    Attributes:
        files: what it uploaded, in the page's own folder.
        shown: those decoded.
        asked: the question both answers below are about.
        unpatched: the last answer of the unpatched model.
        overlays: where the tokens of the last patched answer went.
        stop: ends the answer under way.
        reading: held while its files are read.
    """

    files: tuple[Path, ...] = ()
    shown: tuple[Picture | Clip, ...] = ()
    asked: Prompt | None = None
    unpatched: Answer | None = None
    overlays: Overlays | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    reading: threading.Lock = field(default_factory=threading.Lock)

    def begin(self) -> threading.Event:
        """Ends what is under way; what begins now ends with the event returned."""
        self.stop.set()
        self.stop = threading.Event()
        return self.stop


class Sessions:
    """Every open tab by the name Gradio gives it.

    Args:
        uploads: where uploads are written, by their content: two tabs that upload the same picture share a
            file, so a file goes with the last tab that has it.
        shipped: a folder whose files may be shown, too, and stay.
        limits: how many tabs are known at once: the one that has been quiet longest is forgotten for a new
            one. Files that no tab has come to show, because it was closed meanwhile, go after a while.
    """

    def __init__(self, uploads: Path, shipped: Path, limits: Limits) -> None:
        self._uploads, self._shipped, self._limits = uploads.resolve(), shipped.resolve(), limits
        self._open: dict[str, Session] = {}  # the one that was quiet longest first
        self._lock = threading.RLock()

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._open))

    def of(self, name: str | None) -> Session:
        """The tab of this name, new if it was not known.

        Raises:
            DemoError: it has no name.
        """
        if not name:
            raise DemoError("this page answers browsers only; open it in one")
        with self._lock:
            session = self._open.pop(name, None) or Session()
            while len(self._open) >= self._limits.tabs:
                self.close(next(iter(self._open)))
            self._open[name] = session
            return session

    def bring(self, name: str | None, files: Iterable[str | Path]) -> tuple[Path, ...]:
        """Note the files a tab now shows, and delete those it no longer does.

        Raises:
            UploadError: one that is not an upload.
        """
        session = self.of(name)
        brought = tuple(self._uploaded(file, session.files) for file in files)
        with self._lock:
            before, session.files = session.files, brought
            self._tidy(before)
        return brought

    def close(self, name: str | None) -> None:
        """Forget a tab: its answer under way, its pictures, its files."""
        with self._lock:
            session = self._open.pop(name or "", None)
            if session is not None:
                session.stop.set()
            self._tidy(session.files if session else ())

    def held_bytes(self) -> int:
        """What all uploads take on the disk."""
        with self._lock:
            self._tidy(())
            return sum(about.st_size for about in self._files().values())

    def _uploaded(self, file: str | Path, known: Iterable[Path]) -> Path:
        path = Path(file)
        real = path.resolve()
        inside = real.is_relative_to(self._uploads) or real.parent == self._shipped
        if not inside or path.is_symlink() or not (real in known or real.is_file()):
            raise UploadError(f"{path.name} is not an upload, or no longer there; upload it again")
        return real

    def _tidy(self, left: Iterable[Path]) -> None:
        """Delete uploads that no tab shows: these now, others when they have waited long enough for one."""
        shown = {file for session in self._open.values() for file in session.files}
        since = time.time() - self._limits.unclaimed_seconds
        for file, about in self._files().items():
            if file not in shown and (file in left or about.st_mtime < since):
                with suppress(OSError):  # its folder, named after its content, may hold it under other names
                    file.unlink()
                    file.parent.rmdir()

    def _files(self) -> dict[Path, os.stat_result]:
        """All uploads."""
        found = {}
        for file in self._uploads.rglob("*"):
            with suppress(FileNotFoundError):  # Gradio moves them about
                if stat.S_ISREG((about := file.stat()).st_mode):
                    found[file] = about
        return found
