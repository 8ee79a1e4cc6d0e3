"""`illava demo`: the web page."""

from __future__ import annotations

import signal
import sys
from typing import Annotated

import typer

from illava.cli import options as o
from illava.cli.console import busy, finishing, out

_HELP = """Open a web page on which the model answers with and without illava, side by side.

Bring pictures or a video, or pick an example; set how much is merged and where; see both answers, what they
cost, and where the tokens went, merge by merge. Needs illava[demo]."""


def command(
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder of a checkpoint, or a name on the hub; by default the small trained one of a clone.",
            rich_help_panel="Model",
        ),
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the page.")] = 7862,
    host: Annotated[
        str, typer.Option(help="Who may come: 127.0.0.1 this machine only, 0.0.0.0 everybody who reaches it.")
    ] = "127.0.0.1",
    device: o.Device = None,
    dtype: o.Dtype = None,
    attn: o.Attn = "sdpa",
) -> None:
    with finishing("the page is closed; what was uploaded is deleted"):
        from illava.demo import launch

        with busy("loading the model"):
            server = launch(model, host=host, port=port, device=device, dtype=dtype, attn=attn)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that uploads are deleted then, too
        with server:
            out.print(f"illava is at {server.url} (end it with Ctrl-C)", markup=False)
            server.wait()


command.__doc__ = _HELP
