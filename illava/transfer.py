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
    """`values` on the host, waiting for what the device is doing.

    Entering the decoder waits here, once a prompt, and merging not at all. Outside of them the host reads a
    call's ids, sizes and masks where they lie on a device, spans whose bounds it does not know, cached
    positions that a cache is cropped by, and whatever is traced: those reads wait as well.
    """
    return values.cpu()
