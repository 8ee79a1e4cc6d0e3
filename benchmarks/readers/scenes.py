"""Pictures and clips for the readers, drawn by seeded code: digits, shapes and writing over photographs.

A picture is a photograph with a few small things on it, so most of it says nothing about any question, as in
real pictures. Things stand in the cells of a coarse grid, shifted a little: "left of" is then well defined.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from readers import material
from readers.canvas import (
    NAME,
    NOT_ASKED,
    UNIT_PX,
    Canvas,
    background,
    draw_ink,
    finish,
    lettering,
    nothing,
    put,
    shade,
)

CELLS = {96: 2, 128: 3, 192: 4, 256: 5}  # cells a side of a picture of so many pixels
WRITING = "writing"
RELATIONS = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}


@dataclass(frozen=True)
class Thing:
    """One thing in a picture.

    Attributes:
        kind: "digit", one of the shapes, or "writing".
        name: what an answer calls it: "seven", "circle", or the string that is written.
        colour: its colour's name.
        row, column: its cell.
    """

    kind: str
    name: str
    colour: str
    row: int
    column: int


@dataclass(frozen=True)
class Scene:
    """A picture and what is in it.

    Attributes:
        pixels: `[height, width, 3]` uint8.
        things: what was drawn.
        labels: `[height / 16, width / 16, LABELS]` what stands in each unit, see `Canvas`.
    """

    pixels: np.ndarray
    things: tuple[Thing, ...]
    labels: np.ndarray

    def of_kind(self, kind: str) -> list[Thing]:
        """The things of a kind, in the order they were drawn."""
        return [thing for thing in self.things if thing.kind == kind]


@dataclass(frozen=True)
class Clip:
    """A video, its digits in the order of their appearance, and the labels of each of its frames.

    Attributes:
        pixels: `[frames, height, width, 3]` uint8.
        things: its digits.
        labels: `[frames, height / 16, width / 16, LABELS]`.
    """

    pixels: np.ndarray
    things: tuple[Thing, ...]
    labels: np.ndarray


def beside(things: Sequence[Thing], thing: Thing) -> dict[str, Thing]:
    """The nearest of the other things in a thing's row or column of cells, by relation; writing is none."""
    nearest: dict[str, tuple[int, Thing]] = {}
    for other in things:
        rows, columns = other.row - thing.row, other.column - thing.column
        for relation, (down, across) in RELATIONS.items():
            steps = rows * down + columns * across
            aligned = rows == 0 if down == 0 else columns == 0
            ahead = aligned and steps > 0 and other.kind != WRITING
            if ahead and (relation not in nearest or steps < nearest[relation][0]):
                nearest[relation] = steps, other
    return {relation: nearest[relation][1] for relation in RELATIONS if relation in nearest}


def _number(thing: Thing) -> int:
    """A digit's or shape's name as `Canvas` notes it."""
    return 1 + (*material.NUMBERS, *material.SHAPES).index(thing.name)


def _relate(canvas: Canvas, things: Sequence[Thing]) -> None:
    """Note on each of the things, drawn in their order, what stands beside it and how many are like it."""
    digits = Counter(thing.colour for thing in things if thing.kind == "digit")
    shapes = Counter(thing.kind for thing in things)
    tally = [*(digits[colour] for colour in material.COLOURS), *(shapes[shape] for shape in material.SHAPES)]
    for number, thing in enumerate(things):
        if thing.kind == WRITING:
            continue
        found = beside(things, thing)
        names = (_number(found[side]) if side in found else 0 for side in RELATIONS)
        canvas.note_beside(number, tuple(names))
        if thing.kind == "digit":
            alike = _asked(digits[thing.colour]), _asked(digits.total())
        else:
            alike = _asked(shapes[thing.kind]), NOT_ASKED
        canvas.note_counts(number, alike, [_asked(count) for count in tally])


def _asked(count: int) -> int:
    """Nobody is asked to count beyond nine."""
    return count if count < len(material.NUMBERS) else NOT_ASKED


