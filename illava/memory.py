"""Running out of memory: telling it from other errors, and giving back what the attempt held."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


def is_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory, on a GPU or on the host."""
    torch = sys.modules.get("torch")  # without torch, no tensor was too large
    kinds = (MemoryError,) if torch is None else (MemoryError, torch.OutOfMemoryError)
    text = str(error).lower()
    return isinstance(error, kinds) or "out of memory" in text or "allocate memory" in text


def free() -> None:
    """Give memory back that nobody holds."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def unless_out_of_memory(call: Callable[[], T]) -> T | None:
    """What a call returns, which is never `None`; `None` if it ran out of memory.

    By then nothing holds what the call had allocated: neither the error's frames nor torch's cache.
    """
    try:
        return call()
    except (MemoryError, RuntimeError) as error:  # torch's own kind is a RuntimeError
        if not is_memory(error):
            raise
        error.__traceback__ = None
    free()
    return None


def first_that_fits(attempts: Iterable[tuple[str, Callable[[], object]]]) -> str | None:
    """The name of the first attempt that does not run out of memory; `None` if all do.

    As above, no attempt returns `None`.
    """
    free()
    return next((name for name, call in attempts if unless_out_of_memory(call) is not None), None)
