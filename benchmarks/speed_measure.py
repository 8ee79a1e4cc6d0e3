"""One call of one arm, measured as users measure theirs, and illava's own share of it."""

from __future__ import annotations

from typing import Any

import torch
from speed_inputs import Batch
from speed_ranges import Ranges

from illava.evaluate.synthetic import FIRST_TEXT
from illava.evaluate.timing import Decoding, Peak, Prefill
from illava.evaluate.timing import Side as TimedSide

__all__ = ["Decoding", "Peak", "Prefill", "Side"]


class Side(TimedSide):
    """A model with what it is shown.

    Args:
        model: unpatched.
        batch: its inputs.
        device: where both are.
    """

    def __init__(self, model: Any, batch: Batch, device: str) -> None:
        super().__init__(model, batch.inputs, pad_token=FIRST_TEXT)
        self.batch = batch

    @torch.inference_mode()
    def own_share(self) -> float:
        """Share of a prefill that passes inside illava's own code."""
        self.clock.wait()
        ranges = Ranges(self.clock)
        start = self.clock.mark()
        ranges.listening = True
        self._call()
        ranges.listening = False
        end = self.clock.mark()
        self.clock.wait()
        return ranges.ms() / self.clock.ms(start, end)
