"""Weights of a checkpoint, of safetensors only: such files hold numbers, a pickle can hold a program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from illava.errors import CheckpointError

# What transformers finds weights by.
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_PICKLES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
_CONVERT = (
    "illava loads safetensors only, as a pickle can run code when it is opened. If you trust who made it, "
    "convert it once: load it with transformers' from_pretrained, then save_pretrained into another folder"
)


def load_model(name: str | Path, **options: Any) -> Any:
    """A model of a checkpoint's safetensors.

    Args:
        name: a folder, or a name on the hub.
        options: for transformers' `from_pretrained`.

    Raises:
        CheckpointError: no weights, none but pickles, or broken ones.
    """
    from transformers import AutoModelForImageTextToText

    check_weights(name)
    try:
        return AutoModelForImageTextToText.from_pretrained(name, use_safetensors=True, **options)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        if isinstance(error, OSError) and "use_safetensors" in str(error):  # of the hub, and of pickles
            raise CheckpointError(f"{name} has no weights in *.safetensors; {_CONVERT}") from error
        raise CheckpointError(f"{name} cannot be loaded: {first_line(error)}") from error
    except Exception as error:  # safetensors has an error of its own, which is an Exception only
        if type(error).__module__.split(".")[0] != "safetensors" and "Safetensor" not in type(error).__name__:
            raise
        raise CheckpointError(
            f"{name} has broken weights ({first_line(error)}); copy or download its *.safetensors again"
        ) from error


def check_weights(name: str | Path) -> None:
    """See that a folder holds weights that may be loaded; names on the hub pass.

    Raises:
        CheckpointError: it holds none, or pickles only, or an index that leads to pickles.
    """
    folder = Path(name)
    if not folder.is_dir():
        return
    for index in sorted(folder.glob("*.safetensors.index.json")):
        _check_index(index)
    if _first(folder, _WEIGHTS):
        return
    if pickled := _first(folder, _PICKLES):
        raise CheckpointError(f"{name} has its weights in {pickled.name}; {_CONVERT}")
    raise CheckpointError(
        f"{name} holds a config but no weights (*.safetensors); copy them there, or time the "
        "architecture without them: illava bench --random-weights"
    )


def _check_index(path: Path) -> None:
    """transformers opens whatever an index names, by its suffix."""
    try:
        files = {str(file) for file in json.loads(path.read_bytes())["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is no index of weights; copy or download it again") from error
    if others := sorted(file for file in files if not file.endswith(".safetensors")):
        raise CheckpointError(f"{path} has its weights in {others[0]}; {_CONVERT}")


def first_line(error: BaseException) -> str:
    """Of an error's message, which in transformers may be a page."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def _first(folder: Path, patterns: tuple[str, ...]) -> Path | None:
    return next((path for pattern in patterns for path in sorted(folder.glob(pattern))), None)
