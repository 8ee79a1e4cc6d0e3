"""Finding a model's parts, and what its modules are called with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from torch import nn

from illava.errors import SeamError


def part(root: nn.Module, path: str, why: str, *alternatives: str) -> Any:
    """`root.path` or the first of the alternatives it has, or an error that names what is missing.

    Raises:
        SeamError: this version of transformers has no such part.
    """
    for candidate in (path, *alternatives):
        current: Any = root
        for name in candidate.split("."):
            current = getattr(current, name, None)
        if current is not None:
            return current
    import transformers

    raise SeamError(
        f"{type(root).__name__} has no {path!r} in transformers {transformers.__version__}; illava needs "
        f"it {why}. Use a version of {_home(root)} it was run on (see the README's table), or report this "
        "at the project's issue tracker."
    )


def _home(root: nn.Module) -> str:
    """Where a model's code comes from."""
    return "transformers" if type(root).__module__.startswith("transformers.") else "the model's code"


def core_of(model: nn.Module) -> nn.Module:
    """The module that joins pictures and text, in `...ForConditionalGeneration` or itself.

    Raises:
        SeamError: it has none.
    """
    if hasattr(model, "lm_head") or not hasattr(model, "language_model"):
        return part(model, "model", "as the module that joins pictures and text")
    return model


def used_blocks(depth: int, feature_layer: int | Sequence[int]) -> int:
    """How many blocks lie below the hidden states a model reads from its encoder.

    Args:
        depth: blocks of the encoder.
        feature_layer: index, or indices, into its `depth + 1` hidden states.
    """
    indices = [feature_layer] if isinstance(feature_layer, int) else list(feature_layer)
    return max(index % (depth + 1) for index in indices)


@lru_cache(maxsize=256)
def _signature(forward: Any) -> inspect.Signature:
    return inspect.signature(forward)


def is_saved_by_peft(module: nn.Module) -> bool:
    """Whether PEFT's `modules_to_save` has put a module of its own around one, and trains a copy of it."""
    return hasattr(module, "original_module") and hasattr(module, "modules_to_save")


def arguments(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Everything a module was called with, by name, whether it came by position or by keyword."""
    own: Any = module.original_module if is_saved_by_peft(module) else module
    names = [n for n in _signature(type(own).forward).parameters if n != "self"]
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def call_by_name(module: nn.Module, named: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments that call a module with `named`, the inverse of `arguments`."""
    if not is_saved_by_peft(module):
        return (), dict(named)
    first, *others = named  # PEFT's module takes the first by position alone
    return (named[first],), {name: named[name] for name in others}
