"""One model that answers one question at a time, patched or not, and says what each answer cost."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer
from transformers.video_utils import VideoMetadata

from illava.demo.media import Clip, Picture
from illava.errors import DemoError
from illava.families import family_of
from illava.generation import GREEDY, cache_bytes, processed
from illava.memory import is_memory
from illava.patching import patch
from illava.plan import Plan
from illava.report import Report


@dataclass(frozen=True)
class Answer:
    """An answer as far as it has come.

    Attributes:
        text: what has been said.
        tokens: how many tokens that took, the end of the answer included.
        first_seconds: to the first token, from the start of the encoder; `None` before it.
        later_seconds: from the first token to the last one.
        cache_bytes: keys and values held when the answer ended.
        peak_bytes: the most memory taken on top of the weights; `None` where only CUDA can tell.
        report: what illava did; `None` on the unpatched side and before the end.
        done: whether this is all.
    """

    text: str = ""
    tokens: int = 0
    first_seconds: float | None = None
    later_seconds: float = 0.0
    cache_bytes: int = 0
    peak_bytes: int | None = None
    report: Report | None = None
    done: bool = False

    @property
    def tokens_per_second(self) -> float | None:
        """After the first token; `None` before the second."""
        return (self.tokens - 1) / self.later_seconds if self.tokens > 1 and self.later_seconds > 0 else None


@dataclass(frozen=True)
class Prompt:
    """What the model is shown and asked: pictures and clips in their order, then the question."""

    shown: Sequence[Picture | Clip]
    question: str


class Asker:
    """Holds the model. Everything that touches it runs in one thread, one question after the other.

    That is what keeps users apart, and what makes times comparable: an answer never shares the machine
    with another one. Patching and removing happen in that thread, too, so each answer finds the model as
    its own plan wants it.
    """

    def __init__(self, model: Any, processor: Any, name: str) -> None:
        self.model, self.processor, self.name = model, processor, name
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="illava-demo")
        self._closing = threading.Event()
        with patch(model) as handle:
            self.default = handle.plan
        self.settle = family_of(model.config.model_type, type(model).__name__).find_seams(model).settle

    def warm_up(self, prompt: Prompt) -> None:
        """Answer once on both sides, so that the first user's times are not those of a cold start."""
        for plan in (None, Plan()):
            for _ in self.ask(prompt, plan, answer_tokens=2, stop=threading.Event()):
                pass

    def close(self) -> None:
        """Answer nothing any more; what is under way ends after its next token."""
        self._closing.set()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def ask(
        self, prompt: Prompt, plan: Plan | None, *, answer_tokens: int, stop: threading.Event
    ) -> Iterator[Answer]:
        """The answer as it grows; the last one is `done` and knows its cost.

        Args:
            plan: `None` for the unpatched model.
            answer_tokens: its length at most.
            stop: set it, or close this iterator, to end the answer after the token under way.

        Raises:
            IllavaError: a plan, prompt or picture that the model cannot take.
        """
        said: queue.SimpleQueue[Answer | None] = queue.SimpleQueue()
        running = self._thread.submit(self._answer, prompt, plan, answer_tokens, stop, said)
        running.add_done_callback(lambda _: said.put(None))
        try:
            while (answer := said.get()) is not None:
                yield answer
        except GeneratorExit:
            stop.set()
            running.cancel()
            raise
        yield running.result()

    @torch.inference_mode()
    def _answer(
        self,
        prompt: Prompt,
        plan: Plan | None,
        answer_tokens: int,
        stop: threading.Event,
        said: queue.SimpleQueue[Answer | None],
    ) -> Answer:
        inputs = self._inputs(prompt)
        on_cuda = self.model.device.type == "cuda"
        try:
            with nullcontext() if plan is None else patch(self.model, plan=plan):
                if on_cuda:
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                tap = _Tap(self.processor.tokenizer, said)
                stopping = StoppingCriteriaList([_Stopped(stop, self._closing)])
                output = self._generate(inputs, answer_tokens, streamer=tap, stopping_criteria=stopping)
            answer = replace(
                tap.answer,
                cache_bytes=cache_bytes(output.past_key_values),
                peak_bytes=torch.cuda.max_memory_allocated() - before if on_cuda else None,
            )
            del output
            if plan is not None and not (stop.is_set() or self._closing.is_set()):
                # Again, for where tokens went: writing that down takes time, which the answer is spared.
                with patch(self.model, plan=plan, trace=True) as handle:
                    self._generate(inputs, 1)
                    answer = replace(answer, report=handle.report)
        except (MemoryError, RuntimeError) as error:
            if not is_memory(error):
                raise
            raise DemoError(
                "the model ran out of memory; bring smaller or fewer pictures, or raise the reduction"
            ) from error
        return replace(answer, done=True)

    def _generate(self, inputs: dict[str, Any], answer_tokens: int, **options: Any) -> Any:
        """Greedy, so that both sides can be compared."""
        return self.model.generate(
            **inputs, **GREEDY, max_new_tokens=answer_tokens, return_dict_in_generate=True, **options
        )

    def _inputs(self, prompt: Prompt) -> dict[str, Any]:
        """What the processor makes of a prompt, where the model is and as it computes."""
        clips = [x for x in prompt.shown if isinstance(x, Clip)]
        if clips and getattr(self.processor, "video_processor", None) is None:
            raise DemoError(f"{self.name} takes pictures only; remove {clips[0].name}")
        content = [{"type": "video" if isinstance(x, Clip) else "image"} for x in prompt.shown]
        content.append({"type": "text", "text": prompt.question})
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        images = [x.image for x in prompt.shown if isinstance(x, Picture)]
        return processed(self.model, self.processor, [text], [images], [_timed(clip) for clip in clips])


def _timed(clip: Clip) -> tuple[Any, VideoMetadata]:
    """A clip as `illava.jobs.pictures.read_clip` gives it."""
    count = len(clip.frames)
    return clip.frames, VideoMetadata(count, fps=clip.fps, frames_indices=list(range(count)))


class _Tap(TextStreamer):
    """Hands on each piece of text as it comes, with the time it took."""

    def __init__(self, tokenizer: Any, said: queue.SimpleQueue[Answer | None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.answer, self._said = Answer(), said
        self._start = time.perf_counter()

    def put(self, value: Tensor) -> None:
        """The prompt first, then one token at a time; on CUDA already waited for."""
        if not self.next_tokens_are_prompt:
            seconds, before = time.perf_counter() - self._start, self.answer
            first = seconds if before.first_seconds is None else before.first_seconds
            self.answer = replace(
                before,
                tokens=before.tokens + value.numel(),
                first_seconds=first,
                later_seconds=seconds - first,
            )
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Text that further tokens will not change."""
        self.answer = replace(self.answer, text=self.answer.text + text)
        self._said.put(self.answer)


class _Stopped(StoppingCriteria):
    """Ends an answer nobody waits for any more."""

    def __init__(self, *stops: threading.Event) -> None:
        self._stops = stops

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        stopped = any(stop.is_set() for stop in self._stops)
        return torch.full((len(input_ids),), stopped, device=input_ids.device)
