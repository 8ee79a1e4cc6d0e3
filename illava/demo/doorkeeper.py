"""What may be sent to the page: questions and uploads, those too large refused before a byte is written.

Gradio bounds single files only, and answers to more than a page of ours ever sends.
"""

from __future__ import annotations

from typing import Any

from starlette.responses import PlainTextResponse

from illava.demo.media import Limits
from illava.demo.sessions import Sessions

UPLOAD = "/gradio_api/upload"
# What the page in a browser posts besides: what is done on it, Stop past the queue, and the end of an answer.
POSTED = tuple(f"/gradio_api/{path}" for path in ("queue/join", "run/predict", "cancel", "reset"))
MOST_WORDS = 2**20  # bytes of a question and all settings, the paths of its pictures included


class Doorkeeper:
    """Middleware between the web server and Gradio."""

    def __init__(self, app: Any, sessions: Sessions, limits: Limits) -> None:
        self._app, self._sessions, self._limits = app, sessions, limits

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            length = dict(scope["headers"]).get(b"content-length", b"")
            status, words = self._refusal(scope["path"].rstrip("/"), length)
            if status:
                await PlainTextResponse(words, status_code=status)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, path: str, length: bytes) -> tuple[int, str]:
        """A status and why, or 0."""
        limits = self._limits
        upload = path == UPLOAD
        if not (upload or path in POSTED):
            return 404, "nothing is posted here"
        if not length.isdigit():
            return 411, "what is sent has to say how long it is"
        most = limits.request_bytes if upload else MOST_WORDS
        if int(length) > most:
            return 413, f"bring at most {most / 2**20:.0f} MiB at once"
        if upload and self._sessions.held_bytes() + int(length) > limits.folder_bytes:
            return 507, "the pictures of all users together fill this page; try again in some minutes"
        return 0, ""
