"""Small models of every family, with random weights and their real processors, and their slow references.

Each family is a module with `NAME`, `KINDS` (prompts by name: a list of rows, each a list of parts), `BEAMS`
(a batch for beams and several answers), the layers its tests merge at, and `build`, `processor`, `prompt` and
`text_tokens`. What the unpatched family cannot do is in its docstring and, by capability (see
`tests/conftest.py`), in `CANNOT` where it lacks all of it, in `LIMITS` where it lacks a part.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import transformers

_MODULES = (
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "internvl",
    "llava_onevision",
    "llava_next",
    "minicpmv4_6",
    "minicpmv4_7",
)
_REFERENCES = {
    "qwen2_5_vl": "qwen2_vl",
    "qwen3_vl_moe": "qwen3_vl",
    "minicpmv4_6": "minicpmv",
    "minicpmv4_7": "minicpmv",
}


def _find() -> tuple[dict[str, ModuleType], dict[str, str]]:
    found, absent = {}, {}
    for name in _MODULES:
        try:
            found[name] = import_module(f"zoo.{name}")
        except ImportError as error:
            if "transformers" not in str(error):
                raise
            absent[name] = f"not in transformers {transformers.__version__}"
    return found, absent


# The families that the installed transformers has, and why the others are missing.
FAMILIES, ABSENT = _find()


def reference(name: str) -> ModuleType:
    """A family's slow reference, with `forward` and `generate`."""
    return import_module(f"references.{_REFERENCES.get(name, name)}")
