"""What the page knows of each open tab, and forgets when the tab is closed."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from illava.demo.asking import Answer, Prompt
from illava.demo.media import Clip, Picture
from illava.demo.overlays import Overlays
from illava.errors import DemoError, UploadError

MOST_SESSIONS = 256


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
    """

    files: tuple[Path, ...] = ()
    shown: tuple[Picture | Clip, ...] = ()
    asked: Prompt | None = None
    unpatched: Answer | None = None
    overlays: Overlays | None = None
    stop: threading.Event = field(default_factory=threading.Event)

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
    """

    def __init__(self, uploads: Path, shipped: Path) -> None:
        self._uploads, self._shipped = uploads.resolve(), shipped.resolve()
        self._open: dict[str, Session] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._open)

    def of(self, name: str | None) -> Session:
        """The tab of this name, new if it was not known.

        Raises:
            DemoError: it has no name, or there are too many of them.
        """
        if not name:
            raise DemoError("this page answers browsers only; open it in one")
        with self._lock:
            if name not in self._open and len(self._open) >= MOST_SESSIONS:
                raise DemoError(f"{MOST_SESSIONS} tabs are open already; try again later")
            return self._open.setdefault(name, Session())

    def bring(self, name: str | None, files: Iterable[str | Path]) -> tuple[Path, ...]:
        """Note the files a tab now shows, and delete those it no longer does.

        Raises:
            UploadError: one that is not an upload.
        """
        session = self.of(name)
        checked = tuple(self._uploaded(file) for file in files)
        with self._lock:
            before, session.files = session.files, checked
            self._delete(before)
        return checked

    def close(self, name: str | None) -> None:
        """Forget a tab: its answer under way, its pictures, its files."""
        with self._lock:
            session = self._open.pop(name or "", None)
            if session is not None:
                session.stop.set()
                self._delete(session.files)

    def _uploaded(self, file: str | Path) -> Path:
        path = Path(file)
        real = path.resolve()
        inside = real.is_relative_to(self._uploads) or real.parent == self._shipped
        if not inside or path.is_symlink() or not real.is_file():
            raise UploadError(f"{path.name} is not an upload, or no longer there; upload it again")
        return real

    def _delete(self, files: Iterable[Path]) -> None:
        """Those that no open tab shows; each lies in a folder of its own, named after its content."""
        wanted = {file for session in self._open.values() for file in session.files}
        for file in set(files) - wanted:
            if file.is_relative_to(self._uploads):
                shutil.rmtree(file.parent if file.parent != self._uploads else file, ignore_errors=True)
