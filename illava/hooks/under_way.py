"""The call under way, where hooks find it that torch.compile traces.

`State` keeps calls per model in one variable, as a dictionary of weak references, which no compiler reads.
Here each kind of call has a variable that holds the innermost one alone.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Generic, TypeVar
from weakref import ref

from illava.language import LanguageCall
from illava.vision import VisionCall

T = TypeVar("T", LanguageCall, VisionCall)


class Innermost(Generic[T]):
    """The innermost call of its kind under way in this thread and task. It keeps none alive."""

    def __init__(self, name: str) -> None:
        self._call: ContextVar[ref[T] | None] = ContextVar(name, default=None)

    def of(self, plan_id: int) -> T | None:
        """The call, if it is one of this handle's."""
        held = self._call.get()
        call = None if held is None else held()
        return call if call is not None and call.plan_id == plan_id else None

    def get(self) -> T | None:
        """The call, whosever it is."""
        held = self._call.get()
        return None if held is None else held()

    def enter(self, call: T) -> None:
        """`call` begins, perhaps inside another model's."""
        call.outer = self._call.get()
        self._call.set(ref(call))

    def leave(self, call: T) -> None:
        """`call` is over, or will never be: the one around it is the innermost again."""
        if self.get() is call:
            self._call.set(call.outer)


LANGUAGE: Innermost[LanguageCall] = Innermost("illava_language_call")
VISION: Innermost[VisionCall] = Innermost("illava_vision_call")
