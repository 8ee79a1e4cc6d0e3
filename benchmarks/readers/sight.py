"""What the encoder is taught beside the answers: to name what each visual token looks at.

Real encoders are trained on pictures before they meet a language model. Here a linear layer on the visual
tokens learns which digit or shape and which colour stands in each unit, and which characters; it teaches the
encoder to see within minutes, where answers alone take hours, and is left out of the checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from readers import material, scenes

NAMES = 1 + len(material.NUMBERS) + len(material.SHAPES)
COLOURS = 1 + len(material.COLOURS)
CHARACTERS = 1 + len(scenes.CHARACTERS)


class Sight(nn.Module):
    """A linear layer from visual tokens `[n, width]` to what they show, listening at a model's encoder."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.sizes = [NAMES, COLOURS, *[CHARACTERS] * scenes.SLOTS]
        self.head = nn.Linear(model.config.text_config.hidden_size, sum(self.sizes))
        core = model.model
        source = core.visual if hasattr(core, "visual") else core.multi_modal_projector
        source.register_forward_hook(self._listen)
        self._heard: Tensor | None = None

    def _listen(self, module, inputs, output) -> None:
        output = getattr(output, "pooler_output", output)
        self._heard = output.flatten(0, -2)  # [visual tokens, width]

    def forward(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss on the tokens of the last call, and the share of things and characters named rightly.

        Args:
            labels: `[visual tokens, LABELS]`.
        """
        heard, self._heard = self._heard, None
        parts = self.head(heard.float()).split(self.sizes, dim=-1)
        found: tuple[list, list] = [], []
        right = count = 0
        for logits, target in zip(parts, labels.unbind(-1), strict=True):
            each = nn.functional.cross_entropy(logits, target, reduction="none")  # [visual tokens]
            there = target > 0
            found[0].append(each[there])
            found[1].append(each[~there])
            right = right + ((logits.argmax(-1) == target) & there).sum()
            count = count + there.sum()
        # As much weight on what is there as on all the rest, which is most of a picture.
        seen, rest = (torch.cat(values) for values in found)
        return seen.sum() / count.clamp(min=1) + rest.mean(), right / count.clamp(min=1)
