"""The readers' pictures, questions and training batches: what a question asks is what the picture shows."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from accuracy_show import kept

from illava.evaluate.statistics import wilson
from readers import architectures, batches, canvas, card, material, scenes, tasks
from readers.batches import Kind

CHECKPOINTS = sorted(path.parent for path in Path(__file__).parent.parent.glob("checkpoints/*/training.csv"))
KINDS = [Kind("picture", 96, 1, 3), Kind("several", 96, 3, 2), Kind("video", 96, 8, 2)]


def test_splits_share_nothing():
    for one, other in itertools.combinations(material.SPLITS, 2):
        assert not set(material.font_names(one)) & set(material.font_names(other))
        mine = {x.tobytes() for number in material.digits(one) for x in number}
        assert not mine & {x.tobytes() for number in material.digits(other) for x in number}
        rng = np.random.default_rng(0)
        written = [{material.written(rng, split) for _ in range(200)} for split in (one, other)]
        assert not written[0] & written[1]
        photographs = [{x.tobytes() for x in material.photographs(split)} for split in (one, other)]
        assert not photographs[0] & photographs[1]


@pytest.mark.parametrize("task", tasks.TASKS)
def test_items_follow_from_their_number(task):
    first, again, other = (tasks.held_out_item(task, "test", number) for number in (3, 3, 4))
    assert first.questions == again.questions
    assert len(first.questions) == 1
    shown = [np.stack(item.pictures) if item.video is None else item.video for item in (first, again, other)]
    assert np.array_equal(shown[0], shown[1])
    assert not np.array_equal(shown[0], shown[2])


def test_questions_are_answered_by_the_picture():
    """Every answer found once more by looking at each thing in turn."""
    rng, asked = np.random.default_rng(1), set()
    for _ in range(60):
        scene = tasks.picture_scene(rng, "train", 192)
        digits = [thing for thing in scene.things if thing.kind == "digit"]
        for question in tasks.picture_questions(scene):
            words, answer = question.text.split(), question.answer
            asked.add(question.task)
            if question.task == "find":
                assert [d.name for d in digits if d.colour == words[3]] == [answer]
            elif question.task == "count" and words[2] in material.COLOURS:
                assert sum(d.colour == words[2] for d in digits) == material.NUMBERS.index(answer)
            elif question.task == "count":
                kind = words[2][:-1]
                assert sum(t.kind == kind for t in scene.things) == material.NUMBERS.index(answer)
            elif question.task == "text":
                assert [t.name for t in scene.things if t.kind == "writing"] == [answer]
            elif question.task == "spatial":
                (here,) = [d for d in digits if d.colour == words[-3]]
                there = [t for t in scene.things if t.name == answer]
                if words[2] in ("left", "right"):
                    side = -1 if words[2] == "left" else 1
                    assert any(t.row == here.row and side * (t.column - here.column) > 0 for t in there)
                else:
                    side = -1 if words[2] == "above" else 1
                    assert any(t.column == here.column and side * (t.row - here.row) > 0 for t in there)
    assert asked == {"", "find", "spatial", "count", "text"}


def test_several_and_video_questions():
    rng = np.random.default_rng(2)
    shown = tasks.several_scenes(rng, "train", 96, 4)
    for question in tasks.several_questions(shown):
        what = question.text.removeprefix("in which picture is the ").split()[0]
        has = [any(what in (t.name, t.colour) for t in scene.of_kind("digit")) for scene in shown]
        assert [i for i, x in enumerate(has) if x] == [tasks.ORDINALS.index(question.answer)]
    clip = scenes.clip(rng, "train", 96, frames=8, digits=3)
    appeared = [
        next(frame for frame in range(8) if (clip.labels[frame, ..., 0] == 1 + number).any())
        for number in (material.NUMBERS.index(name) for name in tasks.video_questions(clip)[0].answer.split())
    ]
    assert appeared == sorted(appeared)
    assert len(set(appeared)) == 3


def test_labels_say_what_was_drawn_where():
    """Units without a label look like the photograph beneath; each thing has a unit within its cell."""
    rng = np.random.default_rng(3)
    scene = scenes.picture(rng, "train", 192, digits=5, shapes=2)
    for thing in scene.things:
        named = (*material.NUMBERS, *material.SHAPES).index(thing.name) + 1
        rows, columns = np.nonzero(scene.labels[..., 0] == named)
        inside = (rows // 3 == thing.row) & (columns // 3 == thing.column)
        assert inside.any()
        colours = scene.labels[rows[inside], columns[inside], 1]
        assert (colours == 1 + list(material.COLOURS).index(thing.colour)).all()
        middles = scene.labels[..., canvas.MIDDLE][rows[inside], columns[inside]]
        assert middles.sum() == 1
    assert scene.labels[..., canvas.MIDDLE].sum() == len(scene.things)
    written = scenes.picture(np.random.default_rng(4), "train", 192, digits=0, writing=True)
    string, here = written.things[0], written.labels[..., canvas.NAME] == canvas.WRITING
    assert here.any()
    assert set(written.labels[here, canvas.COLOUR]) == {1 + list(material.COLOURS).index(string.colour)}
    spelled = written.labels[..., canvas.SPELLED].reshape(-1, canvas.LONGEST)
    assert ["".join(canvas.CHARACTERS[n - 1] for n in of if n) for of in spelled.T[: len(string.name)]] == [
        *string.name
    ]
    assert written.labels[..., canvas.MIDDLE].sum() == 0


def test_labels_say_what_stands_beside_a_digit():
    """As the questions ask it, in each direction; nobody asks it of the photograph and of writing."""
    asked = 0
    for seed in range(12):
        scene = tasks.picture_scene(np.random.default_rng(seed), "train", 192)
        ours = scene.labels[..., canvas.BESIDE]
        here = scene.labels[..., canvas.NAME]
        assert (ours[(here == 0) | (here == canvas.WRITING)] == canvas.NOT_ASKED).all()
        assert (ours[(here > 0) & (here < canvas.WRITING)] != canvas.NOT_ASKED).all()
        for question in tasks.spatial_questions(scene):
            relation, colour = question.text.split()[2], question.text.split()[-3]
            thing = next(t for t in scene.of_kind("digit") if t.colour == colour)
            cell = (slice(3 * thing.row, 3 * thing.row + 3), slice(3 * thing.column, 3 * thing.column + 3))
            own = here[cell] == 1 + material.NUMBERS.index(thing.name)
            named = ours[cell][own][:, list(scenes.RELATIONS).index(relation)]
            answer = 1 + (*material.NUMBERS, *material.SHAPES).index(question.answer)
            assert set(named) == {answer}
            asked += 1
    assert asked > 20


def test_labels_say_how_many_are_alike():
    """As the questions of counting ask it; nobody asks it of the photograph and of writing."""
    asked = set()
    for seed in range(12):
        scene = tasks.tally_scene(np.random.default_rng(seed), "train", 192)
        ours, here = scene.labels[..., canvas.ALIKE], scene.labels[..., canvas.NAME]
        colours = scene.labels[..., canvas.COLOUR]
        assert (ours[(here == 0) | (here == canvas.WRITING)] == canvas.NOT_ASKED).all()
        digit = (here > 0) & (here <= len(material.NUMBERS))
        tallies = np.unique(scene.labels[here > 0][:, canvas.TALLY], axis=0)
        assert len(tallies) == 1, "the same on every thing"
        tally = dict(zip((*material.COLOURS, *tasks.PLURALS), tallies[0], strict=True))
        for question in tasks.count_questions(scene):
            things, count = question.text.split()[2:-3], material.NUMBERS.index(question.answer)
            if things == ["digits"]:
                assert set(ours[digit, 1]) == {count}
            elif things[0] in material.COLOURS:
                alike = digit & (colours == 1 + list(material.COLOURS).index(things[0]))
                assert set(ours[alike, 0]) == {count} == {tally[things[0]]}
            else:
                shape = here == 1 + len(material.NUMBERS) + tasks.PLURALS.index(things[0])
                assert set(ours[shape, 0]) == {count} == {tally[things[0]]}
                assert set(ours[shape, 1]) == {canvas.NOT_ASKED}
            asked.add((things[-1], count))
    assert len(asked) > 12


@pytest.mark.parametrize("side", [96, 128, 192])
def test_labels_of_tiles(side):
    """Each thing has one middle in the whole picture, and one in its tiles; only the whole counts."""
    scene = tasks.tally_scene(np.random.default_rng(1), "train", side)
    *tiles, whole = batches._tiles(scene.labels)
    assert [tile.shape for tile in tiles] == [whole.shape] * (4 if side == 192 else 0)
    assert whole[..., canvas.MIDDLE].sum() == len(scene.things)
    assert set(whole[..., canvas.ALIKE].flat) >= {len(scene.of_kind("digit")), canvas.NOT_ASKED}
    if tiles:
        joined = np.concatenate([np.concatenate(tiles[i : i + 2], 1) for i in (0, 2)])  # [12, 12, LABELS]
        seen = slice(canvas.SPELLED.stop)
        assert (joined[..., seen] == scene.labels[..., seen]).all()
        assert (joined[..., canvas.ALIKE] == canvas.NOT_ASKED).all()
        assert (joined[..., canvas.TALLY] == canvas.NOT_ASKED).all()


@pytest.fixture(scope="module", params=architectures.FAMILIES)
def built(request):
    return architectures.build(request.param, tasks.WORDS)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_questions_in_one_batch_are_blind_to_each_other(built, kind):
    """Logits of every answer's first token equal those of a plain prompt with that question alone."""
    model, processor = built
    composer = batches.Composer(model, processor)
    items = batches.sample(np.random.default_rng(5), kind, "train")
    batch = composer(items)
    with torch.inference_mode():
        hidden = model.model(**batch.inputs, use_cache=False)[0]
        logits = model.lm_head(hidden[batch.rows, batch.columns])
        first = [int((batch.question == n).nonzero()[0]) for n in range(len(batch.questions))]
        asked = [(item, question) for item in items for question in item.questions]
        for place, (item, question) in list(zip(first, asked, strict=True))[::4]:
            alone = model(**composer.prompt(item, question.text)).logits[0, -1]
            assert (logits[place] - alone).abs().max() < 1e-4
    assert len(batch.labels) == int((batch.inputs["input_ids"] == _placeholder(model, kind)).sum())


