"""The six tasks of the readers: questions about drawn pictures and clips, with their answers in words.

    find      which digit is red ?                        ten answers, chance 10 %
    spatial   what is left of the red digit ?             ten digits or three shapes; guessing among what is
                                                          in the picture gives about 20 %
    count     how many red digits are there ?             one to six, chance about 30 %
    text      what is written ?                           any string, chance 0 %
    several   in which picture is the red digit ?         as many answers as pictures, chance 25 to 33 %
    video     in which order did the digits appear ?      sequences of digits, chance below 1 %

Training asks every question of a picture at once, testing one question an item. Everything follows from the
split and the number of the item.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from readers import material, scenes
from readers.scenes import Scene, Thing

TASKS = ("find", "spatial", "count", "text", "several", "video")
ORDINALS = ("first", "second", "third", "fourth")
_ASKED = (
    "which", "digit", "is", "?", "what", "colour", "the", "left", "of", "right", "above", "below", "how",
    "many", "digits", "are", "there", "written", "in", "picture", "order", "did", "appear", "appeared",
    "last", "has", "a",
)  # fmt: skip
PLURALS = tuple(f"{shape}s" for shape in material.SHAPES)
WORDS = (*_ASKED, *material.NUMBERS, *material.COLOURS, *material.SHAPES, *PLURALS, *ORDINALS)


@dataclass(frozen=True)
class Question:
    """A question and its answer; `task` is one of `TASKS`, or "" for one that is only trained on."""

    task: str
    text: str
    answer: str


@dataclass(frozen=True)
class Item:
    """What a reader is shown and asked.

    Attributes:
        pictures: arrays `[height, width, 3]` uint8; empty for a video.
        video: `[frames, height, width, 3]` uint8, or None.
        questions: one at test time, all there are in training.
        labels: what stands in each unit of each picture, or frame; for training.
    """

    pictures: tuple[np.ndarray, ...]
    video: np.ndarray | None
    questions: tuple[Question, ...]
    labels: tuple[np.ndarray, ...] = ()


def _alone(things: list[Thing], attribute: str) -> list[Thing]:
    """Those whose name or colour no other has."""
    values = [getattr(thing, attribute) for thing in things]
    return [thing for thing in things if values.count(getattr(thing, attribute)) == 1]


def find_questions(scene: Scene) -> list[Question]:
    """Which digit has a colour that it alone has; and, for training, the other way round."""
    digits = scene.of_kind("digit")
    found = [
        Question("find", f"which digit is {thing.colour} ?", thing.name) for thing in _alone(digits, "colour")
    ]
    return found + [
        Question("", f"what colour is the {thing.name} ?", thing.colour) for thing in _alone(digits, "name")
    ]


def spatial_questions(scene: Scene) -> list[Question]:
    """What stands next to a digit in its row or column of cells: the nearest thing, writing aside."""
    questions = []
    for thing in _alone(scene.of_kind("digit"), "colour"):
        for relation, other in scenes.beside(scene.things, thing).items():
            text = f"what is {_where(relation)} the {thing.colour} digit ?"
            questions.append(Question("spatial", text, other.name))
    return questions


def count_questions(scene: Scene) -> list[Question]:
    """How many digits in all, of each colour there is, and of each shape there is; up to nine."""
    digits = scene.of_kind("digit")
    counts = {"digits": len(digits)}
    for colour in sorted({thing.colour for thing in digits}):
        counts[f"{colour} digits"] = sum(thing.colour == colour for thing in digits)
    counts |= {f"{shape}s": len(scene.of_kind(shape)) for shape in material.SHAPES}
    return [
        Question("count", f"how many {things} are there ?", material.NUMBERS[count])
        for things, count in counts.items()
        if 0 < count < len(material.NUMBERS)
    ]


def text_questions(scene: Scene) -> list[Question]:
    """What is written, if anything."""
    return [Question("text", "what is written ?", thing.name) for thing in scene.of_kind(scenes.WRITING)]


def picture_questions(scene: Scene) -> list[Question]:
    """Every question that one picture allows."""
    return [
        *find_questions(scene), *spatial_questions(scene), *count_questions(scene), *text_questions(scene)
    ]  # fmt: skip


def several_questions(pictures: list[Scene]) -> list[Question]:
    """In which picture is the digit of a colour, or a number, that only one of them has."""
    questions = []
    digits = [scene.of_kind("digit") for scene in pictures]
    for attribute in ("colour", "name"):
        for value in sorted({getattr(thing, attribute) for row in digits for thing in row}):
            where = [i for i, row in enumerate(digits) if any(getattr(t, attribute) == value for t in row)]
            if len(where) == 1:
                what = f"{value} digit" if attribute == "colour" else value
                text = f"in which picture is the {what} ?"
                questions.append(Question("several", text, ORDINALS[where[0]]))
    return questions


def video_questions(clip: scenes.Clip) -> list[Question]:
    """In which order the digits appeared; for training also what came first and last, and colours."""
    names = [thing.name for thing in clip.things]
    questions = [
        Question("video", "in which order did the digits appear ?", " ".join(names)),
        Question("", "what appeared first ?", names[0]),
        Question("", "what appeared last ?", names[-1]),
    ]
    return questions + [Question("", f"which digit is {thing.colour} ?", thing.name) for thing in clip.things]


def picture_scene(rng: np.random.Generator, split: str, side: int, *, ease: float = 0.0) -> Scene:
    """A picture for the first four tasks; `ease` 1 is the simplest, 0 as it is tested."""
    cells = scenes.CELLS[side]
    most = {2: 3, 3: 5, 4: 6, 5: 6}[cells]
    hard = rng.random() >= ease
    digits = int(rng.integers(2 if cells < 4 else 3, most + 1)) if hard else int(rng.integers(1, 3))
    shapes = int(rng.integers(0, cells)) if hard else 0
    writing = bool(rng.random() < 0.6)
    if writing and cells == 2:
        digits, shapes = min(digits, 2), 0
    return scenes.picture(rng, split, side, digits=digits, shapes=shapes, writing=writing)


def writing_questions(scene: Scene) -> list[Question]:
    """For training: what is written in each colour, where that colour's writing is one."""
    return [
        Question("", f"what is written in {thing.colour} ?", thing.name)
        for thing in _alone(scene.of_kind(scenes.WRITING), "colour")
    ]


