"""What the readers' pictures are drawn on: a photograph, ink upon it, and labels of what stands where."""

from __future__ import annotations

import string
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from readers import material

UNIT_PX = 16
CHARACTERS = string.ascii_lowercase + string.digits
LONGEST = 4  # characters of a string
# What is noted of a unit.
NAME, COLOUR, BESIDE, MIDDLE, SPELLED = 0, 1, slice(2, 6), 6, slice(7, 7 + LONGEST)
ALIKE = slice(SPELLED.stop, SPELLED.stop + 2)
TALLY = slice(ALIKE.stop, ALIKE.stop + len(material.COLOURS) + len(material.SHAPES))
LABELS = TALLY.stop
WRITING = 1 + len(material.NUMBERS) + len(material.SHAPES)  # the name of what is written
NOT_ASKED = -1


class Canvas:
    """A picture in the making, and what stands in each of its units of 16 x 16 pixels.

    Attributes:
        pixels: `[side, side, 3]` float32.
        labels: `[side / 16, side / 16, LABELS]` int: `NAME` of what is seen there (0 nothing, then digits,
            shapes, writing) and its `COLOUR` (0 none); what stands `BESIDE` it, left, right, above and
            below (0 nothing, else the name); whether its `MIDDLE` is there; `SPELLED`, for each place in a
            string the character of that place whose middle is there (0 none); how many in the picture are
            `ALIKE`: digits of a digit's colour or shapes of a shape's form, and digits in all; and on every
            thing the `TALLY` of the picture, digits of each colour and shapes of each form.
    """

    def __init__(self, pixels: np.ndarray) -> None:
        units = len(pixels) // UNIT_PX
        self.pixels = pixels
        self.labels = nothing(units)
        self._covered = np.full((units, units), 0.08)
        self._owner = np.full((units, units), -1)
        self._noted = 0

    def note(self, ink: np.ndarray, top: int, left: int, name: int, colour: int) -> None:
        """Label the units that ink `[h, w]` covers more than other things do, and a little at least.

        Their `MIDDLE` is the one in which the ink's box has its own; of writing none is noted.
        """
        side, units = len(self.pixels), len(self.labels)
        whole = np.zeros((side, side), np.float32)
        whole[top : top + len(ink), left : left + ink.shape[1]] = ink
        # [units, 16, units, 16] -> [units, units]
        cover = whole.reshape(units, UNIT_PX, units, UNIT_PX).mean((1, 3))
        more = cover > self._covered
        self._covered[more] = cover[more]
        self._owner[more] = self._noted
        self._noted += 1
        self.labels[more, NAME], self.labels[more, COLOUR] = name, colour
        if name != WRITING:
            last = units - 1
            y, x = top + len(ink) // 2, left + ink.shape[1] // 2
            self.labels[min(y // UNIT_PX, last), min(x // UNIT_PX, last), MIDDLE] = 1

    def note_beside(self, number: int, names: tuple[int, ...]) -> None:
        """Say of the units of what was noted as the `number`-th, from 0, what stands on its four sides."""
        self.labels[self._owner == number, BESIDE] = names

    def note_counts(self, number: int, alike: tuple[int, int], tally: Sequence[int]) -> None:
        """Say of the units of what was noted as the `number`-th, from 0, how many of what there are."""
        self.labels[self._owner == number, ALIKE] = alike
        self.labels[self._owner == number, TALLY] = tally

    def note_character(self, x: float, y: float, place: int, character: str) -> None:
        """Label the unit that holds the middle of a string's character number `place`, from 0."""
        last = UNIT_PX * len(self.labels) - 1
        x, y = min(int(x), last), min(int(y), last)
        spelled = self.labels[y // UNIT_PX, x // UNIT_PX, SPELLED]
        if not spelled[place]:  # or two strings meet in a unit
            spelled[place] = 1 + CHARACTERS.index(character)


def nothing(units: int) -> np.ndarray:
    """Labels `[units, units, LABELS]` of an empty picture: nobody asks what is beside, or like, nothing."""
    labels = np.zeros((units, units, LABELS), np.int64)
    labels[..., BESIDE] = labels[..., ALIKE] = labels[..., TALLY] = NOT_ASKED
    return labels


def background(rng: np.random.Generator, split: str, side: int) -> np.ndarray:
    """A crop of a photograph, `[side, side, 3]` float32 in 0 to 255, mirrored and dimmed at random."""
    photographs = material.photographs(split)
    photograph = photographs[rng.integers(len(photographs))]
    crop = int(rng.integers(96, min(photograph.size) // 2 + 97))
    left = int(rng.integers(photograph.width - crop + 1))
    top = int(rng.integers(photograph.height - crop + 1))
    box = (left, top, left + crop, top + crop)
    pixels = np.asarray(photograph.resize((side, side), Image.Resampling.BILINEAR, box=box), np.float32)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return pixels * rng.uniform(0.5, 1.0) + rng.uniform(0, 40)


def draw_ink(canvas: np.ndarray, ink: np.ndarray, top: int, left: int, colour: np.ndarray) -> None:
    """Blend ink `[h, w]` in a colour into `canvas` in place, with a faint edge of the opposite brightness."""
    height, width = ink.shape
    part = canvas[top : top + height, left : left + width]
    halo = np.zeros_like(ink)
    halo[1:] = np.maximum(halo[1:], ink[:-1])
    halo[:-1] = np.maximum(halo[:-1], ink[1:])
    halo[:, 1:] = np.maximum(halo[:, 1:], ink[:, :-1])
    halo[:, :-1] = np.maximum(halo[:, :-1], ink[:, 1:])
    edge = 255.0 if colour @ (0.3, 0.6, 0.1) < 90 else 0.0
    part += (0.6 * halo)[..., None] * (edge - part)
    part += ink[..., None] * (colour - part)


def shade(rng: np.random.Generator, colour: str) -> np.ndarray:
    """A colour, `[3]`, as it comes out this time."""
    return np.clip(np.array(material.COLOURS[colour]) + rng.normal(0, 10, 3), 0, 255)


def lettering(rng: np.random.Generator, split: str, text: str) -> tuple[Image.Image, object]:
    """The ink of a text, of 13 to 18 pixels whatever the size of the picture, and its font."""
    names = material.font_names(split)
    font = material.font(names[rng.integers(len(names))], int(rng.integers(13, 19)))
    left, top, right, bottom = font.getbbox(text)
    ink = Image.new("L", (right - left + 2, bottom - top + 2))
    ImageDraw.Draw(ink).text((1 - left, 1 - top), text, font=font, fill=255)
    return ink, font


def put(canvas: Canvas, ink: Image.Image, font, text: str, x: int, y: int, colour: str, rng) -> None:
    """Draw written ink with its corner at x and y, and label it and its characters."""
    shown = np.asarray(ink, np.float32) / 255
    draw_ink(canvas.pixels, shown, y, x, shade(rng, colour))
    canvas.note(shown, y, x, WRITING, 1 + list(material.COLOURS).index(colour))
    for i, character in enumerate(text):
        ahead, reached = (font.getlength(text[:n]) for n in (i, i + 1))
        canvas.note_character(x + (ahead + reached) / 2, y + ink.height / 2, i, character)


def finish(canvas: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The picture, uint8, with the noise of a camera."""
    noise = rng.normal(0, 4, canvas.shape).astype(np.float32)
    return np.clip(canvas + noise, 0, 255).astype(np.uint8)
