"""What the small LLaVA-OneVision and LLaVA-NeXT models share."""

from __future__ import annotations

import torch

from zoo.common import Image, Video, scale_weights, words


def finish(model, seed: int, pad: int):
    """Seeded weights, also where HF's own start is unseeded or too small to matter, and no early end."""
    scale_weights(model, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, weight in model.named_parameters():
        if name.endswith(("image_newline", "class_embedding", "position_embedding.weight")):
            weight.data = torch.randn(weight.shape, generator=generator) * 0.3
    model.generation_config.pad_token_id = pad
    model.generation_config.eos_token_id = None
    return model.eval()


def assemble(processor, rows, opening: str, closing: str, *, nested, side, dtype, seeds):
    """Inputs from the real processor.

    Args:
        opening, closing: markers around every row.
        nested: whether pictures are given row by row; rows without a picture are left out then.
    """
    texts, pictures, videos = [], [], []
    for row, seed in zip(rows, seeds or range(len(rows)), strict=True):
        generator = torch.Generator().manual_seed(seed)
        written = {Image: "<image>", Video: "<video>"}
        parts = [words(part, generator) if isinstance(part, int) else written[type(part)] for part in row]
        texts.append(" ".join([opening, *parts, closing]))
        pictures.append([part.pil() for part in row if isinstance(part, Image)])
        videos += [part.array() for part in row if isinstance(part, Video)]
    pictures = (
        [row for row in pictures if row] if nested else [picture for row in pictures for picture in row]
    )
    inputs = processor(
        text=texts,
        **({"images": pictures} if pictures else {}),
        **({"videos": videos} if videos else {}),
        padding=True,
        padding_side=side,
        return_tensors="pt",
    )
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
