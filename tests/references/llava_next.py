"""Visual token merging in LLaVA-NeXT; the flow, and where it differs from FACTS.md, is in `references.llava`."""

import torch

from references.core import Options, Result
from references.llava import read, see_images


@torch.no_grad()
def forward(model, inputs, vit_removed, llm_removed, **options) -> Result:
    """Run prompt and pictures through the model, merging on the way.

    Args:
        model: `LlavaNextForConditionalGeneration`, fp32, unpatched.
        inputs: one unpadded row.
        vit_removed: units of a tile before any merge -> block -> units to remove.
        llm_removed: visual tokens of a picture before any merge, and how many of them the encoder left alive
            -> layer -> tokens to remove.
        options: see `Options`.
    """
    options = Options(**options)
    pictures, merges = see_images(model, inputs, vit_removed, options)
    input_ids = inputs["input_ids"][0]
    return read(model, input_ids, len(input_ids), {"image": pictures}, merges, llm_removed, options)
