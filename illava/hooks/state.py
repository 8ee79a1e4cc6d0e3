"""What is known of the calls under way on one patched model."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor

from illava.families.seams import Seams
from illava.families.visual import VisualInput
from illava.flops import measure
from illava.language import LanguageCall
from illava.report import Report
from illava.schedule import ModelPlan
from illava.vision import EncoderRecord, VisionCall

_NUMBERS = itertools.count()
# Who encodes without ever asking the language model must not fill the memory.
ENCODER_CALLS_REMEMBERED = 1024
# Where embeddings that a model builds ahead of its decoder carry what is visual in them.
VISUAL_ATTRIBUTE = "_illava_visual"


class State:
    """One patched model's plan and parts, and a value per thread and task for what is under way.

    Attributes:
        fast_windows: whether every encoder block attends within all its spans in one call.
        number: tells one handle's merges from another's in a cache.
        last: the report of the last call that brought pictures.
        vision: the encoder call under way.
        left: encoder calls whose features are still on their way through projector and packing.
        encoded: encoder calls no report has told of yet.
        visual: which tokens of the coming language model call are visual.
        language: the language model call under way.
        recorded: hidden states and attention weights that the language model call put back at the
            caller's length.
        prompt: the caller's position where the prompt ends that `generate` is answering.
        joining: whether a method of the model's own is joining pictures and text right now.
    """

    def __init__(self, plan: ModelPlan, seams: Seams, family: Any, fast_windows: bool) -> None:
        self.plan, self.seams, self.family, self.fast_windows = plan, seams, family, fast_windows
        self.shape = measure(seams)
        self.number = next(_NUMBERS)
        self.last: Report | None = None
        self.vision: ContextVar[VisionCall | None] = ContextVar("illava_vision", default=None)
        self.left: ContextVar[tuple[VisionCall, ...]] = ContextVar("illava_left", default=())
        self.encoded: ContextVar[deque[EncoderRecord] | None] = ContextVar("illava_encoded", default=None)
        self.visual: ContextVar[VisualInput | None] = ContextVar("illava_visual", default=None)
        self.language: ContextVar[LanguageCall | None] = ContextVar("illava_language", default=None)
        self.recorded: ContextVar[dict[str, Any] | None] = ContextVar("illava_recorded", default=None)
        self.prompt: ContextVar[int | None] = ContextVar("illava_prompt", default=None)
        self.joining: ContextVar[bool] = ContextVar("illava_joining", default=False)

    def block_attends(self, number: int) -> bool:
        """Whether encoder block `number` is attending and about to merge."""
        call = self.vision.get()
        return call is not None and call.attending == number

    def layer_attends(self, number: int) -> bool:
        """Whether decoder layer `number` is attending and its attention is wanted for a merge."""
        call = self.language.get()
        return call is not None and call.attending == number

    def remember(self, record: EncoderRecord) -> None:
        """Keep an encoder call for the next report."""
        encoded = self.encoded.get()
        if encoded is None:
            self.encoded.set(encoded := deque(maxlen=ENCODER_CALLS_REMEMBERED))
        encoded.append(record)

    @contextmanager
    def announced(self, visual: VisualInput | None) -> Iterator[None]:
        """The language model calls inside begin with one whose visual tokens are these."""
        self.visual.set(visual)
        try:
            yield
        finally:
            self.visual.set(None)

    @contextmanager
    def answering(self, prompt: int | None) -> Iterator[None]:
        """The language model calls inside belong to one `generate`, whose prompt ends at this position."""
        outer = self.prompt.get()
        self.prompt.set(prompt)
        try:
            yield
        finally:
            self.prompt.set(outer)

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """The encoder calls inside belong to one projector call."""
        self.left.set(())
        self.joining.set(True)
        try:
            yield
        finally:
            self.joining.set(False)
            self.left.set(())

    def mark(self, embeds: Tensor, visual: VisualInput | None) -> None:
        """Let embeddings say themselves which of them are visual, wherever they are used."""
        setattr(embeds, VISUAL_ATTRIBUTE, (self, visual, self.encoded.get()))
        self.encoded.set(None)

    def take_mark(self, embeds: Tensor | None) -> VisualInput | None:
        """What `mark` left on embeddings; other handles' marks count for nothing."""
        owner, visual, encoded = getattr(embeds, VISUAL_ATTRIBUTE, (None, None, None))
        if owner is not self:
            return None
        self.encoded.set(encoded)
        return visual