def _draw(canvas: Canvas, rng, split, thing: Thing, cell: int) -> None:
    if thing.kind == WRITING:
        _write(canvas, rng, split, thing, cell)
        return
    shortest = 0.62 if thing.kind == "digit" else 0.4
    size = int(rng.uniform(shortest, shortest + 0.24) * cell)
    if thing.kind == "digit":
        number = material.NUMBERS.index(thing.name)
        which = int(rng.integers(len(material.digits(split)[number])))
        ink = material.ink(split, number, which, size)
    else:
        ink = material.shape_ink(thing.kind, size)
    top = thing.row * cell + int(rng.integers(cell - size + 1))
    left = thing.column * cell + int(rng.integers(cell - size + 1))
    draw_ink(canvas.pixels, ink, top, left, shade(rng, thing.colour))
    canvas.note(ink, top, left, _number(thing), 1 + list(material.COLOURS).index(thing.colour))


def _write(canvas: Canvas, rng, split, thing: Thing, cell: int) -> None:
    """Writing within two cells side by side."""
    ink, font = lettering(rng, split, thing.name)
    width, height = ink.size
    y = thing.row * cell + int(rng.integers(max(1, cell - height + 1)))
    x = thing.column * cell + int(rng.integers(max(1, 2 * cell - width + 1)))
    x = min(x, len(canvas.pixels) - width)  # wide letters may be wider than two small cells
    put(canvas, ink, font, thing.name, x, y, thing.colour, rng)


def _colours(rng: np.random.Generator, count: int, palette: int | None) -> list[str]:
    """Colours of `count` digits, some shared, so that counting by colour has something to do."""
    names = list(rng.permutation(list(material.COLOURS)))[:palette]
    colours = names[: min(count, len(names))] + list(rng.choice(names, max(0, count - len(names))))
    if count > 2 and rng.random() < 0.6:
        shared = int(rng.integers(1, count - 1))
        colours[:shared] = [colours[0]] * shared
    return [str(colour) for colour in rng.permutation(colours)]


def picture(
    rng: np.random.Generator, split: str, side: int, *, digits: int, shapes: int = 0, writing: bool = False,
    palette: int | None = None,
) -> Scene:  # fmt: skip
    """Draw one picture of `side` x `side` pixels.

    Args:
        digits, shapes: how many of each. Cells that writing takes reduce what fits.
        writing: whether a string is written in it, over two cells side by side.
        palette: how many colours there are for the digits; None for all.
    """
    cells = CELLS[side]
    cell = side // cells
    free = {(row, column) for row in range(cells) for column in range(cells)}
    colour_names = list(material.COLOURS)
    things = []
    if writing:
        row, column = int(rng.integers(cells)), int(rng.integers(cells - 1))
        free -= {(row, column), (row, column + 1)}
        string, colour = material.written(rng, split), str(rng.choice(colour_names))
        things.append(Thing(WRITING, string, colour, row, column))
    places = [sorted(free)[i] for i in rng.permutation(len(free))]
    digits = min(digits, len(places))
    for colour in _colours(rng, digits, palette):
        things.append(Thing("digit", material.NUMBERS[rng.integers(10)], colour, *places.pop()))
    for _ in range(min(shapes, len(places))):
        kind = material.SHAPES[rng.integers(len(material.SHAPES))]
        things.append(Thing(kind, kind, str(rng.choice(colour_names)), *places.pop()))
    canvas = Canvas(background(rng, split, side))
    for thing in things:
        _draw(canvas, rng, split, thing, cell)
    _relate(canvas, things)
    return Scene(finish(canvas.pixels, rng), tuple(things), canvas.labels)


