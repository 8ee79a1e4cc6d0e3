"""Patching, removing and generating over and over: nothing piles up, not one tensor a call.

Objects are counted, since tracemalloc reports two kilobytes a call of these models unpatched: small blocks of
torch's own that it sees taken and not given back. What no count sees, the resident memory of a thousand turns
does (`-m soak`).
"""

import gc
import itertools
import os
import weakref
from collections import Counter

import psutil
import pytest
import torch

import zoo
from contract import tools
from trust import faults


def claim(name, how):
    return pytest.mark.claim("Again and again", name, "works", how)


def census() -> Counter:
    """Everything alive that the garbage collector knows, by type; every tensor is among it."""
    gc.collect()
    return Counter(type(x).__qualname__ for x in gc.get_objects())


def growth(turn, turns: int) -> Counter:
    """What `turns` turns leave behind, by type."""
    for _ in range(3):  # caches of Hugging Face's, torch's and illava's own
        turn()
    before = census()
    before.update([Counter.__qualname__, "dict"])  # itself
    for _ in range(turns):
        turn()
    return census() - before


def leaked(turn, turns: int = 12) -> dict[str, int]:
    """What grows turn by turn: an object a turn is a leak, what comes once is somebody's cache filling up."""
    left = growth(turn, turns)
    if left:
        left &= growth(turn, turns)  # the smaller of both
    return {name: n for name, n in left.items() if "Tensor" in name or n >= turns // 2}


def check_flat(turn) -> None:
    assert leaked(turn) == {}


def test_one_leaked_object_a_turn_would_be_seen():
    for make, name in (
        (lambda: torch.zeros(1), "Tensor"),
        (lambda: {"a": []}, "dict"),
        (lambda: [0], "list"),
    ):
        leak = []
        left = leaked(lambda make=make, leak=leak: leak.append(make()))
        assert left[name] >= 10  # one or two of anybody's may go meanwhile


def test_what_comes_once_is_no_leak():
    cache, turns = [], itertools.count()
    assert leaked(lambda: cache.extend([0] for _ in range(50) if next(turns) == 5)) == {}


def patch_and_remove(model, family, inputs):
    """A turn: patch, use, remove."""

    def turn():
        with tools.patch(model, family, **tools.DEEP):
            tools.forward(model, inputs)

    return turn


def generate(model, inputs):
    return lambda: tools.generate(model, inputs, tokens=2, do_sample=False)


@claim("patching, using and removing again and again", "no tensor, no object, no hook more than before")
@faults.some_families
def test_patch_and_remove(family):
    model, inputs = tools.build(family), tools.prompt_of(family, "one picture")
    tools.forward(model, inputs, output_hidden_states=True)
    before = tools.trace(model)
    check_flat(patch_and_remove(model, family, inputs))
    assert tools.trace(model) == before
    assert faults.context_is_empty()


@claim("generating again and again", "no tensor and no object more than before")
@faults.some_families
def test_generate(family):
    model, inputs = tools.build(family), tools.prompt_of(family, tools.mixed(family))
    with tools.patch(model, family, **tools.DEEP):
        check_flat(generate(model, inputs))


@claim("calls that fail, again and again", "no tensor and no object more than before")
@faults.some_families
def test_failing_calls(family):
    model, inputs = tools.build(family), tools.prompt_of(family, "one picture")

    def turn():
        for place in ("blocks", "layers"):
            module = getattr(tools, place)(model)[2]
            with (
                faults.fault(module, "after, last", faults.out_of_memory),
                pytest.raises(torch.OutOfMemoryError),
            ):
                generate(model, inputs)()

    with tools.patch(model, family, **tools.DEEP):
        check_flat(turn)


@claim("a model let go of while it was patched", "model, handle and all calls die with the last reference")
@faults.some_families
def test_a_patched_model_dies(family, monkeypatch):
    watch = faults.Watch(monkeypatch)
    model = zoo.FAMILIES[family].build()
    handle = tools.patch(model, family, **tools.DEEP)
    generate(model, tools.prompt_of(family, "one picture"))()
    with faults.fault(tools.blocks(model)[2], "inside", KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        generate(model, tools.prompt_of(family, "one picture"))()
    left = [weakref.ref(x) for x in (model, handle, handle._state, tools.layers(model)[0].mlp)]
    del model, handle
    gc.collect()
    assert [ref() for ref in left] == [None] * len(left)
    assert not watch.alive
    assert faults.context_is_empty()


@pytest.mark.soak
@claim("1,000 times patched and removed, 1,000 times generated", "the process grows by less than 8 MiB")
@pytest.mark.parametrize("what", ["patch and remove", "generate"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl", "llava_next"])
def test_a_thousand_times(family, what):
    model, inputs = tools.build(family), tools.prompt_of(family, "one picture")
    process = psutil.Process(os.getpid())
    turn = patch_and_remove(model, family, inputs) if what == "patch and remove" else generate(model, inputs)
    if what == "generate":
        tools.patch(model, family, **tools.DEEP)
    for _ in range(50):
        turn()
    before, resident = census(), process.memory_info().rss
    for _ in range(1000):
        turn()
    assert not {name: n for name, n in (census() - before).items() if n >= 500}
    grown = process.memory_info().rss - resident
    print(f"{family}, {what}: {grown / 2**20:+.2f} MiB after 1,000 turns")
    assert grown < 8 * 2**20
