"""The whole figure: pictures by merges, as in the paper's figure 5."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from illava.see.cells import Cell, Row, arrange
from illava.see.legend import ENTRY_INCHES, meanings
from illava.see.panels import READABLE, draw_importance, draw_picture, draw_step
from illava.see.views import View

WIDTH_INCHES, HEIGHT_INCHES = 13.0, 13.0  # of all panels, within the bounds of one
NARROWEST, WIDEST = 1.8, 3.6  # inches, a panel
DOTS_PER_INCH = 160
GAP, LINE, MARGIN = 0.1, 0.2, 0.15  # inches
SMALL, LARGE = 9, 11  # points
LETTER = 0.08  # inches, a small one on average


def compose(
    found: Sequence[View], merges: Sequence[int], *, importance: bool, title: str | None, video: bool
) -> Figure:
    """Draw views after some merges; `video` says that they are one video's frames."""
    readable = int((WIDTH_INCHES - 1) * 72 / READABLE)  # less the gaps
    rows = arrange(found, merges, importance=importance, video=video, readable=readable)
    shapes = [max(cell.shape for cell in row.cells if cell is not None) for row in rows]
    columns = max(len(row.cells) for row in rows)
    panel = min(WIDTH_INCHES / columns, HEIGHT_INCHES / sum(shapes)) - GAP
    return _Page(rows, min(WIDEST, max(NARROWEST, panel)), columns, title).figure


def image(figure: Figure) -> Image.Image:
    """The figure in pixels."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.frombytes("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba())).convert("RGB")


class _Page:
    """A figure under way, in inches from its lower left corner.

    Args:
        rows: of panels.
        panel: the width of one.
        columns: how many there are at most side by side.
    """

    def __init__(self, rows: Sequence[Row], panel: float, columns: int, title: str | None) -> None:
        self.panel, self.left = panel, MARGIN + (0.4 if any(row.beside for row in rows) else 0.0)
        self.width = self.left + columns * (panel + GAP) - GAP + MARGIN
        heights = [panel * max(cell.shape for cell in row.cells if cell is not None) for row in rows]
        captions = [
            LINE if any(cell is not None and cell.caption for cell in row.cells) else 0 for row in rows
        ]
        heads = [LINE * 1.2 if row.above else 0.0 for row in rows]
        cells = [cell for row in rows for cell in row.cells if cell is not None]
        merged = [cell.placed for cell in cells if cell.merge is not None and not cell.heat]
        legend = meanings(merged, importance=any(cell.heat for cell in cells))
        lines = -(-len(legend) // max(1, int(self.width / ENTRY_INCHES)))
        top = MARGIN + (LINE * 1.6 if title else 0.0)
        bottom = MARGIN + LINE * lines * 1.2
        self.height = top + sum(heights) + sum(captions) + sum(heads) + GAP * len(rows) + bottom
        self.figure = Figure((self.width, self.height), dpi=DOTS_PER_INCH, facecolor="white")
        if title:
            self._write(self.left, self.height - MARGIN, title, size=LARGE, weight="bold", va="top")
        y = self.height - top
        for row, height, caption, head in zip(rows, heights, captions, heads, strict=True):
            y -= head + height
            self._row(row, y, height)
            y -= caption + GAP
        if legend:
            handles, labels = zip(*legend, strict=True)
            self.figure.legend(
                handles, labels, loc="lower center", ncols=-(-len(legend) // lines), frameon=False,
                fontsize=SMALL, handlelength=1.6, handleheight=1.2, columnspacing=1.6, borderaxespad=0.3,
            )  # fmt: skip

    def _row(self, row: Row, y: float, height: float) -> None:
        beside = row.beside
        if len(beside) * LETTER > height:  # it would reach into the next row
            beside = beside.replace(", ", ",\n", 1)
        self._write(
            self.left - 0.08, y + height / 2, beside,
            rotation=90, ha="right", va="center", multialignment="center",
        )  # fmt: skip
        for number, cell in enumerate(row.cells):
            x = self.left + number * (self.panel + GAP)
            if row.above:
                self._write(x + self.panel / 2, y + height + 0.06, row.above[number], ha="center")
            if cell is None:
                words = "importance,\nas ranked by\nthis merge"
                self._write(x + self.panel, y + height / 2, words, ha="right", va="center")
            else:
                self._cell(cell, x, y, height)

    def _cell(self, cell: Cell, x: float, y: float, height: float) -> None:
        box = (x / self.width, y / self.height, self.panel / self.width, height / self.height)
        axes = self.figure.add_axes(box)
        if cell.merge is None:
            draw_picture(axes, cell.view)
        elif cell.heat:
            draw_importance(axes, cell.view, cell.steps)
        else:
            draw_step(axes, cell.view, cell.steps, self.panel * 72)
        self._write(x + self.panel / 2, y - 0.05, cell.caption, ha="center", va="top")

    def _write(self, x: float, y: float, words: str, *, size: float = SMALL, **how: object) -> None:
        if words:
            self.figure.text(x / self.width, y / self.height, words, size=size, **how)  # type: ignore[arg-type]
