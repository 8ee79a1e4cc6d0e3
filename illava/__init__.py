"""illava: faster vision-language models by merging redundant visual tokens.

    import illava
    handle = illava.patch(model, reduction=0.778)
    model.generate(**inputs)
    print(handle.report)
    handle.remove()

Importing illava loads neither torch nor transformers and changes nothing: the names below are
looked up when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from illava.candidates import Candidates
    from illava.errors import (
        AlreadyPatchedError,
        CacheError,
        CheckpointError,
        DataError,
        IllavaError,
        JobError,
        MissingExtraError,
        NoPlanError,
        OutOfMemoryError,
        PictureError,
        PlanError,
        SeamError,
        UnsupportedInputError,
        UnsupportedModelError,
    )
    from illava.families import supported_models
    from illava.patching import Handle, patch, unpatch
    from illava.plan import Plan
    from illava.provenance import Provenance, Step
    from illava.report import Report
    from illava.schedule import ModelPlan
    from illava.see.show import visualize

__version__ = "0.1.0"

_HOME = {
    "patch": "illava.patching",
    "unpatch": "illava.patching",
    "Handle": "illava.patching",
    "supported_models": "illava.families",
    "Candidates": "illava.candidates",
    "Plan": "illava.plan",
    "ModelPlan": "illava.schedule",
    "Report": "illava.report",
    "Provenance": "illava.provenance",
    "Step": "illava.provenance",
    "visualize": "illava.see.show",
    "IllavaError": "illava.errors",
    "PlanError": "illava.errors",
    "UnsupportedModelError": "illava.errors",
    "SeamError": "illava.errors",
    "AlreadyPatchedError": "illava.errors",
    "UnsupportedInputError": "illava.errors",
    "CacheError": "illava.errors",
    "CheckpointError": "illava.errors",
    "DataError": "illava.errors",
    "JobError": "illava.errors",
    "MissingExtraError": "illava.errors",
    "NoPlanError": "illava.errors",
    "OutOfMemoryError": "illava.errors",
    "PictureError": "illava.errors",
}

__all__ = [
    "AlreadyPatchedError",
    "CacheError",
    "Candidates",
    "CheckpointError",
    "DataError",
    "Handle",
    "IllavaError",
    "JobError",
    "MissingExtraError",
    "ModelPlan",
    "NoPlanError",
    "OutOfMemoryError",
    "PictureError",
    "Plan",
    "PlanError",
    "Provenance",
    "Report",
    "SeamError",
    "Step",
    "UnsupportedInputError",
    "UnsupportedModelError",
    "patch",
    "supported_models",
    "unpatch",
    "visualize",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'illava' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
