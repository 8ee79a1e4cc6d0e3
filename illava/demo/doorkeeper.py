"""Uploads refused before a byte of them is written: too large, or while the folder is full."""

from __future__ import annotations

from typing import Any

from starlette.responses import PlainTextResponse

from illava.demo.media import Limits
from illava.demo.sessions import Sessions


class Doorkeeper:
    """Middleware between the web server and Gradio, which bounds single files only."""

    def __init__(self, app: Any, sessions: Sessions, limits: Limits) -> None:
        self._app, self._sessions, self._limits = app, sessions, limits

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"].endswith("/upload"):
            status, words = self._refusal(dict(scope["headers"]).get(b"content-length", b""))
            if status:
                await PlainTextResponse(words, status_code=status)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, length: bytes) -> tuple[int, str]:
        """A status and why, or 0."""
        limits = self._limits
        if not length.isdigit():
            return 411, "an upload has to say how long it is"
        if int(length) > limits.request_bytes:
            return 413, f"bring at most {limits.request_bytes / 2**20:.0f} MiB at once"
        if self._sessions.held_bytes() + int(length) > limits.folder_bytes:
            return 507, "the pictures of all users together fill this page; try again in some minutes"
        return 0, ""
