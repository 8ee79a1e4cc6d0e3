"""What is known of the calls under way on one patched model."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary, ref

from torch import Tensor

from illava.attention import Choices
from illava.errors import AlreadyPatchedError
from illava.families.seams import Seams
from illava.families.visual import VisualInput
from illava.flops import measure
from illava.hooks import under_way
from illava.language import LanguageCall
from illava.report import Report
from illava.schedule import ModelPlan
from illava.vision import EncoderRecord, VisionCall

_NUMBERS = itertools.count()
# Who encodes without ever asking the language model must not fill the memory.
ENCODER_CALLS_REMEMBERED = 1024
# Where embeddings that a model builds ahead of its decoder carry what is visual in them.
VISUAL_ATTRIBUTE = "_illava_visual"


T = TypeVar("T")
# One variable for all patched models, as a context never lets go of a variable it has seen. What it holds
# is replaced, not changed: tasks begin with what their parent had.
_SLOTS: ContextVar[WeakKeyDictionary[Slot, Any] | None] = ContextVar("illava", default=None)


class Slot(Generic[T]):
    """A value per thread and task, let go of with its owner at the latest."""

    def __init__(self, default: T) -> None:
        self._default = default

    def get(self) -> T:
        held = _SLOTS.get()
        return self._default if held is None else held.get(self, self._default)

    def set(self, value: T) -> None:
        before = _SLOTS.get()
        if value is self._default and (before is None or self not in before):
            return
        held = WeakKeyDictionary() if before is None else before.copy()
        if value is self._default:
            del held[self]
        else:
            held[self] = value
        _SLOTS.set(held)

    def clear(self) -> None:
        self.set(self._default)


class OfOneModel:
    """Part of a patched model that no copy may take along: it would go on working for the original."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise AlreadyPatchedError(
            "a patched model cannot be copied or pickled, nor can its modules, since illava's hooks would go "
            "on working for the original; call handle.remove(), copy, and patch both (save_pretrained and "
            "state_dict work as they are)"
        )


@dataclass(frozen=True)
class Asked:
    """The caller's position where the prompt ends that a `generate` under way is answering."""

    end: int | None


class State(OfOneModel):
    """One patched model's plan and parts, and a value per thread and task for what is under way.

    Attributes:
        fast_windows: whether every encoder block attends within all its spans in one call.
        trace: whether calls write down where every token came from.
        choices: how attention statistics are computed.
        number: tells one handle's merges from another's in a cache.
        last: the report of the last call that brought pictures.
        vision: the encoder call under way.
        left: encoder calls whose features are still on their way through projector and packing.
        encoded: encoder calls no report has told of yet.
        visual: which tokens of the coming language model call are visual.
        language: the language model call under way.
        recorded: hidden states and attention weights that the language model call put back at the
            caller's length.
        prompt: what `generate` is answering, as long as it does.
        joining: whether a method of the model's own is joining pictures and text right now.
    """

    def __init__(self, plan: ModelPlan, seams: Seams, family: Any, fast_windows: bool, trace: bool) -> None:
        self.plan, self.seams, self.family, self.fast_windows = plan, seams, family, fast_windows
        self.trace = trace
        self.model_type = str(getattr(seams.model.config, "model_type", "unknown"))
        self.shape = measure(seams)
        self.number = next(_NUMBERS)
        self.choices = Choices()
        self.last: Report | None = None
        self.vision: Slot[VisionCall | None] = Slot(None)
        self.left: Slot[tuple[VisionCall, ...]] = Slot(())
        self.encoded: Slot[deque[EncoderRecord] | None] = Slot(None)
        self.visual: Slot[VisualInput | None] = Slot(None)
        self.language: Slot[LanguageCall | None] = Slot(None)
        self.recorded: Slot[dict[str, Any] | None] = Slot(None)
        self.prompt: Slot[ref[Asked] | None] = Slot(None)
        self.joining: Slot[bool] = Slot(False)

    def forget(self) -> None:
        """Let go of what an interrupted call has left in this thread."""
        self.end_vision()
        self.end_language()
        for slot in vars(self).values():
            if isinstance(slot, Slot):
                slot.clear()

    def begin_vision(self, call: VisionCall) -> None:
        self.vision.set(call)
        under_way.VISION.enter(call)

    def begin_language(self, call: LanguageCall) -> None:
        self.language.set(call)
        under_way.LANGUAGE.enter(call)

    def end_vision(self) -> VisionCall | None:
        """The encoder call under way is over, or was interrupted: hooks know of none from here on."""
        call = self.vision.get()
        self.vision.set(None)
        if call is not None:
            under_way.VISION.leave(call)
        return call

    def end_language(self) -> LanguageCall | None:
        """The same for the language model; no cache waits any longer for what did not come."""
        call = self.language.get()
        self.language.set(None)
        if call is not None:
            under_way.LANGUAGE.leave(call)
            call.layers.end()
        return call

    def block_attends(self, number: int) -> bool:
        """Whether encoder block `number` is attending and about to merge."""
        call = under_way.VISION.of(self.number)
        return call is not None and call.attending == number

    def layer_attends(self, number: int) -> bool:
        """Whether decoder layer `number` is attending and its attention is wanted for a merge."""
        call = under_way.LANGUAGE.of(self.number)
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

    @property
    def prompt_end(self) -> int | None:
        """Where the prompt ends that `generate` is answering; `None` outside of it."""
        held = self.prompt.get()
        asked = None if held is None else held()
        return None if asked is None else asked.end

    @contextmanager
    def answering(self, prompt: int | None) -> Iterator[None]:
        """The language model calls inside belong to one `generate`, whose prompt ends at this position."""
        outer = self.prompt.get()
        if outer is not None and outer() is None:
            outer = None  # of a call that was interrupted while it took this back
        asked = Asked(prompt)
        self.prompt.set(ref(asked))
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
