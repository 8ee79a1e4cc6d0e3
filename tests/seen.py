"""Traced calls of the zoo's models and what their pictures look like, for the tests of what is drawn."""

import numpy as np
import pytest

import illava
import zoo
from contract import tools
from illava.see import figure, given, views

# Windows; tiles and pixel shuffle; packing with padding and pooling; a merger inside the encoder, and slices.
FAMILIES = [
    name for name in ("qwen2_5_vl", "internvl", "llava_onevision", "minicpmv4_6") if name in zoo.FAMILIES
]
VIDEOS = [name for name in FAMILIES if name != "internvl"]  # to which frames are pictures


def shown(rows):
    """What a row's pictures and videos look like."""
    return [x.pil() if hasattr(x, "pil") else x.array() for x in tools.pictures_of([rows])]


_SEEN: dict = {}


def seen(family, kind="one picture", row=0):
    """A report and what its row's pictures look like."""
    if (family, kind) not in _SEEN:
        model = tools.build(family)
        with tools.patch(model, family, trace=True, **tools.DEEP) as handle:
            tools.forward(model, tools.prompt_of(family, kind))
        _SEEN[family, kind] = handle.report
    return _SEEN[family, kind], shown(zoo.FAMILIES[family].KINDS[kind][row])


def drawn(*args, **options):
    """`illava.visualize`, and matplotlib's figure instead of its pixels."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(figure, "image", lambda made: made)
        return illava.visualize(*args, **options)


def words(made):
    return [text.get_text() for text in made.texts if text.get_text()]


def views_of(report, pictures, row=0):
    own = [p for p in report.provenance if p.row == row]
    video = all(p.kind == "video" for p in own)
    return views.views(own, given.as_pictures(pictures, video=video), 99)


def patches_of(view, shape):
    """Each patch on a view: its place, its number in the provenance, and its pixels as a pair of slices."""
    for place in view.places:
        own = place.provenance
        rows, columns = own.frames[place.frame]
        first = sum(h * w for h, w in own.frames[: place.frame])
        left, top, right, bottom = place.box
        x = np.linspace(left * shape[1], right * shape[1], columns + 1).round().astype(int)
        y = np.linspace(top * shape[0], bottom * shape[0], rows + 1).round().astype(int)
        for r in range(rows):
            for c in range(columns):
                yield place, first + r * columns + c, (slice(y[r], y[r + 1]), slice(x[c], x[c + 1]))
