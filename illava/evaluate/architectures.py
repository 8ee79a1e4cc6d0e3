"""What illava knows of an architecture before any weights are there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from illava.evaluate.loading import read_config
from illava.families import about, family_of, supported_models
from illava.families.about import About
from illava.plan import Plan
from illava.schedule import ModelPlan


@dataclass(frozen=True)
class Architecture:
    """One checkpoint's architecture.

    Attributes:
        name: of the checkpoint.
        model_type: of its config.
        about: what its family says.
        plan: the default plan, its layers settled for this model.
        windowed: encoder blocks that attend in windows.
    """

    name: str
    model_type: str
    about: About
    plan: ModelPlan
    windowed: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "model": self.name,
            "model_type": self.model_type,
            "title": self.about.title,
            "merge_unit": self.about.merge_unit,
            "vit_layers": list(self.plan.vit_layers),
            "vit_depth": self.plan.vit_depth,
            "llm_layers": list(self.plan.llm_layers),
            "llm_depth": self.plan.llm_depth,
            "merge": self.plan.settings.merge,
            "reduction": self.plan.reduction,
            "encoder_share": self.plan.encoder_share,
            "windowed_blocks": list(self.windowed),
        }


def all_architectures() -> dict[str, About]:
    """Every architecture that `illava.patch` takes, by its `model_type`."""
    return {name: about(name) for name in supported_models()}


def architecture_of(name: str | Path) -> Architecture:
    """A checkpoint's architecture, from its config alone.

    Raises:
        CheckpointError: no checkpoint.
        UnsupportedModelError: a family illava does not know.
        SeamError: this version of transformers lacks a part illava needs.
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    config = read_config(name)
    kind: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    with torch.device("meta"):
        model = kind._from_config(config)
    seams = family_of(config.model_type, kind.__name__).find_seams(model)
    plan = seams.settle(Plan())
    windowed = tuple(b for b in range(len(seams.blocks)) if b not in seams.full_attention_blocks)
    return Architecture(str(name), config.model_type, about(config.model_type), plan, windowed)