def signs(rng: np.random.Generator, split: str, side: int, *, ease: float = 0.0) -> Scene:
    """A picture with writing in each row of cells and wherever two cells side by side are left, for training.

    No two have the same colour, as long as there are colours.

    Args:
        ease: share of the writings that are one or two characters long, a quarter at least.
    """
    cells = CELLS[side]
    canvas = Canvas(background(rng, split, side))
    colours = [str(colour) for colour in rng.permutation(list(material.COLOURS))]
    things = []
    for row in range(cells):
        for column in range(int(rng.integers(cells % 2 + 1)), cells - 1, 2):
            colour = colours[len(things) % len(colours)]
            brief = rng.random() < max(ease, 0.25)
            string = (material.short if brief else material.written)(rng, split)
            things.append(Thing(WRITING, string, colour, row, column))
    for thing in things:
        _draw(canvas, rng, split, thing, side // cells)
    return Scene(finish(canvas.pixels, rng), tuple(things), canvas.labels)


def chart(rng: np.random.Generator, split: str, side: int, *, calm: float) -> Scene:
    """A picture crowded with digits, shapes and writing, from which an encoder learns to see.

    How crowded, and in how many colours, is drawn: what stands beside a thing may stand far off, and counting
    what is alike begins with counting all.

    Args:
        calm: how much of the photograph's contrast is taken away, 0 to 1.
    """
    cell = int(rng.choice([size for size in (32, 48) if size <= side // 2]))
    cells = side // cell
    still = background(rng, split, side)
    canvas, things = Canvas(still + calm * (still.mean((0, 1)) - still)), []
    colours = list(rng.permutation(list(material.COLOURS)))[: int(rng.integers(1, len(material.COLOURS) + 1))]
    crowded = rng.uniform(0.3, 1.0)
    for row in range(cells):
        column = 0
        while column < cells:
            colour, number = str(rng.choice(colours)), int(rng.integers(13))
            name = (*material.NUMBERS, *material.SHAPES)[number]
            thing = Thing("digit" if number < 10 else name, name, colour, row, column)
            if column + 1 < cells and rng.random() < 0.3:
                thing = Thing(WRITING, material.written(rng, split), colour, row, column)
                column += 1
            if rng.random() < crowded:
                _draw(canvas, rng, split, thing, cell)
                things.append(thing)
            column += 1
    _relate(canvas, things)
    return Scene(finish(canvas.pixels, rng), tuple(things), canvas.labels)


def page(rng: np.random.Generator, split: str, side: int, *, calm: float) -> Scene:
    """A picture covered with lines of writing; `calm` as in `chart`."""
    still = background(rng, split, side)
    canvas = Canvas(still + calm * (still.mean((0, 1)) - still))
    y = int(rng.integers(8))
    while y < side:
        x, tallest = int(rng.integers(16)), 8
        while x < side:
            string = material.written(rng, split)
            ink, font = lettering(rng, split, string)
            if x + ink.width <= side and y + ink.height <= side:
                put(canvas, ink, font, string, x, y, str(rng.choice(list(material.COLOURS))), rng)
                tallest = max(tallest, ink.height)
            x += ink.width + int(rng.integers(4, 24))
        y += tallest + int(rng.integers(1, 10))
    return Scene(finish(canvas.pixels, rng), (), canvas.labels)


def clip(rng: np.random.Generator, split: str, side: int, *, frames: int, digits: int) -> Clip:
    """Draw a clip in which digits appear one after another, each for a while, over a still photograph.

    Appearances begin on even frames, at least two frames apart: encoders that take frames in pairs see each
    in a pair of its own.
    """
    cells = CELLS[side]
    cell = side // cells
    places = rng.permutation(cells * cells)[:digits]
    names = rng.permutation(material.NUMBERS)[:digits]
    colours = rng.permutation(list(material.COLOURS))[:digits]
    starts = np.sort(rng.permutation(frames // 2)[:digits]) * 2
    still = background(rng, split, side)
    video = np.repeat(still[None], frames, 0)
    labels = np.repeat(nothing(side // UNIT_PX)[None], frames, 0)
    things = []
    for place, name, colour, start in zip(places, names, colours, starts, strict=True):
        thing = Thing("digit", str(name), str(colour), int(place) // cells, int(place) % cells)
        drawn = Canvas(still.copy())
        _draw(drawn, rng, split, thing, cell)
        changed = np.any(drawn.pixels != still, axis=-1)  # only its own pixels: others may be on screen
        seen = drawn.labels[..., NAME] > 0
        end = int(start) + 2 * int(rng.integers(1, 3))
        for frame in range(int(start), min(end, frames)):
            video[frame][changed] = drawn.pixels[changed]
            labels[frame][seen] = drawn.labels[seen]
        things.append(thing)
    pixels = np.stack([finish(frame, rng) for frame in video])
    return Clip(pixels, tuple(things), labels)
