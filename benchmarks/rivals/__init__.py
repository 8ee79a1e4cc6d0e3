"""Other ways to spend fewer visual tokens, written on illava's seams, to be measured beside it.

Each runs for real: what it removes is gone from the hidden states, the masks and the cache. Ideas and
facts are taken from papers and their code, no code. `RIVALS` is what there is, in the order of tables;
`ABSENT` what there is not, and why. A new method is a file like `fastv.py` and a line here.
"""

from __future__ import annotations

from rivals import (
    adafv,
    aim,
    average_pooling,
    divprune,
    fastervlm,
    fastv,
    feather,
    ours,
    prumerge,
    pyramiddrop,
    random_tokens,
    smaller_picture,
    sparsevlm,
    tome,
    unpatched,
    visionzip,
)
from rivals.common import Rival
from rivals.compute import Match, area, match_compute

__all__ = ["ABSENT", "RIVALS", "Match", "Rival", "area", "match_compute"]

RIVALS: dict[str, Rival] = {
    rival.name: rival
    for rival in (
        unpatched.RIVAL,
        random_tokens.RIVAL,
        smaller_picture.RIVAL,
        average_pooling.RIVAL,
        fastv.RIVAL,
        pyramiddrop.RIVAL,
        sparsevlm.RIVAL,
        visionzip.RIVAL,
        fastervlm.RIVAL,
        divprune.RIVAL,
        prumerge.RIVAL,
        tome.RIVAL,
        aim.RIVAL,
        feather.RIVAL,
        ours.ILLAVA,
        ours.RECYCLE,
        ours.PAPER,
    )
}
ABSENT: dict[str, str] = {"AdaFV": adafv.REASON}
