"""Running out of memory: telling it from other errors, and what would fit."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable

import torch


def is_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory, on a GPU or on the host."""
    text = str(error).lower()
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "out of memory" in text or "allocate memory" in text


def free() -> None:
    """Give memory back that nobody holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def first_that_fits(attempts: Iterable[tuple[str, Callable[[], object]]]) -> str | None:
    """The name of the first attempt that does not run out of memory; `None` if all do."""
    for name, attempt in attempts:
        free()
        try:
            attempt()
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_memory(error):
                raise
            error.__traceback__ = None  # its frames hold tensors
        else:
            return name
    return None
