"""The page on a port of this machine: bounds, a folder of its own for uploads, and nothing left behind."""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from illava.errors import DemoError
from illava.extras import required

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 7862
_UPLOADS = "GRADIO_TEMP_DIR"


class Server:
    """A page that is being served; `close()` ends it, and so does `with`.

    Attributes:
        url: where it is.
        uploads: the folder that holds what open tabs have uploaded; gone when the page is closed.
        sessions, handlers: what it knows of each tab, and what answers to what is done there.
    """

    def __init__(self, asker: Any, *, host: str, port: int, limits: Any = None) -> None:
        gradio = required("gradio", "demo")
        with ExitStack() as end:  # closes all again if the page cannot be opened
            self.uploads = Path(end.enter_context(tempfile.TemporaryDirectory(prefix="illava-demo-")))
            end.callback(_set_environment, _UPLOADS, os.environ.get(_UPLOADS))
            end.callback(asker.close)
            _set_environment(_UPLOADS, str(self.uploads))  # before Gradio's parts are made, which remember it
            from starlette.middleware import Middleware

            from illava.demo.doorkeeper import Doorkeeper
            from illava.demo.handlers import Handlers
            from illava.demo.media import Limits
            from illava.demo.page import STYLE, draw_page, theme
            from illava.demo.samples import FOLDER
            from illava.demo.sessions import Sessions

            limits = limits or Limits()
            gradio.set_static_paths([FOLDER])  # served where they lie, not copied among the uploads
            self.sessions = Sessions(self.uploads, FOLDER, limits)
            self.handlers = Handlers(asker, self.sessions, limits)
            page = draw_page(self.handlers)
            page.queue(max_size=limits.waiting, api_open=False)
            end.callback(page.close, verbose=False)
            try:
                _, self.url, _ = page.launch(
                    server_name=host,
                    server_port=port,
                    share=False,
                    prevent_thread_lock=True,
                    quiet=True,
                    max_file_size=limits.file_bytes,
                    theme=theme(),
                    css_paths=STYLE,
                    footer_links=[],
                    ssr_mode=False,
                    inbrowser=False,
                    app_kwargs={"middleware": [Middleware(Doorkeeper, self.sessions, limits)]},
                )
            except OSError as error:
                raise DemoError(
                    f"port {port} of {host} cannot be used; name another one, for example --port {port + 1}"
                ) from error
            self._page, self._end = page, end.pop_all()

    def wait(self) -> None:
        """Serve until interrupted, which is raised."""
        while self._page.is_running:
            time.sleep(0.1)

    def close(self) -> None:
        """Stop serving and delete what was uploaded."""
        self._end.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _set_environment(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def launch(
    model: str | None = None,
    *,
    host: str = DEFAULT_HOST,
    port: int = DEFAULT_PORT,
    device: str | None = None,
    dtype: str | None = None,
    attn: str = "sdpa",
) -> Server:
    """Open the page.

    Args:
        model: folder or name of a checkpoint; by default the small trained one of a clone of illava.
        host: who may come: `"127.0.0.1"` this machine only, `"0.0.0.0"` everybody who reaches it.
        port: of the page.
        device, dtype, attn: as `illava.evaluate.load` takes them.

    Returns:
        The server, already serving: `wait()` or `close()` it.

    Raises:
        MissingExtraError: Gradio is not installed.
        DemoError: no model named and none here, or a port that is taken.
        CheckpointError: no such model, or one that cannot be asked.
        UnsupportedModelError: not a model of a supported family.
    """
    required("gradio", "demo")
    from illava.demo.loading import default_model, load

    return Server(load(model or default_model(), device, dtype, attn), host=host, port=port)
