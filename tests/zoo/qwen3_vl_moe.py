"""A small Qwen3-VL with a mixture of experts: Qwen3-VL in everything but the decoder's feed-forward part.

Prompts, processor and what the unpatched family can do are Qwen3-VL's. In 4.57 the experts' weights lie the
other way round ([experts, in, out], in transformers 5 [experts, out, in]) and the mixture returns router
logits as well. The same seed gives other weights on the two versions.
"""

from __future__ import annotations

import torch
import transformers

from zoo import qwen
from zoo.common import V5
from zoo.qwen3_vl import (  # noqa: F401
    BEAMS,
    KINDS,
    LIMITS,
    LLM_LAYERS,
    VIT_LAYERS,
    config_parts,
    processor,
    prompt,
    text_tokens,
)

NAME = "qwen3_vl_moe"


def build(*, seed=0, attention="sdpa", dtype=torch.float32, layers=4):
    """A random model with 4 encoder blocks, and in each decoder layer 4 experts of which a token takes 2."""
    parts = config_parts(layers)
    parts["text_config"] |= dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    config = transformers.Qwen3VLMoeConfig(**parts)
    torch.manual_seed(seed)
    kind = transformers.Qwen3VLMoeForConditionalGeneration
    model = kind._from_config(config, attn_implementation=attention, dtype=dtype)
    qwen.random_weights(model, seed, torch.float32)
    generator = torch.Generator().manual_seed(seed + 2)
    for name, weight in model.named_parameters():
        if "experts" in name:  # three dimensions: the scale that fits a matrix would be far too small
            experts, *sides = weight.shape
            out, into = sides if V5 else sides[::-1]
            drawn = torch.randn(experts, out, into, generator=generator) * (0.5 / into**0.5)
            weight.data = drawn if V5 else drawn.transpose(1, 2).contiguous()
        elif name.endswith("mlp.gate.weight"):  # clear winners: rounding must not choose the experts
            weight.data = weight.data * 2
        weight.data = weight.data.to(dtype)
    return model
