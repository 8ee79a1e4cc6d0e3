"""The names by which lmms-eval finds patched models; it reads them through this package's entry point.

Apart from the models themselves, because lmms-eval reads this while it is being imported.
"""

from __future__ import annotations

from typing import Any

# Other names for the same class, for command lines that say the family.
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "llava_onevision", "llava_next")


def manifests() -> list[Any]:
    """What the entry point gives lmms-eval: one `ModelManifest`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    aliases = tuple(f"illava_{family}" for family in FAMILIES)
    path = "illava.harness.lmms_eval_model.PatchedModel"
    return [ModelManifest("illava", chat_class_path=path, aliases=aliases)]