def crowd_questions(scene: Scene) -> list[Question]:
    """For training: what stands beside things that alone have a name or colour, and how many there are."""
    named = [thing for thing in scene.things if thing.kind != scenes.WRITING]
    called = [(thing, thing.name) for thing in _alone(named, "name")]
    called += [(thing, f"{thing.colour} digit") for thing in _alone(scene.of_kind("digit"), "colour")]
    besides = [
        Question("", f"what is {_where(relation)} the {name} ?", other.name)
        for thing, name in called
        for relation, other in scenes.beside(scene.things, thing).items()
    ]
    return besides + [replace(question, task="") for question in count_questions(scene)]


def _where(relation: str) -> str:
    return relation if relation in ("above", "below") else f"{relation} of"


def tally_scene(rng: np.random.Generator, split: str, side: int) -> Scene:
    """For training: a picture whose things have few colours and forms, so that most counts are not one."""
    cells = scenes.CELLS[side]
    digits = int(rng.integers(1, min(7, cells * cells)))
    shapes = int(rng.integers(0, min(7, cells * cells - digits + 1)))
    return scenes.picture(rng, split, side, digits=digits, shapes=shapes, palette=int(rng.integers(1, 4)))


def several_scenes(rng: np.random.Generator, split: str, side: int, count: int) -> list[Scene]:
    """Pictures for the fifth task: few digits each, so that most are in one picture only."""
    return [
        scenes.picture(rng, split, side, digits=int(rng.integers(1, 3)), shapes=int(rng.integers(0, 2)))
        for _ in range(count)
    ]


def held_out_item(
    task: str, split: str, number: int, *, side: int = 192, pictures: int = 4, picture_side: int = 128,
    frames: int = 8, frame_side: int = 96,
) -> Item:  # fmt: skip
    """Item `number` of a task: always the same for the same arguments.

    Args:
        split: "validation" or "test".
        side: pixels of a picture of the first four tasks.
        pictures, picture_side: how many pictures of how many pixels for "several".
        frames, frame_side: for "video".
    """
    rng = np.random.default_rng([material.SPLITS.index(split), TASKS.index(task), number])
    while True:
        if task == "video":
            video = scenes.clip(rng, split, frame_side, frames=frames, digits=int(rng.integers(2, 4)))
            return Item((), video.pixels, tuple(q for q in video_questions(video) if q.task == task))
        if task == "several":
            shown = several_scenes(rng, split, picture_side, pictures)
            questions = several_questions(shown)
        else:
            shown = [picture_scene(rng, split, side)]
            questions = [q for q in picture_questions(shown[0]) if q.task == task]
        if questions:
            # Answers first: most colours have one digit, and "one" would answer most questions of counting.
            answers = sorted({question.answer for question in questions})
            answer = answers[rng.integers(len(answers))]
            fitting = [question for question in questions if question.answer == answer]
            chosen = fitting[rng.integers(len(fitting))]
            return Item(tuple(scene.pixels for scene in shown), None, (chosen,))
