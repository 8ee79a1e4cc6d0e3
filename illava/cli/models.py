"""`illava models`: which architectures there are, and what the default plan is."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from illava.cli import options as o
from illava.cli.console import busy, finishing, out, print_json

_HELP = """The architectures illava knows, their merge units, and where `merge="recycle"` merges.

`illava models MODEL` shows the default plan of one checkpoint, from its config alone, and what becomes of a
picture under it."""


def command(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Folder of a checkpoint, or a name on the hub.")
    ] = None,
    as_json: o.Json = False,
) -> None:
    with finishing():
        from illava.cli.tables import architecture_table, models_table
        from illava.evaluate.architectures import all_architectures, architecture_of

        if model is None:
            rows = all_architectures()
            if as_json:
                print_json({"models": {name: about.to_dict() for name, about in rows.items()}, **_versions()})
            else:
                out.print(models_table(rows, _versions()))
            return
        with busy(f"reading {model}"):
            found = architecture_of(model)
        if as_json:
            print_json(found.to_dict() | _versions())
        else:
            out.print(architecture_table(found))


command.__doc__ = _HELP


def _versions() -> dict[str, Any]:
    import torch
    import transformers

    import illava

    return {
        "illava": illava.__version__, "torch": torch.__version__, "transformers": transformers.__version__
    }  # fmt: skip
