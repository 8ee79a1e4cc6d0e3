"""What torch.compile makes of illava's hooks.

Those of layers and blocks only hand over what is ready, and are traced, so that graphs go on through them.
At the entry and the exit of the encoder and of the language model graphs break.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from illava.hooks.state import OfOneModel


@cache
def reads_context() -> bool:
    """Whether torch.compile can read a `ContextVar`, where illava keeps the call under way.

    Where it cannot, a traced hook would break every graph in its middle, and be compiled in pieces.
    """
    from torch._dynamo.variables import misc

    return hasattr(misc, "ContextVarVariable")


class Hook(OfOneModel):
    """One of illava's hooks, as it stands on a module.

    Args:
        traced: whether torch.compile looks inside; at other hooks it breaks its graph, and compiles what
            lies between them.
    """

    def __init__(self, hook: Callable[..., Any], traced: bool = False) -> None:
        self._hook = hook if traced else torch.compiler.disable(hook)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._hook(*args, **kwargs)


def class_like(kind: type) -> type:
    """A class of its own for one module, in all else the same.

    torch.compile does not look whether a module has hooks when it uses again what it compiled for another
    one of its class; it does look at the class.
    """
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), {**names, "__reduce_ex__": OfOneModel.__reduce_ex__})
