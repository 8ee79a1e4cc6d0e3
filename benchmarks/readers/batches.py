"""Training batches: many questions about one picture in one sequence, each blind to the others.

Every question sees the prompt's beginning (its picture) and itself, and its positions continue from there, so
the model is trained on exactly the prompts it is tested on, while the picture is read once.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from readers import canvas, material, scenes, tasks
from readers.architectures import TILE, UNIT
from readers.tasks import Item, Question


@dataclass(frozen=True)
class Kind:
    """What a batch is made of.

    Attributes:
        name: "picture", "several", "video" or, for training, "signs", "crowd" or "tally".
        side: pixels of a side.
        count: pictures, or frames of the video.
        items: items in a batch.
    """

    name: str
    side: int
    count: int
    items: int


@dataclass(frozen=True)
class Batch:
    """Inputs of `model.model` and what to learn from them.

    Attributes:
        inputs: keyword arguments; `attention_mask` is `[B, 1, L, L]`, True where a token is seen.
        rows, columns: where the tokens stand whose successors are to be predicted, `[n]` each.
        targets: those successors, `[n]`.
        question: for each of them the number of its question, `[n]`.
        questions: the questions, in order.
        labels: `[visual tokens, LABELS]` what stands where each of them looks.
    """

    inputs: dict
    rows: Tensor
    columns: Tensor
    targets: Tensor
    question: Tensor
    questions: tuple[Question, ...]
    labels: Tensor


class Composer:
    """Turns items into batches for one family's model."""

    def __init__(self, model, processor) -> None:
        self._core, self._processor = model.model, processor
        self.tokenizer = processor.tokenizer
        self._family = model.config.model_type
        self._text = functools.cache(lambda text: self.tokenizer(text, add_special_tokens=False).input_ids)
        self._prefixes: dict = {}

    def __call__(self, items: list[Item]) -> Batch:
        """A batch of items that are all alike: as many pictures or frames, of one size."""
        begin, end, positions = self._prefix(items[0])
        rows = [[self._one(question, end) for question in item.questions] for item in items]
        length = len(begin) + max(sum(len(ids) for ids, _ in row) for row in rows)
        shape = (len(items), length)
        ids = torch.full(shape, self.tokenizer.pad_token_id)
        place = positions[:, :, -1:].expand(-1, len(items), length).clone()  # [3 or 1, B, L]
        seen = torch.zeros(*shape, length, dtype=torch.bool)
        seen.diagonal(dim1=1, dim2=2).fill_(True)  # padding sees itself: no row of a softmax is empty
        head = len(begin)
        ids[:, :head] = torch.tensor(begin)
        place[:, :, :head] = positions
        seen[:, :head, :head] = torch.ones(head, head, dtype=torch.bool).tril()
        after = int(positions[..., -1].max()) + 1  # as the processor's prompt goes on
        found: tuple[list, list, list, list] = ([], [], [], [])
        for row, answers in enumerate(rows):
            start = head
            for tokens, asked in answers:
                stop = start + len(tokens)
                ids[row, start:stop] = torch.tensor(tokens)
                place[:, row, start:stop] = after + torch.arange(len(tokens))
                seen[row, start:stop, :head] = True
                seen[row, start:stop, start:stop] = torch.ones(len(tokens), len(tokens)).tril().bool()
                number = found[3][-1] + 1 if found[3] else 0
                for i in range(asked, len(tokens)):
                    for values, value in zip(found, (row, start + i - 1, tokens[i], number), strict=True):
                        values.append(value)
                start = stop
        inputs = {
            "input_ids": ids,
            "attention_mask": seen[:, None],  # [B, 1, L, L]
            "position_ids": place if self._family == "qwen2_5_vl" else place[0],
            **self._pixels(items),
        }
        questions = tuple(question for item in items for question in item.questions)
        labels = torch.tensor(np.concatenate([self._labels(item) for item in items]))
        return Batch(inputs, *(torch.tensor(values) for values in found), questions, labels)

    def _labels(self, item: Item) -> np.ndarray:
        """`[visual tokens, LABELS]` in the order in which the encoder puts them out."""
        maps = item.labels[:: 2 if item.video is not None and self._family == "qwen2_5_vl" else 1]
        if self._family == "internvl":
            maps = [tile for whole in maps for tile in _tiles(whole)]
        return np.concatenate([x.reshape(-1, x.shape[-1]) for x in maps])

    def _one(self, question: Question, end: list[int]) -> tuple[list[int], int]:
        """The tokens from the question on, and where among them the answer begins."""
        asked = [*self._text(question.text), *end]
        return [*asked, *self._text(question.answer), self.tokenizer.eos_token_id], len(asked)

    def _prefix(self, item: Item) -> tuple[list[int], list[int], Tensor]:
        """Tokens before and after a question, and the positions `[3 or 1, 1, n]` of those before."""
        key = (len(item.pictures), *((item.video,) if item.video is not None else item.pictures)[0].shape)
        if key not in self._prefixes:
            whole = self.prompt(item, "?")
            ids = whole["input_ids"][0].tolist()
            mark = len(ids) - 1 - ids[::-1].index(self._text("?")[0])
            begin, end = ids[:mark], ids[mark + 1 :]
            positions = torch.arange(mark)[None, None]  # [1, 1, n]
            if self._family == "qwen2_5_vl":
                whole = {n: x for n, x in whole.items() if n not in ("pixel_values", "pixel_values_videos")}
                positions = self._core.get_rope_index(**whole)[0][:, :, :mark]  # [3, 1, n]
            self._prefixes[key] = begin, end, positions
        return self._prefixes[key]

    def prompt(self, item: Item, text: str):
        """What the processor makes of an item and a question: inputs of `generate`, a batch of one row."""
        return self.prompts([item], [text])

    def prompts(self, items: list[Item], texts: list[str]):
        """Inputs of `generate` for a batch of items, padded on the left."""
        written, pictures, videos = [], [], []
        for item, text in zip(items, texts, strict=True):
            content = [{"type": "image"} for _ in item.pictures]
            if item.video is not None:
                content = [{"type": "video"}]
                videos.append(item.video)
            pictures += list(item.pictures)
            content.append({"type": "text", "text": text})
            message = [{"role": "user", "content": content}]
            written.append(self._processor.apply_chat_template(message, add_generation_prompt=True))
        return self._processor(
            text=written, images=pictures or None, videos=videos or None, padding=True, return_tensors="pt"
        )

    def _pixels(self, items: list[Item]) -> dict:
        if items[0].video is not None:
            made = self._processor.video_processor(videos=[item.video for item in items], return_tensors="pt")
            if self._family == "internvl":  # frames are tiles
                return {"pixel_values": made["pixel_values_videos"].flatten(0, 1)}
            return {name: made[name] for name in ("pixel_values_videos", "video_grid_thw")}
        pictures = [picture for item in items for picture in item.pictures]
        made = self._processor.image_processor(images=pictures, return_tensors="pt")
        return {name: made[name] for name in ("pixel_values", "image_grid_thw") if name in made}


