"""Exceptions thrown into a model's modules, and what may not be left of a call that ended in one."""

from __future__ import annotations

import os
import sys
import weakref
from contextlib import contextmanager

import pytest
import torch

import illava
import illava.hooks.encoder
import illava.hooks.language
from contract import tools
from illava.hooks.state import _SLOTS, Slot

CODE = os.path.dirname(illava.__file__) + os.sep
# Where in a module's call: hooks of somebody else's, ahead of illava's and behind them, and `forward` itself.
WHERE = ("before, first", "before, last", "inside", "after, first", "after, last")

# With `-m slow` one of each other code path; what shares its code with one of these runs with `-m soak`.
SLOW = ("qwen3_vl", "llava_next", "minicpmv4_6")


def families(*fast: str):
    """Parametrise over every family, by default over these."""
    slow = {"qwen2_5_vl", "internvl", *SLOW}.difference(fast)
    marks = {name: pytest.mark.slow for name in slow} | {name: () for name in fast}
    params = [pytest.param(f, marks=marks.get(f, pytest.mark.soak)) for f in tools.zoo.FAMILIES]
    return pytest.mark.parametrize("family", params)


some_families = families("qwen2_5_vl", "internvl")


class FailureError(Exception):
    """Of the tests' own."""


def out_of_memory() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


ERRORS = {
    "an exception": lambda: FailureError("the test's own"),
    "out of memory": out_of_memory,
    "Ctrl-C": KeyboardInterrupt,
}


@contextmanager
def fault(module, where: str, error):
    """`error()` is raised whenever `module` is called."""

    def fail(*_, **__):
        raise error()

    first = where.endswith("first")
    if where == "inside":
        own = module.__dict__.get("forward")
        module.__dict__["forward"] = fail
        try:
            yield
        finally:
            module.__dict__.pop("forward", None)
            if own is not None:
                module.__dict__["forward"] = own
        return
    register = (
        module.register_forward_pre_hook if where.startswith("before") else module.register_forward_hook
    )
    hook = register(fail, prepend=first)
    try:
        yield
    finally:
        hook.remove()


class Interruption:
    """Ctrl-C at one line of illava's own code in this thread.

    Args:
        at: the how manieth line to run; `None` only counts them.
    """

    def __init__(self, at: int | None = None) -> None:
        self.at, self.lines = at, 0

    def __enter__(self):
        self._before = sys.gettrace()
        sys.settrace(self._follow)
        return self

    def __exit__(self, *exc):
        sys.settrace(self._before)

    def _follow(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(CODE):
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                raise KeyboardInterrupt
        return self._follow


class Watch:
    """Knows every call that is alive: what a fault leaves behind of one is a leak."""

    def __init__(self, monkeypatch) -> None:
        self.alive: weakref.WeakSet = weakref.WeakSet()
        for module, name in ((illava.hooks.encoder, "VisionCall"), (illava.hooks.language, "LanguageCall")):
            monkeypatch.setattr(module, name, self._noting(getattr(module, name)))

    def _noting(self, kind):
        def make(*args, **kwargs):
            self.alive.add(call := kind(*args, **kwargs))
            return call

        return make

    def features(self) -> list[str]:
        """Which calls hold features, or anything else but whole numbers, that nobody will ask for."""
        found = []
        for call in self.alive:
            tensors = list(tensors_in(vars(call), set()))
            if any(x.is_floating_point() for x in tensors) or type(call).__name__ == "LanguageCall":
                found.append(f"{type(call).__name__} with {len(tensors)} tensors")
        return found


def tensors_in(value, seen: set):
    """Every tensor reachable through containers and illava's own objects."""
    if id(value) in seen or isinstance(value, torch.nn.Module):
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for x in value.values():
            yield from tensors_in(x, seen)
    elif isinstance(value, (list, tuple)):
        for x in value:
            yield from tensors_in(x, seen)
    elif type(value).__module__.startswith("illava.") and type(value).__name__ != "Seams":
        yield from tensors_in(vars(value), seen)


def under_way(handle, waiting=("left", "encoded")) -> list[str]:
    """What illava keeps in this context for calls under way.

    Args:
        waiting: what was encoded waits there for the language model, so a call that fails in between leaves
            the places of what survived until the next call, and sizes until the next report.
            `Watch.features` sees that it is no more.
    """
    slots = {name: slot.get() for name, slot in vars(handle._state).items() if isinstance(slot, Slot)}
    return [name for name, value in slots.items() if value and name not in waiting]


def context_is_empty() -> bool:
    """Whether nothing of any patched model is left in this context."""
    return not _SLOTS.get()


def answer(model, inputs, tokens: int = 2):
    """Ids, logits and cache lengths of a short greedy answer."""
    ids, logits, cache = tools.greedy(model, inputs, tokens=tokens)
    return ids, logits, tools.held(cache)


def same(one, other) -> bool:
    return torch.equal(one[0], other[0]) and torch.equal(one[1], other[1]) and one[2] == other[2]
