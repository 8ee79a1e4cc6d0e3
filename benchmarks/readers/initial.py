"""The weights that a reader's training begins with."""

from __future__ import annotations

import torch

INTO_RESIDUAL = ("attn.proj", "o_proj", "down_proj", "attention.projection_layer", "mlp.fc2")


@torch.no_grad()
def initialize(model, seed: int) -> None:
    """Fill a model with random weights of a size that trains at this width; the default's 0.02 does not.

    Linear and patch embedding weights have a standard deviation of 1/sqrt(fan-in), which keeps sizes from
    layer to layer, and those whose output is added to the residual stream 1/sqrt(2 · layers) of it (GPT-2,
    Radford et al. 2019, section 2.3), which keeps the sum of all layers at that size. The tied embeddings
    have 1/sqrt(width): logits are of order 1 at first.
    """
    generator, layers = torch.Generator().manual_seed(seed), model.config.text_config.num_hidden_layers

    def fill(weight, deviation):
        weight.copy_(torch.randn(weight.shape, generator=generator) * deviation)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding):
            fill(module.weight, module.embedding_dim**-0.5)
        elif isinstance(module, (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)):
            if name == "lm_head":  # is the embedding
                continue
            depth = 2 * layers if name.endswith(INTO_RESIDUAL) else 1  # encoders have as many blocks
            fill(module.weight, (module.weight[0].numel() * depth) ** -0.5)
            if module.bias is not None:
                module.bias.zero_()
    for name, weight in model.named_parameters():
        if name.endswith("position_embeddings"):
            weight.copy_(_waves(weight.shape[1] - 1, weight.shape[2]))
        elif name.endswith("cls_token"):
            fill(weight, 0.02)
        elif name.endswith("attention.k_proj.weight"):
            # A patch first looks at those like it, its neighbours (Trockman & Kolter 2023, arXiv 2305.09828).
            weight.copy_(model.get_parameter(name.replace("k_proj", "q_proj")))
        elif "lambda_" in name or (weight.ndim == 1 and name.endswith("weight")):  # layer scale, norms
            weight.fill_(1.0)


def _waves(patches: int, width: int) -> torch.Tensor:
    """Position embeddings `[1, 1 + patches, width]` of a square: sines and cosines of row and column.

    Neighbours begin alike, so that attention need not first learn which patches lie side by side. Their
    wavelengths run from 2π to 40π patches; the class token, the first, has none.
    """
    side = round(patches**0.5)
    turns = torch.arange(side)[:, None] * 20.0 ** -torch.linspace(0, 1, width // 4)  # [side, width / 4]
    line = torch.cat((turns.sin(), turns.cos()), 1)  # [side, width / 2]
    rows, columns = line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)
    square = torch.cat((rows, columns), -1).flatten(0, 1)  # [side, side, width] -> [patches, width]
    return torch.cat((torch.zeros(1, width), square))[None]
