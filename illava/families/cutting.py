"""How a family's processor cuts pictures up, for drawing on them what became of their patches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Cutting:
    """What cannot be told from a call of the model, which comes when the processor is done.

    Attributes:
        whole: where the whole picture, made small, stands among its tiles or slices; `None` for a family that
            cuts nothing.
        padded: whether a picture is fitted into its tiles, with padding around it; otherwise it is stretched
            over them.
        slices: whether the whole and each of its slices are encoded as pictures of their own.
        keeps_shape: whether what is encoded has the picture's shape, but for rounding to whole merge units.
    """

    whole: Literal["first", "last"] | None = None
    padded: bool = False
    slices: bool = False
    keeps_shape: bool = False
