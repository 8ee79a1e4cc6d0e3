"""Moving what the host knows to a device, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def on(device: torch.device, values: Tensor | Sequence[int]) -> Tensor:
    """`values` on `device`; the copy is queued behind what the device is doing.

    Memory that is not pinned is staged before the call returns, so the source may be let go of.
    """
    return torch.as_tensor(values).to(device, non_blocking=True)


def to_host(values: Tensor) -> Tensor:
    """`values` on the host, waiting for what the device is doing: the only way back that illava takes."""
    return values.cpu()
