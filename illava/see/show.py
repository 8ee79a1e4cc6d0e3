"""`illava.visualize`: what to draw, and of which merges."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from illava.errors import PictureError
from illava.extras import required
from illava.provenance import Provenance

if TYPE_CHECKING:
    from PIL import Image

    from illava.report import Report

FRAMES_SHOWN = 6
FILES = (".png", ".svg", ".pdf")


def visualize(
    report: Report | None,
    pictures: Any,
    *,
    merges: int | Sequence[int] | None = None,
    importance: bool = False,
    row: int = 0,
    frames: int = FRAMES_SHOWN,
    title: str | None = None,
    save: str | Path | None = None,
) -> Image.Image:
    """Draw where the tokens went: the pictures, and what every merge left of them.

    What is kept keeps its colours; what was dropped is dark and striped. A token that took in others has a
    thick outline: in a colour of its own, with a number, if this merge did it, and what it took in has the
    same colour and number; in white if an earlier one did, and what such tokens took in is grey.

    Args:
        report: of a model patched with `trace=True`, after a call.
        pictures: what the processor was given: a picture (PIL or `[height, width, 3]` uint8), a video (its
            frames as a list, or `[frames, height, width, 3]`), or a list of pictures and videos.
        merges: which merges to draw, counted from 0 over encoder and language model; all of them by default.
        importance: draw as well by what each merge ranked the tokens: yellow is most important.
        row: which batch row.
        frames: how many frames of a video to draw at most, evenly spread.
        title: a line above, for example the question asked.
        save: a file to write as well, `.png`, `.svg` or `.pdf`.

    Returns:
        The picture of it, which a notebook shows by itself.

    Raises:
        PictureError: nothing was traced, the pictures are not those of the report, there is no such merge,
            or files of this kind are not written.
        MissingExtraError: matplotlib or PIL is not installed.
    """
    for package in ("matplotlib.figure", "PIL.Image"):
        required(package, "see")
    from illava.see import figure, given, views

    if save is not None and Path(save).suffix.lower() not in FILES:
        raise PictureError(f"save={str(save)!r}: what is drawn is written as {', '.join(FILES)}")
    if frames < 1:
        raise PictureError(f"frames={frames}: at least one frame of a video is drawn")
    own = _traced(report, row)
    shown = given.as_pictures(pictures, video=all(p.kind == "video" for p in own))
    found = views.views(own, shown, frames)
    video = len(shown) == 1 and isinstance(shown[0], list)
    numbers = _chosen(len(own[0].merges), merges)
    drawn = figure.compose(found, numbers, importance=importance, title=title, video=video)
    if save is not None:
        drawn.savefig(save)
    return figure.image(drawn)


def _traced(report: Report | None, row: int) -> list[Provenance]:
    """The provenance of one row's pictures."""
    if report is None or report.provenance is None:
        raise PictureError(
            "this report does not tell where tokens came from; patch with illava.patch(model, trace=True) "
            "and call the model again"
        )
    own = [p for p in report.provenance if p.row == row]
    if not own:
        rows = sorted({p.row for p in report.provenance})
        raise PictureError(f"row={row} of the last call has no picture; rows with pictures: {rows}")
    return own


def _chosen(number: int, merges: int | Sequence[int] | None) -> list[int]:
    chosen = range(number) if merges is None else [merges] if isinstance(merges, int) else merges
    beyond = [m for m in chosen if not -number <= m < number]
    if beyond:
        raise PictureError(
            f"merges={merges}: this call has merges 0 to {number - 1}, so there is no {beyond}"
        )
    return [m % number for m in chosen]
