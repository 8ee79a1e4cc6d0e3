"""What the encoder is taught beside the answers: to name what each visual token looks at.

Real encoders are trained on pictures before they meet a language model. Here a linear layer on the visual
tokens learns which digit or shape and which colour stands in each unit, and which characters; it teaches the
encoder to see within minutes, where answers alone take hours, and is left out of the checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from readers import canvas, material

NAMES = 1 + len(material.NUMBERS) + len(material.SHAPES)
COLOURS = 1 + len(material.COLOURS)
CHARACTERS = 1 + len(canvas.CHARACTERS)


class Sight(nn.Module):
    """A linear layer from visual tokens `[n, width]` to what they show, listening at a model's encoder."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.sizes = [NAMES, COLOURS, *[CHARACTERS] * canvas.SLOTS]
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
        # Of as much weight: what a thing is, its colour, and characters, of which a picture has few.
        losses, right, count = [], 0, 0
        things, colours, characters = labels[:, 0], labels[:, 1], labels[:, 2:].T.flatten()
        # Logits of all slots as one: [slots · visual tokens, characters].
        named = ((parts[0], things), (parts[1], colours), (torch.cat(parts[2:]), characters))
        for logits, target in named:
            each = nn.functional.cross_entropy(logits, target, reduction="none")  # [visual tokens · slots]
            there = target > 0
            # As much weight on what is there as on all the rest, which is most of a picture.
            losses.append(each[there].sum() / there.sum().clamp(min=1) + each[~there].mean())
            right = right + ((logits.argmax(-1) == target) & there).sum()
            count = count + there.sum()
        return torch.stack(losses).mean(), right / count.clamp(min=1)