def _tiles(whole: np.ndarray) -> list[np.ndarray]:
    """The labels `[6, 6, LABELS]` of the tiles that InternVL's processor cuts a square picture into."""
    side = TILE // UNIT
    thumbnail = _resized(whole, side)
    if len(whole) * UNIT < 136:  # one tile, see architectures
        return [thumbnail]
    large = _resized(whole, 2 * side)  # [12, 12, LABELS]
    # A tile does not see what stands in the others.
    large[..., canvas.ALIKE] = large[..., canvas.TALLY] = canvas.NOT_ASKED
    return [large[i : i + side, j : j + side] for i in (0, side) for j in (0, side)] + [thumbnail]


def _resized(whole: np.ndarray, side: int) -> np.ndarray:
    """The nearest labels for `[side, side]` units of another size; a thing keeps one middle."""
    near = (np.arange(side) * len(whole) + len(whole) // 2) // side
    resized = whole[near][:, near]
    middles = np.argwhere(whole[..., canvas.MIDDLE])
    rows, columns = (2 * middles + 1).T * side // (2 * len(whole))
    resized[..., canvas.MIDDLE] = 0
    resized[rows, columns, canvas.MIDDLE] = 1
    return resized


def charts(rng: np.random.Generator, kind: Kind, split: str, *, calm: float) -> list[Item]:
    """Crowded pictures with nothing asked, every second a page of writing, for an encoder to learn to see.

    Args:
        calm: as in `scenes.chart`.
    """
    kinds = (scenes.chart, scenes.page)
    drawn = [kinds[i % 2](rng, split, kind.side, calm=calm) for i in range(kind.items)]
    nothing = (Question("", "?", "?"),)
    return [Item((scene.pixels,), None, nothing, (scene.labels,)) for scene in drawn]


def sample(
    rng: np.random.Generator, kind: Kind, split: str, *, ease: float = 0.0, most: int = 16
) -> list[Item]:
    """Items of one kind with up to `most` questions each, drawn from a split.

    Args:
        ease: 0 as tested, 1 with few things in a picture.
    """
    items = []
    while len(items) < kind.items:
        if kind.name == "video":
            digits = int(rng.integers(2, 4))
            clip = tasks.scenes.clip(rng, split, kind.side, frames=kind.count, digits=digits)
            item = Item((), clip.pixels, tuple(tasks.video_questions(clip)), tuple(clip.labels))
        elif kind.name == "several":
            shown = tasks.several_scenes(rng, split, kind.side, kind.count)
            pixels, labels = zip(*((scene.pixels, scene.labels) for scene in shown), strict=True)
            item = Item(pixels, None, tuple(tasks.several_questions(shown)), labels)
        else:
            scene, questions = _drawn(rng, kind, split, ease)
            item = Item((scene.pixels,), None, tuple(questions), (scene.labels,))
        if chosen := _choose(rng, item.questions, most):
            items.append(replace(item, questions=chosen))
    return items


def _drawn(
    rng: np.random.Generator, kind: Kind, split: str, ease: float
) -> tuple[scenes.Scene, list[Question]]:
    """One picture of a kind, and all that is asked about it."""
    if kind.name == "signs":
        scene = scenes.signs(rng, split, kind.side, ease=ease)
        return scene, tasks.writing_questions(scene)
    if kind.name == "crowd":
        scene = scenes.chart(rng, split, kind.side, calm=ease)
        return scene, tasks.crowd_questions(scene)
    if kind.name == "tally":
        scene = tasks.tally_scene(rng, split, kind.side)
        return scene, tasks.count_questions(scene)
    scene = tasks.picture_scene(rng, split, kind.side, ease=ease)
    return scene, tasks.picture_questions(scene)


def _choose(rng, questions, most: int) -> tuple[Question, ...]:
    """At most `most` questions, reading first, since strings teach the most; few that only count to one."""
    one = material.NUMBERS[1]
    kept = [q for q in questions if not (_counts(q) and q.answer == one) or rng.random() < 0.3]
    order = sorted(rng.permutation(len(kept)), key=lambda i: kept[i].task != "text")
    return tuple(kept[i] for i in order[:most])


def _counts(question: Question) -> bool:
    return question.text.startswith("how many")


def simple(batch: Batch, device) -> SimpleNamespace:
    """The batch's tensors on a device."""
    inputs = {name: x.to(device, non_blocking=True) for name, x in batch.inputs.items()}
    rest = {
        name: getattr(batch, name).to(device) for name in ("rows", "columns", "targets", "question", "labels")
    }
    return SimpleNamespace(inputs=inputs, **rest)
