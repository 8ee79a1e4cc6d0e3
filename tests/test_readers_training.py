"""How the readers are trained: the attention, the order of lessons, and processes that share the work."""

import copy
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch.multiprocessing import spawn
from torch.nn.functional import scaled_dot_product_attention

from readers import (
    architectures,
    attention,
    batches,
    canvas,
    initial,
    lessons,
    material,
    scenes,
    sight,
    tasks,
    train,
)


@pytest.mark.parametrize("groups", [6, 2])
def test_attention_is_torchs_own(groups):
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, n, 9, 8, generator=draw) for n in (6, groups, groups))
    seen = torch.rand(2, 1, 9, 9, generator=draw) < 0.6
    seen.diagonal(dim1=2, dim2=3).fill_(True)
    expected = scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True)
    found, _ = attention.attend(None, query, key, value, attention.additive(seen))
    torch.testing.assert_close(found, expected.transpose(1, 2))
    plain, _ = attention.attend(None, query, key, value, scaling=0.1)
    expected = scaled_dot_product_attention(query, key, value, scale=0.1, enable_gqa=True)
    torch.testing.assert_close(plain, expected.transpose(1, 2))
    with pytest.raises(ValueError, match="additive"):
        attention.attend(None, query, key, value, seen)


@pytest.mark.parametrize("family", architectures.FAMILIES)
def test_a_loss_is_the_same_with_it(family):
    model, processor = architectures.build(family, tasks.WORDS)
    composer = batches.Composer(model, processor)
    batch = composer(batches.sample(np.random.default_rng(0), batches.Kind("picture", 96, 1, 2), "train"))
    other = copy.deepcopy(model)
    attention.use(other)
    losses = [train.answers(each, batch, torch.device("cpu"))[0] for each in (model, other)]
    assert other.model.language_model.config._attn_implementation == attention.NAME
    torch.testing.assert_close(*losses, atol=0.02, rtol=0.02)  # bfloat16


