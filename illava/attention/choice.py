"""Which kernel yields the log-sum-exp, chosen once for an implementation, a device and a type.

The kernel is that of the user's own attention where it gives its statistics away. Where it does not, the
next best takes its place, and one warning says why and what would help.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from illava.attention.column_sums import column_sum_backend

HALF = torch.float16, torch.bfloat16
# Of each implementation that has a package of its own: the kernel's name here, the package's module, the
# option by which its function gives the log-sum-exp away, and what to install.
PACKAGES = {
    "flash_attention_2": ("flash_attn_2", "flash_attn", "return_attn_probs", "flash-attn 2"),
    "flash_attention_3": (
        "flash_attn_3",
        "flash_attn_interface",
        "return_attn_probs",
        "a newer flash-attn 3",
    ),
    "flash_attention_4": ("flash_attn_4", "flash_attn.cute", "return_lse", "a newer flash-attn-4"),
}


@dataclass(frozen=True)
class AttentionChoice:
    """How attention statistics are computed.

    Attributes:
        implementation: the model's attention, as its config says.
        device, dtype: where, and in what type.
        kernel: yields the log-sum-exp in the encoder: one of `BACKENDS`.
        note: why it is not the implementation's own, "" if it is.
    """

    implementation: str
    device: str
    dtype: torch.dtype
    kernel: str
    note: str = ""

    @property
    def column_sums(self) -> str:
        """What computes attention received from it: `"triton"`, or `"torch"`."""
        return column_sum_backend(self.device, self.dtype)

    def __str__(self) -> str:
        return f"{self.implementation}, statistics by {self.kernel} and {self.column_sums}"


class Choices:
    """The choices made for one patched model; all but the first follow a change of the model's own."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, str, torch.dtype], AttentionChoice] = {}
        self.last: AttentionChoice | None = None

    def __call__(self, implementation: str, device: torch.device, dtype: torch.dtype) -> AttentionChoice:
        key = implementation, device.type, dtype
        if key not in self._made:
            self._made[key] = choose(implementation, device, dtype)
            if self._made[key].note:
                warnings.warn(f"illava: {self._made[key].note}", RuntimeWarning, stacklevel=5)
        self.last = self._made[key]
        return self.last


def choose(implementation: str, device: torch.device, dtype: torch.dtype) -> AttentionChoice:
    """The kernel that yields the log-sum-exp for a model that attends with `implementation`.

    Args:
        implementation: the model's `_attn_implementation` (`"sdpa"`, `"eager"`, `"flash_attention_2"`, ...).
        device, dtype: where and in what type the vision encoder runs.
    """
    missing = ""
    if implementation in PACKAGES:
        name, module, option, remedy = PACKAGES[implementation]
        missing = _missing(module, option, remedy, dtype)
        if not missing:
            return AttentionChoice(implementation, device.type, dtype, name)
    kernel = _torch_kernel(implementation, device, dtype)
    note = ""
    if missing:
        note = f"the statistics of {implementation} come from {kernel} instead: {missing}"
    elif kernel == "blocks" and device.type == "cuda" and implementation != "eager":
        note = (
            f"no fused kernel gives the statistics of {implementation} in {str(dtype).split('.')[-1]}; plain "
            "torch does, as exact but slower. Load the model in bfloat16 or float16"
        )
    return AttentionChoice(implementation, device.type, dtype, kernel, note)


def _torch_kernel(implementation: str, device: torch.device, dtype: torch.dtype) -> str:
    if implementation == "eager":
        return "blocks"
    if device.type == "cpu" and hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"):
        return "torch_cpu"
    if device.type == "cuda" and dtype in HALF:
        return "torch_varlen" if has_varlen() else "torch_flash"
    return "blocks"


def _missing(module: str, option: str, remedy: str, dtype: torch.dtype) -> str:
    """Why a package's function does not give its log-sum-exp; "" if it does."""
    if dtype not in HALF:
        return f"it does not run in {str(dtype).split('.')[-1]}; load the model in bfloat16 or float16"
    try:
        parameters = inspect.signature(varlen_function(module)).parameters
    except ImportError:
        return f"{module!r} cannot be imported here; install {remedy}, or leave it at that"
    if option not in parameters:
        return f"this version of {module!r} has no {option}=; install {remedy}, or leave it at that"
    return ""


def varlen_function(module: str) -> Callable[..., Any]:
    """A package's `flash_attn_varlen_func`.

    Raises:
        ImportError: it has none.
    """
    try:
        return import_module(module).flash_attn_varlen_func
    except AttributeError as error:
        raise ImportError(f"{module} has no flash_attn_varlen_func") from error


def has_varlen() -> bool:
    """torch's varlen attention, and its option to return the log-sum-exp (torch 2.10)."""
    try:
        return hasattr(import_module("torch.nn.attention.varlen"), "AuxRequest")
    except ImportError:
        return False
