"""The state of an interrupted training run: tensors as safetensors, everything else as JSON beside them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


def write(
    path: Path,
    models: dict[str, nn.Module],
    optimizers: Sequence[torch.optim.Optimizer],
    about: dict[str, Any],
) -> None:
    """Write a run's state.

    Args:
        models: by a name of their own.
        about: whatever else there is to keep, in what JSON can hold.
    """
    tensors = {f"{name}/{key}": x for name, m in models.items() for key, x in m.state_dict().items()}
    saved = [optimizer.state_dict() for optimizer in optimizers]
    for number, state in enumerate(saved):
        tensors |= {f"optimizer {number}/{weight}/{key}": x for weight, key, x in _entries(state)}
    groups = json.dumps([state["param_groups"] for state in saved], allow_nan=False)
    metadata = {"groups": groups, "about": json.dumps(about, allow_nan=False)}
    # Cloned, as tied weights share memory, which safetensors does not write.
    save_file({name: x.detach().cpu().clone() for name, x in tensors.items()}, path, metadata)


def fingerprint(folder: Path) -> str:
    """What tells a checkpoint's weights from all others."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:12]


def about(path: Path) -> dict[str, Any]:
    """What `write` was given beside models and optimizers."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["about"])


def read(path: Path, models: dict[str, nn.Module], optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Put a state back into models and optimizers."""
    with safe_open(path, "pt") as file:
        groups = json.loads(file.metadata()["groups"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, model in models.items():
        model.load_state_dict(_under(f"{name}/", tensors))
    for number, (optimizer, own) in enumerate(zip(optimizers, groups, strict=True)):
        state: dict[int, dict[str, Tensor]] = {}
        for name, x in _under(f"optimizer {number}/", tensors).items():
            weight, key = name.split("/")
            state.setdefault(int(weight), {})[key] = x
        optimizer.load_state_dict({"state": state, "param_groups": own})


def _entries(state: dict[str, Any]) -> Iterator[tuple[int, str, Tensor]]:
    for weight, values in state["state"].items():
        for key, value in values.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"{key}={value!r} of an optimizer is no tensor; only those are kept")
            yield weight, key, value


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
