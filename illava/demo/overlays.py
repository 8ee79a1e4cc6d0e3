"""Where the tokens went, merge by merge, as HTML that carries its picture inside itself.

Nothing is written to disk: what a tab was shown is gone with the tab.
"""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from illava.demo.cards import notice
from illava.demo.media import Clip, Picture
from illava.errors import PictureError
from illava.report import Report
from illava.see.show import visualize

_PEN = threading.Lock()  # matplotlib draws one figure at a time


@dataclass(frozen=True)
class Overlays:
    """The pictures of one patched answer, drawn when they are first looked at.

    Attributes:
        report: of a traced call.
        shown: what it was shown.
    """

    report: Report
    shown: Sequence[Picture | Clip]
    _drawn: dict[tuple[int, bool], str] = field(default_factory=dict, repr=False)

    @property
    def last(self) -> int:
        """The last place: how many merges there were."""
        return len(self.report.provenance[0].merges) if self.report.provenance else 0

    def html(self, place: int, importance: bool = False) -> str:
        """One place as a section of the page.

        Args:
            place: 0 before any merge, 1 after the first; beyond the last is the last.
            importance: draw as well what the merge ranked the tokens by.
        """
        place = min(max(place, 0), self.last)
        key = place, importance and place > 0
        if key not in self._drawn:
            self._drawn[key] = self._section(*key)
        return self._drawn[key]

    def _section(self, place: int, importance: bool) -> str:
        if not self.report.provenance:
            return ""
        title, words = "before any merge", f"{self.report.tokens:,} visual tokens"
        if place:
            title = f"after {self.report.provenance[0].merges[place - 1].name}"
            left = sum(len(p.merges[place - 1].tokens) for p in self.report.provenance)
            words = f"{left:,} tokens left"
        given: list[Any] = [x.image if isinstance(x, Picture) else x.frames for x in self.shown]
        try:
            with _PEN:
                image = visualize(
                    self.report, given, merges=range(place - 1, place) if place else (), importance=importance
                )
        except PictureError as error:
            return notice(f"where the tokens went cannot be drawn: {error}", "hint")
        return (
            f'<section class="overlay"><h3>{escape(title)} <span>{escape(words)}</span></h3>'
            f'<div class="drawn"><img src="{_data(image)}" alt="{escape(title)}: {escape(words)}"'
            f' style="max-width:{image.width}px"></div></section>'
        )


def _data(image: Any) -> str:
    kept = io.BytesIO()
    image.save(kept, format="WEBP", quality=88)
    return "data:image/webp;base64," + base64.b64encode(kept.getvalue()).decode()
