"""What commands print, where, and how they end."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column

from illava.errors import IllavaError, NoPlanError

FAILED, NOT_REACHED, STOPPED = 1, 3, 130
DEBUG = "ILLAVA_DEBUG"

WIDE = 140  # of tables that go into a file or another program
out = Console(width=None if sys.stdout.isatty() else WIDE)
notes = Console(stderr=True, width=None if sys.stderr.isatty() else WIDE, highlight=False)


@contextmanager
def finishing(kept: str = "") -> Iterator[None]:
    """A command's body: every error becomes a sentence and an exit status, never a traceback.

    Args:
        kept: said after Ctrl-C: where to find what was finished.
    """
    try:
        with busy("starting"):
            import torch  # noqa: F401  # takes seconds, wherever it comes first

            _quiet_libraries()
        yield
    except IllavaError as error:
        _fail(error, str(error), NOT_REACHED if isinstance(error, NoPlanError) else FAILED)
    except KeyboardInterrupt:
        stopped(kept)
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whoever read this has gone; so do we
        raise typer.Exit(FAILED) from None
    except Exception as error:
        from illava.memory import is_memory

        if is_memory(error):
            _fail(
                error,
                "out of memory; give smaller pictures or a smaller --batch-size, or where the model itself "
                "does not fit, --dtype bfloat16 or another --device",
            )
        name = type(error).__name__
        _fail(error, f"{name}: {error}\nThis is not an error illava expects. With {DEBUG}=1 it shows where.")


def stopped(kept: str = "") -> None:
    """End as Ctrl-C does."""
    notes.print(f"stopped{'; ' + kept if kept else ''}", markup=False, soft_wrap=True)
    raise typer.Exit(STOPPED)


def _fail(error: BaseException, message: str, status: int = FAILED) -> None:
    if os.environ.get(DEBUG):
        notes.print_exception()
    notes.print(f"illava: {message}", markup=False, soft_wrap=True)
    raise typer.Exit(status) from error


def _quiet_libraries() -> None:
    """Bars and advice of other libraries would run through ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def print_json(values: Any) -> None:
    """One JSON document on stdout."""
    typer.echo(json.dumps(values, indent=2, ensure_ascii=False))


@contextmanager
def busy(what: str) -> Iterator[None]:
    """A spinner on stderr while something without steps goes on."""
    with notes.status(what):
        yield


@contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar on stderr; the yielded function is called before each step, and says what it is."""
    done = 0
    with stages(what) as show:
        show(what, 0, total)

        def step(now: str) -> None:
            nonlocal done
            show(now, done, total)
            done += 1

        yield step


@contextmanager
def stages(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on stderr that begins anew with each stage of a longer work; the yielded function is
    told what is being done, and how many of how many steps are done."""
    columns = (
        SpinnerColumn(), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
    )  # fmt: skip
    with Progress(*columns, console=notes, transient=True) as shown:
        task = shown.add_task(what, total=None)

        def show(now: str, done: int, total: int) -> None:
            shown.update(task, description=escape(now), completed=done, total=total)

        yield show
