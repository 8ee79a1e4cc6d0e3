"""Which architectures illava knows. Adding one is adding a file and a line here."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from illava.errors import UnsupportedModelError
from illava.families.about import About
from illava.families.cutting import Cutting

_FILES = {
    "internvl": "illava.families.internvl",
    "internvl_chat": "illava.families.internvl_chat",
    "llava_next": "illava.families.llava",
    "llava_onevision": "illava.families.llava",
    "minicpmv": "illava.families.minicpmv2_6",
    "minicpmv4_6": "illava.families.minicpmv",
    "minicpmv4_7": "illava.families.minicpmv",
    "qwen2_vl": "illava.families.qwen2_vl",
    "qwen2_5_vl": "illava.families.qwen2_vl",
    "qwen3_vl": "illava.families.qwen3_vl",
    "qwen3_vl_moe": "illava.families.qwen3_vl",
}


def supported_models() -> tuple[str, ...]:
    """The `config.model_type` of every architecture that `illava.patch` takes."""
    return tuple(sorted(_FILES))


def about(model_type: str) -> About:
    """What an architecture's file says about it, for people."""
    return import_module(_FILES[model_type]).ABOUT[model_type]


def cutting(model_type: str) -> Cutting:
    """How an architecture's processor cuts pictures up; of one that has no file nothing is known."""
    if model_type not in _FILES:
        return Cutting()
    return import_module(_FILES[model_type]).CUTTING[model_type]


def family_of(model_type: str, class_name: str) -> ModuleType:
    """The file that describes an architecture.

    Raises:
        UnsupportedModelError: an unknown architecture; lists the known ones.
    """
    if model_type not in _FILES:
        raise UnsupportedModelError(
            f"{class_name} (model_type {model_type!r}) is not supported; illava knows "
            f"{', '.join(supported_models())}. Pass one of these models, or its bare ...Model."
        )
    return import_module(_FILES[model_type])
