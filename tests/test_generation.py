"""Lengths of answers, and inputs of `generate`."""

from types import SimpleNamespace

import pytest
import torch

import illava
from illava import evaluate
from illava.evaluate.prompts import build_inputs
from illava.generation import answer_lengths
from illava.jobs import Item

ANSWERS = torch.tensor([[5, 2, 0, 0], [5, 6, 7, 8], [2, 2, 2, 2], [5, 6, 3, 2]])


@pytest.mark.parametrize(
    ("own", "asked", "lengths"),
    [
        (2, None, [2, 4, 1, 4]),
        ([2, 3], None, [2, 4, 1, 3]),
        (None, None, [4, 4, 4, 4]),
        (2, 6, [4, 2, 4, 2]),
        (2, [7, 3], [4, 3, 4, 3]),
    ],
)
def test_an_answer_is_as_long_as_its_end_says(own, asked, lengths):
    """Also where padding is an end, or stands behind an end that `generate` was told."""
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=own))
    assert answer_lengths(model, ANSWERS, asked) == lengths


def loaded(processor):
    processor.apply_chat_template = lambda *_, **__: "text"
    model = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    return evaluate.Loaded(model, processor, "a model")


class Refusing:
    video_processor, bos_token = None, None

    def __init__(self, error):
        self.error = error

    def __call__(self, **_):
        raise self.error


def test_the_items_to_leave_out_are_named():
    clip = (None, None)
    films = [Item(name, (), (), "?", name, clips=(clip,)) for name in ("a.mp4", "b.mp4")]
    picture = Item("c.png", (), (), "?", "c.png", pictures=("c",))
    model = loaded(Refusing(ValueError("a page\nof reasons.")))
    with pytest.raises(illava.DataError, match="takes pictures only; leave a.mp4 out$"):
        build_inputs(model, [picture, films[0]])
    with pytest.raises(illava.DataError, match="leave a.mp4 and 1 more out$"):
        build_inputs(model, films)
    with pytest.raises(illava.DataError, match="processor refuses c.png: a page$"):
        build_inputs(model, [picture])
    with pytest.raises(illava.DataError, match="refuses one of c.png, c.png: a page$"):
        build_inputs(model, [picture, picture])


def test_a_processor_that_runs_out_of_memory_is_not_a_refusal():
    item = Item("c.png", (), (), "?", "c.png", pictures=("c",))
    with pytest.raises(RuntimeError, match="out of memory"):
        build_inputs(loaded(Refusing(RuntimeError("CUDA error: out of memory"))), [item])
