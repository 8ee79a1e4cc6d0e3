"""Configs of the models that prefill.py measures: real checkpoints of any width and depth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from illava.evaluate.synthetic import (
    FIRST_TEXT,
    IMAGE,
    NEWLINE,
    SLICE_END,
    SLICE_START,
    VIDEO,
    VISION_END,
    VISION_START,
)


@dataclass(frozen=True)
class Shape:
    """How large a model is, and the picture it is shown.

    Attributes:
        hidden, depth: width and blocks of the encoder.
        llm_hidden, llm_layers: width and layers of the language model.
        picture: `(height, width)` in pixels.
    """

    hidden: int
    depth: int
    llm_hidden: int
    llm_layers: int
    picture: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.hidden}x{self.depth}+{self.llm_hidden}x{self.llm_layers}"


# What families share ------------------------------------------------------------------------------


def _scaled(width: int, real_width: int, real: int, step: int) -> int:
    return round(width * real / real_width / step) * step


def _text(
    s: Shape, feed_forward: tuple[int, int], per_key: int, head: int = 128, spread: int = 1
) -> dict[str, Any]:
    """A language model.

    Args:
        feed_forward: width and width inside the feed-forward network of the real one.
        per_key: query heads per key head of the real one.
        head: channels of a head.
        spread: all query heads together, in widths of the model.
    """
    heads = s.llm_hidden * spread // head
    return {
        "hidden_size": s.llm_hidden,
        "intermediate_size": _scaled(s.llm_hidden, *feed_forward, 128),
        "num_hidden_layers": s.llm_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 1 if heads % per_key else heads // per_key,
        "head_dim": head,
        "vocab_size": 2048,
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "bos_token_id": FIRST_TEXT,
        "eos_token_id": FIRST_TEXT,
        "pad_token_id": FIRST_TEXT,
        "tie_word_embeddings": False,
    }


def _siglip(s: Shape) -> dict[str, Any]:
    """SigLIP so400m, of which Qwen3-VL's encoder has the sizes as well."""
    return {
        "hidden_size": s.hidden,
        "intermediate_size": _scaled(s.hidden, 1152, 4304, 8),
        "num_attention_heads": s.hidden // 72,
        "num_hidden_layers": s.depth,
    }


_QWEN2_7B = (3584, 18944)
_QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
    "tie_word_embeddings": False,
}
_QWEN_PATCHES = {"in_channels": 3, "spatial_merge_size": 2, "temporal_patch_size": 2}


# Qwen ---------------------------------------------------------------------------------------------


def _qwen2_text(s: Shape) -> dict[str, Any]:
    # `rope_scaling` as the hub's checkpoints have it, which transformers 4.57 and 5.x both read.
    text = _text(s, _QWEN2_7B, 7)
    del text["head_dim"]  # not an option of Qwen2-VL's
    rope = {"type": "default", "mrope_section": [16, 24, 24]}
    return text | {"rope_scaling": rope, "max_position_embeddings": 128_000, "use_sliding_window": False}


def qwen2_vl(s: Shape) -> dict[str, Any]:
    """Qwen2-VL-7B-Instruct."""
    vision = _QWEN_PATCHES | {
        "depth": s.depth,
        "embed_dim": s.hidden,
        "num_heads": s.hidden // 80,
        "mlp_ratio": 4,
        "patch_size": 14,
        "hidden_size": s.llm_hidden,
    }
    return {"vision_config": vision, "text_config": _qwen2_text(s), **_QWEN_TOKENS}


def qwen2_5_vl(s: Shape) -> dict[str, Any]:
    """Qwen2.5-VL-7B-Instruct."""
    vision = _QWEN_PATCHES | {
        "depth": s.depth,
        "hidden_size": s.hidden,
        "intermediate_size": _scaled(s.hidden, 1280, 3420, 16),
        "num_heads": s.hidden // 80,
        "fullatt_block_indexes": [s.depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4)],
        "patch_size": 14,
        "window_size": 112,
        "out_hidden_size": s.llm_hidden,
        "tokens_per_second": 2,
    }
    return {"vision_config": vision, "text_config": _qwen2_text(s), **_QWEN_TOKENS}


def qwen2_5_vl_7b(s: Shape) -> dict[str, Any]:
    """Qwen2.5-VL-7B-Instruct itself."""
    parts = qwen2_5_vl(s)
    parts["vision_config"]["intermediate_size"] = 3420
    parts["text_config"]["vocab_size"] = 152064
    return parts


def qwen3_vl(s: Shape) -> dict[str, Any]:
    """Qwen3-VL-8B-Instruct, whose taps follow blocks 8, 16 and 24 of 27."""
    return _qwen3(s, _text(s, (4096, 12288), 4))


