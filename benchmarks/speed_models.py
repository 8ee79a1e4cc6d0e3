"""The models that speed.py measures: real checkpoints' sizes, and smaller copies for a CPU.

Configs come from prefill_configs.py; what is said here is what tells these checkpoints from the ones there.
InternVL 2.5's language models are InternLM2's, which have Llama's layers with the three projections of
attention in one matrix: here they are Llama's, of InternLM2's sizes, as in the converted checkpoints.

A smaller copy keeps its heads' and pictures' sizes and is about as much smaller than the larger model of
its family as the real one is; it tells what illava's own code costs, nothing about the real model's time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import prefill_configs as configs
from prefill_configs import Shape
from prefill_models import FAMILIES, QWEN2_5_VL_7B, Family

ANY = (448, 448)  # a shape wants a picture; the cases bring their own


@dataclass(frozen=True)
class Model:
    """One checkpoint.

    Attributes:
        title: as its makers write it.
        family: key of the inputs it takes: `"qwen"`, `"internvl"` or `"llava"`.
        full, reduced, quick: at its true sizes, for a CPU, and for a test.
        smaller: the next smaller model of its family.
    """

    title: str
    family: str
    full: Family
    reduced: Family
    quick: Family
    smaller: str | None = None

    def of_size(self, size: str) -> Family:
        """The model at one of the three sizes."""
        return {"full": self.full, "reduced": self.reduced, "quick": self.quick}[size]


def _qwen_3b(s: Shape) -> dict[str, Any]:
    """Qwen2.5-VL-3B-Instruct."""
    parts = configs.qwen2_5_vl(s)
    parts["vision_config"]["intermediate_size"] = 3420
    text = {"intermediate_size": 11008, "num_key_value_heads": 2, "vocab_size": 151936}
    parts["text_config"] |= text | {"tie_word_embeddings": True}
    return parts | {"tie_word_embeddings": True}


def _internvl(per_key: int, feed_forward: tuple[int, int]) -> Callable[[Shape], dict[str, Any]]:
    """InternVL 2.5 with InternViT-300M and a Llama of InternLM2's sizes."""

    def config(s: Shape) -> dict[str, Any]:
        text = configs._text(s, feed_forward, per_key)
        if s.llm_hidden == feed_forward[0]:
            text["vocab_size"] = 92553
        return configs.internvl(s) | {"text_config": {"model_type": "llama", **text}}

    return config


_internvl_8b = _internvl(4, (4096, 14336))  # internlm2_5-7b-chat


def _internvl_26b(s: Shape) -> dict[str, Any]:
    """InternVL2_5-26B: InternViT-6B-448px-V2_5 and internlm2_5-20b-chat."""
    parts = _internvl(6, (6144, 16384))(s)
    parts["vision_config"] |= {
        "num_attention_heads": s.hidden // 128,
        "attention_bias": False,
        "use_qk_norm": True,
        "norm_type": "rms_norm",
    }
    return parts


def _llava_7b(s: Shape) -> dict[str, Any]:
    """llava-onevision-qwen2-7b-ov: the last of SigLIP's 27 blocks is not there."""
    parts = configs.llava_onevision(s)
    parts["text_config"] |= {"vocab_size": 152000}
    return parts


def _family(base: Family, config: Callable[[Shape], dict[str, Any]], *shape: int) -> Family:
    return replace(base, config=config, shape=Shape(*shape, ANY))


def _tiny(small: Family, *shape: int) -> Family:
    return replace(small, shape=Shape(*shape, ANY))


_QWEN, _INTERNVL, _LLAVA = (FAMILIES[name] for name in ("qwen2_5_vl", "internvl", "llava_onevision"))
_qwen_small = _family(_QWEN, configs.qwen2_5_vl, 160, 8, 384, 6)
_qwen_smaller = _family(_QWEN, configs.qwen2_5_vl, 160, 8, 256, 5)
_internvl_small = _family(_INTERNVL, _internvl_8b, 64, 8, 256, 6)
_internvl_large = _family(_INTERNVL, _internvl_26b, 256, 8, 384, 8)
_llava_small = _family(_LLAVA, configs.llava_onevision, 144, 8, 256, 8)

MODELS = {
    "qwen2.5-vl-7b": Model(
        "Qwen2.5-VL-7B",
        "qwen",
        QWEN2_5_VL_7B,
        _qwen_small,
        _tiny(_qwen_small, 80, 4, 256, 4),
        smaller="qwen2.5-vl-3b",
    ),
    "qwen2.5-vl-3b": Model(
        "Qwen2.5-VL-3B",
        "qwen",
        _family(_QWEN, _qwen_3b, 1280, 32, 2048, 36),
        _qwen_smaller,
        _tiny(_qwen_smaller, 80, 4, 128, 4),
    ),
    "internvl2.5-26b": Model(
        "InternVL2.5-26B",
        "internvl",
        _family(_INTERNVL, _internvl_26b, 3200, 45, 6144, 48),
        _internvl_large,
        _tiny(_internvl_large, 128, 4, 256, 4),
        smaller="internvl2.5-8b",
    ),
    "internvl2.5-8b": Model(
        "InternVL2.5-8B",
        "internvl",
        _family(_INTERNVL, _internvl_8b, 1024, 24, 4096, 32),
        _internvl_small,
        _tiny(_internvl_small, 64, 4, 128, 4),
    ),
    "llava-onevision-7b": Model(
        "LLaVA-OneVision-7B",
        "llava",
        _family(_LLAVA, _llava_7b, 1152, 26, 3584, 28),
        _llava_small,
        _tiny(_llava_small, 72, 4, 128, 4),
    ),
}