def test_patches_that_lie_side_by_side_begin_alike():
    waves = initial._waves(144, 128)[0, 1:]  # [12 · 12, 128]
    alike = torch.nn.functional.normalize(waves) @ waves.T  # [144, 144]
    place = torch.arange(144)
    apart = (place[:, None] // 12 - place // 12).abs() + (place[:, None] % 12 - place % 12).abs()
    means = torch.stack([alike[apart == steps].mean() for steps in range(5)])
    assert (means.diff() < 0).all()
    assert len({tuple(row.tolist()) for row in waves}) == 144


def test_a_page_is_labelled_as_it_is_written():
    """Each character where its middle is, by its place in its string."""
    found = 0
    for seed in range(8):
        page = scenes.page(np.random.default_rng(seed), "train", 96, calm=1.0)
        assert page.pixels.shape == (96, 96, 3)
        assert set(np.unique(page.labels[..., canvas.NAME])) <= {0, canvas.WRITING}
        assert (page.labels[..., canvas.COLOUR] > 0).any()
        found += (page.labels[..., canvas.SPELLED] > 0).sum()
    assert found > 8 * 12  # several strings each
    alone = canvas.Canvas(np.zeros((32, 32, 3), np.float32))
    for place, (x, character) in enumerate(((1, "a"), (7, "b"), (16, "c"), (31.9, "d"))):
        alone.note_character(x, 8, place, character)
    spelled = alone.labels[0, :, canvas.SPELLED]
    assert [[canvas.CHARACTERS[n - 1] if n else "" for n in unit] for unit in spelled] == [
        ["a", "b", "", ""], ["", "", "c", "d"],
    ]  # fmt: skip
    alone.note_character(2, 8, 0, "z")  # another string's first character in the same unit
    assert alone.labels[0, 0, canvas.SPELLED][0] == 1 + canvas.CHARACTERS.index("a")


class Blank(nn.Module):
    """A model whose encoder puts out what it is told to."""

    def __init__(self, width):
        super().__init__()
        self.config = SimpleNamespace(text_config=SimpleNamespace(hidden_size=width))
        self.model = nn.Module()
        self.model.visual = nn.Identity()


@torch.no_grad()
def test_sight_weighs_groups_and_what_is_there_alike():
    torch.manual_seed(0)
    model, count = Blank(24), 50
    eye = sight.Sight(model)
    labels = torch.tensor(canvas.nothing(5)).flatten(0, 1).repeat(2, 1)  # [50, LABELS]
    labels[0] = torch.tensor([3, 2, 1, 0, 13, 0, 1, 4, 0, 36, 0, 3, 9, *range(10)])
    labels[1] = torch.tensor([14, 7, -1, -1, -1, -1, 0, 0, 5, 0, 0, -1, -1, *[-1] * 10])
    seen = torch.randn(count, 24)
    model.model.visual(seen)
    loss, right = eye(labels)
    scores, terms, start, hits, there = eye.head(seen), [], 0, 0, 0
    for columns, values in (
        (range(1), 15),
        (range(1, 2), 8),
        (range(2, 6), 14),
        (range(6, 7), 2),
        (range(7, 11), 37),
        (range(11, 13), 10),
        (range(13, 23), 10),
    ):
        each = {True: [], False: []}
        for column in columns:
            logits = scores[:, start : start + values]
            start += values
            for n in range(count):
                if (target := int(labels[n, column])) >= 0:
                    each[target > 0].append(-logits[n].log_softmax(0)[target])
                    hits += int(target > 0 and logits[n].argmax() == target)
                    there += target > 0
        terms.append(sum(float(torch.stack(values).mean()) for values in each.values() if values))
    assert start == scores.shape[1]
    assert float(loss) == pytest.approx(sum(terms) / 7, rel=1e-5)
    assert float(right) == pytest.approx(hits / there)


@pytest.mark.parametrize(("side", "most"), [(96, 2), (128, 3), (192, 8)])
def test_signs_ask_for_each_colour_that_is_written_in_once(side, most):
    for seed in range(6):
        scene = scenes.signs(np.random.default_rng(seed), "train", side)
        assert 2 <= len(scene.things) <= most
        cells = [{(t.row, t.column), (t.row, t.column + 1)} for t in scene.things]
        assert len(set.union(*cells)) == 2 * len(cells)  # no two overlap
        questions = tasks.writing_questions(scene)
        assert len(questions) >= min(len(scene.things), 6)
        for question in questions:
            colour = question.text.split()[-2]
            assert [t.name for t in scene.things if t.colour == colour] == [question.answer]
            assert question.task == ""


def test_short_strings_are_not_those_of_other_splits():
    rng = np.random.default_rng(0)
    drawn = {material.short(rng, "train") for _ in range(2000)}
    assert {len(text) for text in drawn} == {1, 2}
    assert {text for text in drawn if len(text) == 1} == set(canvas.CHARACTERS)
    assert all(material.belongs(text, "train") for text in drawn if len(text) == 2)
    assert {len(material.written(rng, "test")) for _ in range(200)} == {2, 3, 4}


def test_crowds_ask_what_stands_in_the_cell_beside():
    """Each answer is the one thing in that cell, whatever in the picture it is asked of."""
    for seed in range(8):
        scene = scenes.chart(np.random.default_rng(seed), "train", 96, calm=0)
        questions = tasks.crowd_questions(scene)
        assert all(question.task == "" for question in questions)  # the test asks of colours alone
        questions = [question for question in questions if not question.text.startswith("how many")]
        shown = {(thing.row, thing.column): thing for thing in scene.things}
        for question in questions:
            words = question.text.split()
            relation = next(word for word in words if word in scenes.RELATIONS)
            called = " ".join(words[words.index("the") + 1 : -1])
            (thing,) = [t for t in scene.things if called in (t.name, f"{t.colour} {t.kind}")]
            down, across = scenes.RELATIONS[relation]
            row = [shown.get((thing.row + n * down, thing.column + n * across)) for n in (1, 2)]
            ahead = [other.name for other in row if other and other.kind != scenes.WRITING]
            assert question.answer == ahead[0]


def test_crowds_ask_how_many_there_are_up_to_nine():
    most, colours = 0, set()
    for seed in range(16):
        scene = scenes.chart(np.random.default_rng(seed), "train", 192, calm=0)
        asked = {q.text: q.answer for q in tasks.crowd_questions(scene) if q.text.startswith("how many")}
        seen = Counter(f"{t.colour} digits" for t in scene.of_kind("digit"))
        seen += Counter(f"{t.kind}s" for t in scene.things if t.kind != scenes.WRITING)
        expected = {f"how many {things} are there ?": n for things, n in seen.items() if n < 10}
        assert asked == {text: material.NUMBERS[n] for text, n in expected.items()}
        most = max(most, *seen.values())
        colours.add(len({t.colour for t in scene.things}))
    assert most > 9  # more than has a name, so that this is tested
    assert {1, 2, 3} < colours


def test_tallies_have_much_to_count():
    """And every answer is the number of such things in the picture, at most of three colours of digits."""
    answers = Counter()
    for seed in range(30):
        scene = tasks.tally_scene(np.random.default_rng(seed), "train", 192)
        assert 1 <= len({thing.colour for thing in scene.of_kind("digit")}) <= 3
        for question in tasks.count_questions(scene):
            *colour, kinds = question.text.split()[2:-3]
            fitting = [t for t in scene.things if f"{t.kind}s" == kinds and colour in ([], [t.colour])]
            assert question.answer == material.NUMBERS[len(fitting)]
            answers[question.answer] += 1
    assert answers["one"] < 0.5 * answers.total()
    assert set(material.NUMBERS[1:7]) == set(answers)


def test_signs_begin_short_and_are_not_tested():
    lengths = [
        np.mean([len(t.name) for seed in range(12)
                 for t in scenes.signs(np.random.default_rng(seed), "train", 192, ease=ease).things])
        for ease in (1.0, 0.0)
    ]  # fmt: skip
    assert lengths[0] <= 2 < lengths[1]
    assert all(row[0] == 0 for kind, row in lessons.KINDS.items() if kind.name == "signs")
    item = tasks.held_out_item("text", "test", 0)
    assert item.questions[0].text == "what is written ?"


def test_writing_wider_than_its_cells_stays_in_the_picture():
    """It begins in the last of two small cells, and needs both."""
    wide = scenes.Thing(scenes.WRITING, "wwmm", "white", 0, 1)
    for seed in range(20):
        drawn = canvas.Canvas(np.zeros((64, 64, 3), np.float32))
        ink, _ = canvas.lettering(np.random.default_rng(seed), "train", wide.name)
        if 32 < ink.width <= 64:
            scenes._write(drawn, np.random.default_rng(seed), "train", wide, 32)
            assert (drawn.labels[..., canvas.SPELLED] > 0).sum() == len(wide.name)
            break
    else:
        pytest.fail("no font is so wide")


class Nothing:
    """Takes items as they are in the place of a composer."""

    def __call__(self, items):
        return items


def test_lessons_follow_from_seed_step_and_process():
    course = lessons.Lessons(Nothing(), 100, 0.2, seed=3)
    assert all(course.looking(step) for step in range(35))
    assert [course.looking(step) for step in (35, 36, 37, 40)] == [0, 1, 0, 1]
    for step in (5, 41):
        first, again = course[step], lessons.Lessons(Nothing(), 100, 0.2, seed=3)[step]
        other = lessons.Lessons(Nothing(), 100, 0.2, seed=3, process=1)[step]
        shapes = [[picture.shape for item in items for picture in item.pictures] for items in (first, other)]
        assert shapes[0] == shapes[1]  # processes draw batches of one kind
        assert all(np.array_equal(a.pictures[0], b.pictures[0]) for a, b in zip(first, again, strict=True))
        assert not np.array_equal(first[0].pictures[0], other[0].pictures[0])
    assert {question.text for item in course[5] for question in item.questions} == {"?"}
    assert all(len(question.text) > 1 for item in course[41] for question in item.questions)


def test_difficulty_rises():
    for looking, reading in ((0.35, 0.1), (0.1, 0), (0, 0.2)):
        course, first = lessons.Course(looking, reading), looking + reading
        eases = [course.settings(first + share * (1 - first))[1] for share in (0, 0.15, 0.3, 0.9)]
        assert eases == pytest.approx([1, 0.5, 0, 0])
    for done in (0, 0.2, 0.4, 0.6, 0.9):
        assert lessons.Course().settings(done)[0].sum() == pytest.approx(1)


def chances(course, done):
    """What is drawn, by the name of its kind."""
    found = {}
    for kind, chance in zip(lessons.KINDS, course.settings(done)[0], strict=True):
        found[kind.name] = found.get(kind.name, 0) + chance
    return found


def test_reading_comes_between_looking_and_the_other_questions():
    course = lessons.Course(looking=0.3, reading=0.2)
    assert chances(course, 0.29)["signs"] == 0
    for done, ease in ((0.3, 1), (0.33, 0.5), (0.36, 0), (0.49, 0)):
        assert chances(course, done)["signs"] == pytest.approx(0.85)
        assert course.settings(done)[1] == pytest.approx(ease, abs=1e-6)
    assert chances(course, 0.51)["signs"] < 0.4


def test_a_course_may_begin_late():
    late = lessons.Course(looking=0, reading=0, begin=0.6)
    whole = lessons.Course(looking=0, reading=0)
    for done in (0, 0.5, 0.99):
        assert late.settings(done)[1] == 0
        assert chances(late, done) == chances(whole, 0.6 + 0.4 * done)


def _work(process, meeting, results):
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=process, world_size=2)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[1].bias.requires_grad_(False)  # has no gradient, as a decoder has none while an encoder looks
    for number, weight in enumerate(p for p in model.parameters() if p.requires_grad):
        weight.grad = torch.full_like(weight, 10.0 * number + process)
    train.average_gradients(list(model.parameters()))
    results.put((process, [None if p.grad is None else p.grad.unique().tolist() for p in model.parameters()]))
    results.join()
    distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_step_along_the_mean_of_their_gradients(tmp_path):
    results = torch.multiprocessing.get_context("spawn").JoinableQueue()
    running = spawn(_work, (tmp_path / "meeting", results), nprocs=2, join=False)
    found = dict(results.get(timeout=120) for _ in range(2))
    for _ in range(2):
        results.task_done()
    while not running.join():  # is True once all have ended; raises what one of them raised
        pass
    assert found[0] == found[1] == [[0.5], [10.5], [20.5], None]


def test_one_process_alone_keeps_its_gradients():
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([1.0, 2.0])
    train.average_gradients([weight])
    assert weight.grad.tolist() == [1.0, 2.0]
