"""What the colours of the panels mean, in the words of the paper."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.colors import to_hex, to_rgb
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from illava.see import paint
from illava.see.panels import EARLIER_EDGE, EARLIER_WIDTH, GROUP_WIDTH, INFORMATIVE_EDGE, RIM

ENTRY_INCHES = 2.4  # on average
KEPT = "0.85"  # a patch of no particular picture


def meanings(placed: Sequence[bool], *, importance: bool) -> list[tuple[Artist | tuple[Artist, ...], str]]:
    """Signs and what they mean.

    Args:
        placed: of each panel that shows a merge, whether its tokens stand somewhere on the picture.
        importance: whether there are panels of what merges ranked the tokens by.
    """
    group = paint.colour(1)
    tint = to_hex([paint.TINT * x + (1 - paint.TINT) * 0.5 for x in to_rgb(group)])  # type: ignore[arg-type]
    found: list[tuple[Artist | tuple[Artist, ...], str]] = []
    if any(placed):
        found += [
            (Patch(facecolor=KEPT, edgecolor=INFORMATIVE_EDGE, linewidth=1.5), "informative: kept"),
            (
                (Patch(facecolor=KEPT, edgecolor=group, linewidth=GROUP_WIDTH), _circle(group), _number()),
                "recycled: takes in others",
            ),
            ((Patch(facecolor=tint), _number()), "taken in by the token of that number"),
            (_box(EARLIER_EDGE, EARLIER_WIDTH), "recycled in an earlier merge"),
            (Patch(facecolor=str(paint.ABSORBED + (1 - paint.VEIL) / 2)), "taken in earlier"),
            (Patch(facecolor=str(paint.DROPPED), edgecolor="0.5", hatch="////", linewidth=0), "dropped"),
        ]
    if not all(placed):
        found.append((Patch(facecolor=KEPT, edgecolor="0.5"), "brighter: tokens read more of it"))
    if importance:
        heat = colormaps[paint.HEAT]
        found += [
            (Patch(facecolor=to_hex(heat(1.0))), "most important"),
            (Patch(facecolor=to_hex(heat(0.0))), "least important"),
        ]
    return found


def _box(edge: str, width: float) -> tuple[Artist, ...]:
    """An outline with its rim."""
    return (
        Patch(facecolor=KEPT, edgecolor="black", linewidth=width * (1 + RIM)),
        Patch(facecolor="none", edgecolor=edge, linewidth=width),
    )


def _circle(fill: str) -> Artist:
    return Line2D(
        [], [], linestyle="none", marker="o", markersize=8, color=fill, markeredgecolor="black",
        markeredgewidth=0.6,
    )  # fmt: skip


def _number() -> Artist:
    return Line2D([], [], linestyle="none", marker="$1$", markersize=4.5, color="black", markeredgewidth=0.3)