def qwen3_vl_moe(s: Shape) -> dict[str, Any]:
    """Qwen3-VL-30B-A3B-Instruct."""
    experts = {
        "num_experts": 32,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": _scaled(s.llm_hidden, 2048, 768, 16),
    }
    return _qwen3(s, _text(s, (2048, 6144), 8, spread=2) | experts)


def _qwen3(s: Shape, text: dict[str, Any]) -> dict[str, Any]:
    vision = _siglip(s)
    vision |= _QWEN_PATCHES | {
        "depth": vision.pop("num_hidden_layers"),
        "num_heads": vision.pop("num_attention_heads"),
        "patch_size": 16,
        "out_hidden_size": s.llm_hidden,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [round(s.depth * tap / 27) - 1 for tap in (9, 17, 25)],
    }
    rope = {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    text |= {"rope_theta": 5_000_000.0, "rope_scaling": rope}
    return {"vision_config": vision, "text_config": text, **_QWEN_TOKENS}


# Others -------------------------------------------------------------------------------------------


def internvl(s: Shape) -> dict[str, Any]:
    """InternVL3-8B: InternViT-300M and Qwen2.5-7B."""
    vision = {
        "hidden_size": s.hidden,
        "intermediate_size": 4 * s.hidden,
        "num_attention_heads": s.hidden // 64,
        "num_hidden_layers": s.depth,
        "image_size": [448, 448],
        "patch_size": [14, 14],
        "attention_bias": True,
        "norm_type": "layer_norm",
    }
    return {
        "vision_config": vision,
        "text_config": {"model_type": "qwen2", **_text(s, _QWEN2_7B, 7)},
        "image_token_id": IMAGE,
        "image_seq_length": 256,
        "tie_word_embeddings": False,
    }


def llava_onevision(s: Shape) -> dict[str, Any]:
    """llava-onevision-qwen2-7b-ov: SigLIP so400m at 384 pixels and Qwen2-7B."""
    vision = {
        "model_type": "siglip_vision_model",
        "image_size": 384,
        "patch_size": 14,
        "vision_use_head": False,
    }
    return {
        "vision_config": vision | _siglip(s),
        "text_config": {"model_type": "qwen2", **_text(s, _QWEN2_7B, 7)},
        "image_token_index": IMAGE,
        "video_token_index": VIDEO,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_9",
        "image_grid_pinpoints": [
            [384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)
        ],
        "tie_word_embeddings": False,
    }


def llava_next(s: Shape) -> dict[str, Any]:
    """llava-v1.6-mistral-7b: CLIP ViT-L at 336 pixels and Mistral-7B."""
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": s.hidden,
        "intermediate_size": 4 * s.hidden,
        "num_attention_heads": s.hidden // 64,
        "num_hidden_layers": s.depth,
        "image_size": 336,
        "patch_size": 14,
    }
    return {
        "vision_config": vision,
        "text_config": {"model_type": "mistral", "sliding_window": None, **_text(s, (4096, 14336), 4)},
        "image_token_index": IMAGE,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        "image_seq_length": 576,
        "tie_word_embeddings": False,
    }


def minicpm(s: Shape) -> dict[str, Any]:
    """MiniCPM-V 4.6: SigLIP so400m, joined after block 6 of 27, and Qwen3.5-0.8B."""
    text = _text(s, (1024, 3584), 4, head=256, spread=2)
    linear_heads = s.llm_hidden // 64
    rope = {
        "rope_type": "default",
        "rope_theta": text.pop("rope_theta") * 10,
        "partial_rotary_factor": 0.25,
        "mrope_section": [11, 11, 10],
        "mrope_interleaved": True,
    }
    text |= {
        "model_type": "qwen3_5_text",
        "layer_types": ["linear_attention" if (i + 1) % 4 else "full_attention" for i in range(s.llm_layers)],
        "linear_num_key_heads": linear_heads,
        "linear_num_value_heads": linear_heads,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "rope_parameters": rope,
    }
    return {
        "vision_config": {"image_size": 980, "patch_size": 14, **_siglip(s)},
        "text_config": text,
        "image_size": 448,
        "insert_layer_id": round(s.depth * 7 / 27) - 1,
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
    }


def minicpm_4_7(s: Shape) -> dict[str, Any]:
    """MiniCPM-V 4.7, taken to be of 4.6's sizes."""
    markers = {
        "image_start_id": VISION_START,
        "image_end_id": VISION_END,
        "slice_start_id": SLICE_START,
        "slice_end_id": SLICE_END,
        "newline_id": NEWLINE,
    }
    return minicpm(s) | markers
