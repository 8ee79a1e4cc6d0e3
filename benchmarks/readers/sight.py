"""What the encoder is taught beside the answers: to name what each visual token looks at.

Real encoders are trained on pictures before they meet a language model. Here a linear layer on the visual
tokens learns what stands in each unit (a digit, a shape, writing) and in which colour, what stands beside it,
where its middle is, which characters of a string at which places, how many things are like it, and how many
of each colour and form there are. It teaches the encoder to see within minutes, where answers alone take
hours, and is left out of the checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from readers import canvas, material

NAMES = 1 + canvas.WRITING
COLOURS = 1 + len(material.COLOURS)
CHARACTERS = 1 + len(canvas.CHARACTERS)
# Columns of the labels that weigh as one, and how many values each has.
GROUPS = (
    (slice(canvas.NAME, canvas.NAME + 1), NAMES), (slice(canvas.COLOUR, canvas.COLOUR + 1), COLOURS),
    (canvas.BESIDE, canvas.WRITING), (slice(canvas.MIDDLE, canvas.MIDDLE + 1), 2),
    (canvas.SPELLED, CHARACTERS), (canvas.ALIKE, len(material.NUMBERS)),
    (canvas.TALLY, len(material.NUMBERS)),
)  # fmt: skip


class Sight(nn.Module):
    """A linear layer from visual tokens `[n, width]` to what they show, listening at a model's encoder."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.sizes = [values * (columns.stop - columns.start) for columns, values in GROUPS]
        self.head = nn.Linear(model.config.text_config.hidden_size, sum(self.sizes))
        core = model.model
        source = core.visual if hasattr(core, "visual") else core.multi_modal_projector
        source.register_forward_hook(self._listen)
        self._heard: Tensor | None = None

    def _listen(self, module, inputs, output) -> None:
        output = getattr(output, "pooler_output", output)
        self._heard = output.flatten(0, -2)  # [visual tokens, width]

    def forward(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss on the tokens of the last call, and the share of what is there that is named rightly.

        Args:
            labels: `[visual tokens, LABELS]`.
        """
        heard, self._heard = self._heard, None
        parts = self.head(heard.float()).split(self.sizes, dim=-1)
        losses, right, count = [], 0, 0
        for logits, (columns, values) in zip(parts, GROUPS, strict=True):
            target = labels[:, columns].flatten()  # [visual tokens · columns]
            logits = logits.unflatten(-1, (-1, values)).flatten(0, 1)  # [visual tokens · columns, values]
            each = nn.functional.cross_entropy(
                logits, target, reduction="none", ignore_index=canvas.NOT_ASKED
            )
            there, nothing = target > 0, target == 0
            # As much weight on what is there as on all the rest, which is most of a picture.
            losses += [each[some].sum() / some.sum().clamp(min=1) for some in (there, nothing)]
            right = right + ((logits.argmax(-1) == target) & there).sum()
            count = count + there.sum()
        return torch.stack(losses).sum() / len(GROUPS), right / count.clamp(min=1)