def _placeholder(model, kind):
    config = model.config
    video = kind.name == "video" and config.model_type == "qwen2_5_vl"
    return config.video_token_id if video else config.image_token_id


def test_every_word_is_one_token():
    tokenizer = architectures.tokenizer("qwen2_5_vl", tasks.WORDS)
    rng = np.random.default_rng(6)
    for kind in KINDS:
        for item in batches.sample(rng, kind, "train"):
            for question in item.questions:
                text = f"{question.text} {'' if question.task == 'text' else question.answer}".split()
                assert len(tokenizer(" ".join(text)).input_ids) == len(text)


def test_intervals():
    low, high = wilson(90, 100)  # the textbook's: 0.826 to 0.945
    assert (round(low, 3), round(high, 3)) == (0.826, 0.945)
    rows = [{"items": "8", "bits": bits, "note": ""} for bits in ("f0", "0f", "ff")]
    assert kept(rows[:1], rows[2:]) == (0.5, 0.125, 0.875)
    assert kept(rows[:2], rows[2:] * 2)[0] == 0.5
    assert kept(rows[:1], rows[1:]) is None  # a task is missing


def test_the_card_says_once_for_each_task_where_it_is_weak():
    right = {"text 96": 0.0, "count 192": 0.61, "text 128": 0.004, "count 96": 0.98, "find 96": 0.8}
    assert card.weak_tasks(right) == ["- count: 192 px (61.0%)", "- text: 96 px (0.0%), 128 px (0.4%)"]


def test_a_card_says_what_a_reader_began_from():
    assert card._began("random weights", "qwen2_5_vl") == "random weights"
    assert card._began("made/qwen2_5_vl, weights 0a", "qwen2_5_vl") == "an earlier reader's\nweights (`0a`),"
    both = "made/qwen2_5_vl, weights 0a; made/internvl, weights 1b"
    language = ", its language\nmodel from that of `made/internvl` (weights `1b`),"
    assert card._began(both, "qwen2_5_vl") == f"an earlier reader's\nweights (`0a`){language}"
    assert card._began("made/internvl, weights 1b", "qwen2_5_vl") == f"random weights{language}"


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda path: path.name)
def test_the_card_is_the_one_made_of_what_was_noted(folder, tmp_path):
    made = tmp_path / folder.name
    made.mkdir()
    for name in ("config.json", "training.json", "training.csv"):
        (made / name).write_bytes((folder / name).read_bytes())
    card.write(made)
    assert (made / "README.md").read_text() == (folder / "README.md").read_text(), "run card.py"
