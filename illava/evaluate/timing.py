"""One call of a model, patched or not, measured: stages, memory, cache, decoding.

Stages are told apart by hooks of our own around the encoder and the language model, in front of illava's
on the way in and behind them on the way out, so that what illava does counts for the stage it does it in.
On CUDA every mark is an event on the stream, waited for after the call alone.
"""

from __future__ import annotations

import gc
import inspect
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from illava.families import family_of
from illava.families.seams import Seams
from illava.generation import GREEDY, cache_bytes


class Clock:
    """Marks in time, on the device's own clock where it has one."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")

    def mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def ms(self, start: Any, end: Any) -> float:
        """Between two marks that have passed."""
        return start.elapsed_time(end) if self.cuda else 1e3 * (end - start)


@dataclass
class Marks:
    """When one call passed its seams: entry and exit of the encoder, of every language model call."""

    encoder_in: Any = None
    encoder_out: Any = None
    language_in: list[Any] = field(default_factory=list)
    language_out: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Prefill:
    """One prefill.

    Attributes:
        encoder_ms: encoder and projector.
        llm_ms: decoder layers, and the head for the last token.
        ttft_ms: from pixels on the device to the first token's number on the host.
        kv_bytes: keys and values in the cache afterwards.
    """

    encoder_ms: float
    llm_ms: float
    ttft_ms: float
    kv_bytes: int


@dataclass(frozen=True)
class Decoding:
    """One `generate`: tokens of all rows per second at each step, requests per second."""

    tokens_per_s: list[float]
    requests_per_s: float


@dataclass(frozen=True)
class Peak:
    """Memory of one prefill in bytes: the model and its inputs before it; at most, up to the language
    model and in it."""

    base: int
    encoder: int
    llm: int

    @property
    def total(self) -> int:
        return max(self.encoder, self.llm)


class Side:
    """A model with what it is shown, on the model's device.

    Args:
        model: a supported one, patched or not; it may be patched and unpatched between measurements.
        inputs: what `generate` takes.
        pad_token: what `generate` fills ended answers up with; by default the model's own.
    """

    def __init__(self, model: Any, inputs: Mapping[str, Any], *, pad_token: int | None = None) -> None:
        self.model, self.inputs, self.clock = model, inputs, Clock(str(model.device))
        self.rows = len(inputs["input_ids"])
        self.seams: Seams = family_of(model.config.model_type, type(model).__name__).find_seams(model)
        self._keeps = "logits_to_keep" in inspect.signature(type(model).forward).parameters
        self._pad_token = model.generation_config.pad_token_id if pad_token is None else pad_token

    @torch.inference_mode()
    def prefill(self) -> Prefill:
        gc.collect()
        self.clock.wait()
        with self._marked() as marks:
            start = self.clock.mark()
            output = self._call()
            done = self.clock.mark()
            output.logits[:, -1].argmax(dim=-1).cpu()
            end = self.clock.mark()
        self.clock.wait()
        return Prefill(
            encoder_ms=self.clock.ms(marks.encoder_in, marks.encoder_out),
            llm_ms=self.clock.ms(marks.language_in[0], done),
            ttft_ms=self.clock.ms(start, end),
            kv_bytes=cache_bytes(output.past_key_values),
        )

    @torch.inference_mode()
    def decode(self, new_tokens: int) -> Decoding:
        """`generate` of exactly so many tokens, greedily."""
        gc.collect()
        self.clock.wait()
        with self._marked() as marks:
            start = self.clock.mark()
            self.model.generate(
                **self.inputs,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                **GREEDY,
                pad_token_id=self._pad_token,
            )
            end = self.clock.mark()
        self.clock.wait()
        steps = [
            self.clock.ms(a, b)
            for a, b in zip(marks.language_out, marks.language_out[1:], strict=False)
        ]  # fmt: skip
        rows = self.rows
        return Decoding([1e3 * rows / s for s in steps], 1e3 * rows / self.clock.ms(start, end))

    @torch.inference_mode()
    def peak(self) -> Peak | None:
        """Memory of one prefill; `None` where nobody counts it."""
        if not self.clock.cuda:
            return None
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        own = {x.data_ptr(): x.nbytes for x in (*self.model.parameters(), *self.model.buffers())}
        base = sum(own.values()) + sum(x.nbytes for x in self.inputs.values() if isinstance(x, torch.Tensor))
        others = torch.cuda.memory_allocated() - base  # such as the smaller model of the family
        encoder = [0]

        def enter_language(*_: Any) -> None:
            encoder[0] = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()

        hook = self.seams.language_model.register_forward_pre_hook(enter_language, prepend=True)
        try:
            output = self._call()
            del output
        finally:
            hook.remove()
        return Peak(base, encoder[0] - others, torch.cuda.max_memory_allocated() - others)

    def _call(self) -> Any:
        options = {"logits_to_keep": 1} if self._keeps else {}
        return self.model(**self.inputs, **options, use_cache=True)

    @contextmanager
    def _marked(self) -> Iterator[Marks]:
        marks, seams = Marks(), self.seams

        def enter_encoder(*_: Any) -> None:
            if marks.encoder_in is None:
                marks.encoder_in = self.clock.mark()

        def leave_encoder(*_: Any) -> None:
            marks.encoder_out = self.clock.mark()

        def enter_language(*_: Any) -> None:
            marks.language_in.append(self.clock.mark())

        def leave_language(*_: Any) -> None:
            marks.language_out.append(self.clock.mark())

        ends: list[nn.Module] = [seams.tower, *(p.module for p in seams.projectors)]
        hooks = [seams.tower.register_forward_pre_hook(enter_encoder, prepend=True)]
        hooks += [module.register_forward_hook(leave_encoder) for module in ends]
        hooks.append(seams.language_model.register_forward_pre_hook(enter_language, prepend=True))
        hooks.append(seams.language_model.register_forward_hook(leave_language))
        try:
            yield marks
        finally:
            for hook in hooks:
                hook.remove()
