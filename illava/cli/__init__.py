"""`illava` on the command line: one small file per command, most of them a table around a function of
`illava.evaluate`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

import illava
from illava.cli import bench, demo, fidelity, models, plan, run
from illava.cli.options import spread

app = typer.Typer(
    name="illava",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Make a Hugging Face vision-language model faster by merging redundant visual tokens, and see for
    yourself what that does to your answers.

    A first hour with your own model and a folder of pictures:

    1. `illava bench MODEL --image pictures/`: how much faster, how much memory

    2. `illava fidelity MODEL --data pictures/`: do the answers stay the same? No labels needed

    3. `illava plan MODEL --data questions.jsonl --min-agreement 0.98`: the cheapest plan that keeps them

    4. `illava run MODEL --data questions.jsonl --plan plan.json`: and now all of them

    Tables go to stdout, everything else to stderr; `--json` prints one JSON document instead of tables. Exit
    status: 0 done, 1 an error that is explained, 2 a wrong command line, 3 no plan reaches what was asked
    for, 130 stopped with Ctrl-C (what was finished is kept and shown).""",
)
for command in (run, bench, fidelity, plan, demo, models):
    app.command(name=command.__name__.rsplit(".", 1)[-1])(command.command)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"illava {illava.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of `illava` itself."""


def main(arguments: Sequence[str] | None = None) -> None:
    """What the command `illava` runs; exits with the status that its help explains."""
    app(spread(sys.argv[1:] if arguments is None else arguments))
