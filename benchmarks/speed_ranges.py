"""Marks in time, and ranges around illava's own code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from typing import Any
from unittest import mock

import torch

from illava.evaluate.timing import Clock


class Ranges:
    """Time inside illava's hooks and statistics, less the model's own code that runs in between.

    While `installed`, patching takes illava's hooks with a range around each, which profilers see too,
    as `illava`. What a merging layer's own attention takes is the model's time; what a family's packing
    takes is counted as illava's, since it runs again over dead rows.
    """

    _current: Ranges | None = None

    def __init__(self, clock: Clock) -> None:
        self.listening, self._clock, self._depth = False, clock, 0
        self._own: list[tuple[Any, Any]] = []
        self._models: list[tuple[Any, Any]] = []
        Ranges._current = self

    def ms(self) -> float:
        """In illava's own code, all ranges together."""
        spent = [sum(self._clock.ms(*pair) for pair in pairs) for pairs in (self._own, self._models)]
        return spent[0] - spent[1]

    @classmethod
    def around(cls, function: Callable[..., Any], own: bool = True) -> Callable[..., Any]:
        """The function with a range around it: illava's own, or the model's inside illava's."""

        @wraps(function)
        def ranged(*args: Any, **kwargs: Any) -> Any:
            ranges = cls._current
            if ranges is None or not ranges.listening or (own and ranges._depth):
                return function(*args, **kwargs)
            if not own and not ranges._depth:
                return function(*args, **kwargs)
            ranges._depth += own
            start = ranges._clock.mark()
            try:
                with torch.profiler.record_function("illava" if own else "model"):
                    return function(*args, **kwargs)
            finally:
                ranges._depth -= own
                (ranges._own if own else ranges._models).append((start, ranges._clock.mark()))

        return ranged

    @classmethod
    @contextmanager
    def installed(cls) -> Iterator[None]:
        """Models patched inside have ranges around illava's code."""
        from illava import patching, vision

        attention = import_module("illava.hooks.attention")  # the package has a function of that name
        kinds = patching.EncoderHooks, patching.LanguageHooks
        own = attention.own_attention
        patches = [
            mock.patch.object(kind, name, cls.around(method))
            for kind in kinds
            for name, method in vars(kind).items()
            if callable(method) and not name.startswith("_")
        ]
        patches += [
            mock.patch.object(patching, "attention", cls.around(patching.attention)),
            mock.patch.object(attention, "own_attention", lambda m: cls.around(own(m), own=False)),
            mock.patch.object(vision, "varlen_attention", cls.around(vision.varlen_attention, own=False)),
        ]
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in reversed(patches):
                patch.stop()
            cls._current = None
