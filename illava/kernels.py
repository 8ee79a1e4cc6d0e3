"""Where Triton kernels run, and one warning where one that should does not."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from threading import Lock
from typing import TypeVar

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # that the kernels take
OPTIONS = {"enable_fp_fusion": True}  # a product and a sum in one instruction, in every Triton

Result = TypeVar("Result")


class Kernels:
    """The kernels of one purpose, which plain torch can always serve as well.

    Attributes:
        purpose: what they compute, as a warning names it.
        failed: device types on which one did not run.
        launching: held while one is launched: Triton's tuner keeps a call's arguments in itself.
    """

    def __init__(self, purpose: str) -> None:
        self.purpose = purpose
        self.failed: set[str] = set()
        self.launching = Lock()

    def backend(self, device: torch.device | str, dtype: torch.dtype) -> str:
        """`"triton"` on CUDA, where it is installed and did not fail before, for fp16, bf16 and fp32; else
        `"torch"`.
        """
        kind = torch.device(device).type
        runs = kind == "cuda" and dtype in DTYPES and has_triton() and kind not in self.failed
        return "triton" if runs else "torch"

    def run_or_warn(
        self, kernel: Callable[[], Result], device: torch.device, required: bool = False
    ) -> Result | None:
        """The kernel's result; `None` where it cannot run, after one warning that names the reason.

        A kernel that the caller `required` raises instead.
        """
        try:
            return kernel()
        except (ValueError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if required:
                raise
            self.failed.add(device.type)
            reason = str(error).strip().split("\n")[0]
            warnings.warn(
                f"illava: the Triton kernel for {self.purpose} does not run on {device} "
                f"({type(error).__name__}: {reason}); plain torch takes its place, as exact but slower",
                RuntimeWarning,
                stacklevel=2,
            )
            return None


def asked_for(backend: str | None, otherwise: str) -> str:
    """The backend a caller asked for, or else the one chosen.

    Raises:
        ValueError: it is neither `"triton"` nor `"torch"`.
    """
    if backend not in (None, "triton", "torch"):
        raise ValueError(f'backend is "triton" or "torch", not {backend!r}')
    return backend or otherwise


def interpreted() -> bool:
    """Whether Triton's interpreter runs kernels, as without a GPU. It cannot multiply bf16: widen it."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def has_triton() -> bool:
    return find_spec("triton") is not None


def processors(device: torch.device) -> int:
    """Multiprocessors to keep busy; 1 where programs run one behind the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
