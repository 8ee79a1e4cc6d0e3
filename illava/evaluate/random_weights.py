"""A model of an architecture from its config alone: random weights take as long as trained ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def scale_weights(model: nn.Module) -> None:
    """Draw weights anew so that every layer's output has unit size: attention is then neither uniform nor all
    on one token, as it is with transformers' own initialisation in a small or in a deep model."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_()
            elif isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                module.weight.normal_(std=module.weight[0].numel() ** -0.5)
            elif hasattr(module, "gate_up_proj") and isinstance(module.gate_up_proj, nn.Parameter):
                for stack in module.parameters(recurse=False):  # experts, either way round
                    stack.normal_(std=stack[0].numel() ** -0.25)


def build_random(kind: Any, config: Any, *, device: str, dtype: torch.dtype, attn: str) -> nn.Module:
    """A model of class `kind` with random weights, made on the device; equal seeds give equal weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with torch.device(device):
            model = kind._from_config(config, attn_implementation=attn, dtype=dtype)
        scale_weights(model)
    return model.eval()
