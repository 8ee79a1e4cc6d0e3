"""Where the tokens went, one picture per merge, as HTML that carries its pictures inside itself.

Nothing is written to disk: what a tab was shown is gone with the tab.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import Any

from illava.demo.media import Clip, Picture
from illava.demo.painting import frames_of, paint
from illava.report import Report


def draw_overlays(report: Report, shown: Sequence[Picture | Clip]) -> tuple[str, ...]:
    """The pictures before any merge, then after each of them."""
    histories = report.provenance or ()
    if len(histories) != len(shown):
        return ()
    shots = [frames_of(item) for item in shown]
    begun = report.tokens
    overlays = [_html("before any merge", f"{begun:,} visual tokens", shots)]
    for number, step in enumerate(histories[0].merges):
        painted = [paint(frames, history, number) for frames, history in zip(shots, histories, strict=True)]
        count = sum(len(history.merges[number].tokens) for history in histories)
        overlays.append(_html(f"after {step.name}", f"{count:,} tokens left", painted))
    return tuple(overlays)


def _html(title: str, words: str, pictures: Sequence[Sequence[Any]]) -> str:
    images = "".join(
        f'<img src="{_data(frame)}" alt="{escape(title)}">' for frames in pictures for frame in frames
    )
    count = sum(len(frames) for frames in pictures)
    size = "one" if count == 1 else "few" if count <= 4 else "many"
    return (
        f'<section class="overlay"><h3>{escape(title)} <span>{escape(words)}</span></h3>'
        f'<div class="frames {size}">{images}</div>{LEGEND}</section>'
    )


LEGEND = (
    '<p class="legend"><i class="kept"></i>kept <i class="recycled"></i>kept, and took in others '
    '<i class="absorbed"></i>merged into another <i class="gone"></i>gone</p>'
)


def _data(image: Any) -> str:
    kept = io.BytesIO()
    image.save(kept, format="WEBP", quality=88)
    return "data:image/webp;base64," + base64.b64encode(kept.getvalue()).decode()
