"""The state of an interrupted training run: tensors as safetensors, everything else as JSON beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


def write(
    path: Path, models: dict[str, nn.Module], optimizers: Sequence[torch.optim.Optimizer], **more: Any
) -> None:
    """Write a run's state, in one piece: a run that is stopped here goes on from the state before.

    Args:
        path: ends in `.safetensors`.
        models: by a name of their own.
        more: whatever JSON can hold.
    """
    tensors = {f"{name}/{key}": x for name, m in models.items() for key, x in m.state_dict().items()}
    saved = [optimizer.state_dict() for optimizer in optimizers]
    for number, state in enumerate(saved):
        tensors |= {f"optimizer {number}/{weight}/{key}": x for weight, key, x in _entries(state)}
    groups = json.dumps([state["param_groups"] for state in saved], allow_nan=False)
    metadata = {"groups": groups, "more": json.dumps(more, allow_nan=False)}
    # Cloned, as tied weights share memory, which safetensors does not write.
    fresh = path.with_suffix(".new")
    save_file({name: x.detach().cpu().clone() for name, x in tensors.items()}, fresh, metadata)
    fresh.replace(path)


def read(
    path: Path, models: dict[str, nn.Module], optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, Any]:
    """Put a state back into models and optimizers; what `write` was given `more`."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, model in models.items():
        model.load_state_dict(_under(f"{name}/", tensors))
    groups = json.loads(metadata["groups"])
    for number, (optimizer, own) in enumerate(zip(optimizers, groups, strict=True)):
        state: dict[int, dict[str, Tensor]] = {}
        for name, x in _under(f"optimizer {number}/", tensors).items():
            weight, key = name.split("/")
            state.setdefault(int(weight), {})[key] = x
        optimizer.load_state_dict({"state": state, "param_groups": own})
    return json.loads(metadata["more"])


def _entries(state: dict[str, Any]) -> Iterator[tuple[int, str, Tensor]]:
    for weight, values in state["state"].items():
        for key, value in values.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"{key}={value!r} of an optimizer is no tensor; only those are kept")
            yield weight, key, value


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
