"""The rivals of the paper's tables, for evaluation harnesses: `plan=rivals.at_harness:visionzip`.

    PYTHONPATH=benchmarks lmms-eval --model illava --tasks mmmu_val \\
        --model_args pretrained=Qwen/Qwen2.5-VL-7B-Instruct,plan=rivals.at_harness:visionzip,reduction=0.778

Each takes a model and the share of its visual tokens to be gone in the end.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from illava import Plan
from rivals import RIVALS
from rivals.common import seams_of

__all__ = ["fastervlm", "fastv", "pyramiddrop", "sparsevlm", "visionzip"]


def _of(name: str) -> Callable[..., Plan]:
    def plan(model: nn.Module, reduction: float) -> Plan:
        return RIVALS[name].plan_of(seams_of(model), 1 - reduction)

    return plan


fastervlm = _of("FasterVLM")
fastv = _of("FastV")
pyramiddrop = _of("PyramidDrop")
sparsevlm = _of("SparseVLM")
visionzip = _of("VisionZip")
