"""`illava demo`: the web page."""

from __future__ import annotations

import signal
import sys
from typing import Annotated

import typer

from illava.demo import launch
from illava.demo.server import DEFAULT_HOST, DEFAULT_PORT
from illava.errors import IllavaError


def demo(
    model: Annotated[
        str | None,
        typer.Option(help="Name or folder of a checkpoint. [default: the small trained one of a clone]"),
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the page.")] = DEFAULT_PORT,
    host: Annotated[
        str, typer.Option(help="Who may come: 127.0.0.1 this machine only, 0.0.0.0 everybody who reaches it.")
    ] = DEFAULT_HOST,
    device: Annotated[
        str | None, typer.Option(help="For example cuda. [default: a GPU where there is one]")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16. [default: bfloat16 on CUDA]")
    ] = None,
) -> None:
    """Open a web page on which the model answers with and without illava, side by side.

    Bring pictures or a video, or pick an example; set how much is merged and where; see both answers, what
    they cost, and where the tokens went, merge by merge.
    """
    from rich.console import Console

    console = Console()
    try:
        with console.status("loading the model"):
            server = launch(model, host=host, port=port, device=device, dtype=dtype)
    except IllavaError as error:
        Console(stderr=True).print(f"illava: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from error
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that uploads are deleted then, too
    with server:
        console.print(f"illava is at {server.url} (end it with Ctrl-C)", markup=False)
        server.wait()


if __name__ == "__main__":
    typer.run(demo)
