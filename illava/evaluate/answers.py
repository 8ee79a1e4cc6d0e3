"""Answers of a model, patched or not, one by one as they come or side by side."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import TextStreamer

import illava
from illava.errors import OutOfMemoryError
from illava.evaluate.loading import Loaded, load
from illava.evaluate.prompts import build_inputs, decoded
from illava.evaluate.speed import Bench, bench
from illava.generation import GREEDY, answer_lengths, padding_of, tokenizer_of
from illava.jobs import Item
from illava.memory import first_that_fits, unless_out_of_memory
from illava.plan import DEFAULT_REDUCTION, Plan
from illava.report import Report

# Reductions that are tried, one after the other, when a prompt does not fit.
STRONGER = (0.667, 0.778, 0.889, 0.95)


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: without special tokens.
        new_tokens: of the answer, its end included.
        seconds: from the inputs to its end.
        report: what illava did; `None` of the unpatched model, and of a plan that removes nothing.
    """

    text: str
    new_tokens: int
    seconds: float
    report: Report | None

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        merged = self.report
        tokens = None if merged is None else {"before": merged.tokens, "after": merged.final_tokens}
        return {
            "answer": self.text,
            "new_tokens": self.new_tokens,
            "seconds": round(self.seconds, 4),
            "visual_tokens": tokens,
            "speedup_bound": None if merged is None else merged.flops.speedup_bound,
        }


@dataclass(frozen=True)
class Comparison:
    """An answer of the unpatched model beside the patched model's, and how long they took in turns."""

    unpatched: Answer
    patched: Answer
    speed: Bench

    @property
    def equal(self) -> bool:
        """Whether both said the same."""
        return self.unpatched.text == self.patched.text

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "unpatched": self.unpatched.to_dict(),
            "patched": self.patched.to_dict(),
            "equal": self.equal,
            "speed": self.speed.to_dict(),
        }


def answer(
    loaded: Loaded,
    item: Item,
    plan: Plan | None = None,
    *,
    max_new_tokens: int = 256,
    on_text: Callable[[str], None] | None = None,
) -> Answer:
    """Ask a model about an item, greedily.

    Args:
        loaded: an unpatched model with its processor.
        item: its pictures are read here if they are not yet.
        plan: `None` to leave the model unpatched.
        max_new_tokens: longest answer.
        on_text: hears the answer piece by piece while it is generated.

    Raises:
        DataError: a picture that cannot be read, or that the processor refuses.
        PlanError: a plan this model cannot carry out.
        OutOfMemoryError: the prompt does not fit; says under which plan it would.
    """
    inputs = build_inputs(loaded, [item])
    said = unless_out_of_memory(lambda: _generate(loaded, inputs, plan, max_new_tokens, on_text))
    if said is None:
        raise OutOfMemoryError(what_fits(loaded, inputs, plan))
    return said[0]


def what_fits(loaded: Loaded, inputs: dict[str, Any], plan: Plan | None) -> str:
    """Says under which stronger plan a prompt fits that did not, by trying them.

    Tried are stronger reductions of the plan itself; where its budget is another one, and where there is no
    plan, those of the default plan.
    """
    asked, base = 0.0, Plan()
    how = "under illava.Plan(reduction={0:.3f}), which is --reduction {0:.3f} alone, the prompt fits"
    if plan is not None and plan.budget == "reduction":
        asked, base = DEFAULT_REDUCTION if plan.reduction is None else plan.reduction, plan
        how = "with reduction {0:.3f} in the same plan the prompt fits"
    stronger = [r for r in STRONGER if r > asked + 1e-3]
    fits = first_that_fits(
        (how.format(r), partial(_generate, loaded, inputs, replace(base, reduction=r), 1, None))
        for r in stronger
    )
    length = inputs["input_ids"].shape[1]
    name = "the unpatched model" if plan is None else "this plan"
    most = max(stronger, default=asked)
    remedy = fits or f"it does not fit at reduction {most:.3f} either: give smaller or fewer pictures"
    return f"{name} ran out of memory on a prompt of {length:,} tokens; {remedy}"


def compare(
    loaded: Loaded,
    item: Item,
    plan: Plan,
    *,
    max_new_tokens: int = 256,
    rounds: int = 3,
    progress: Callable[[str], None] = lambda what: None,
) -> Comparison:
    """Ask the unpatched and the patched model the same, and time both in turns; arguments as `answer`'s.

    Raises:
        DataError, PlanError, OutOfMemoryError: as `answer`.
    """
    item = decoded(item)
    progress("answering: unpatched")
    try:
        plain = answer(loaded, item, max_new_tokens=max_new_tokens)
    except OutOfMemoryError as error:
        raise OutOfMemoryError(f"nothing to compare with; ask without comparing: {error}") from error
    progress("answering: patched")
    merged = answer(loaded, item, plan, max_new_tokens=max_new_tokens)
    inputs = build_inputs(loaded, [item])
    return Comparison(
        plain, merged, bench(loaded, [inputs], {"patched": plan}, rounds=rounds, progress=progress)
    )


class AnswerWork:
    """The work of a job that answers: see `illava.jobs.run`."""

    def __init__(self, loaded: Loaded, plan: Plan | None, max_new_tokens: int) -> None:
        self.loaded, self.max_new_tokens, self.plan = loaded, max_new_tokens, plan

    def __call__(self, items: list[Item]) -> list[dict[str, Any]]:
        inputs = build_inputs(self.loaded, items)
        answers = _generate(self.loaded, inputs, self.plan, self.max_new_tokens, None)
        return [
            {"prompt": item.prompt, "answer": said.text, "new_tokens": said.new_tokens}
            for item, said in zip(items, answers, strict=True)
        ]

    @classmethod
    def factory(
        cls, name: str, plan: Plan | None, *, max_new_tokens: int, **loading: Any
    ) -> Callable[[], AnswerWork]:
        """Makes the work once in every process, its model loaded by `load(name, **loading)`."""
        return partial(_make, name, plan, max_new_tokens, loading)


def _make(name: str, plan: Plan | None, max_new_tokens: int, loading: dict[str, Any]) -> AnswerWork:
    return AnswerWork(load(name, **loading), plan, max_new_tokens)


class _Streamer(TextStreamer):
    """Hands finished pieces of text on."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._on_text(text)


@torch.inference_mode()
def _generate(
    loaded: Loaded,
    inputs: dict[str, Any],
    plan: Plan | None,
    max_new_tokens: int,
    on_text: Callable[[str], None] | None,
) -> list[Answer]:
    """Answers of a batch."""
    model = loaded.model
    tokenizer = tokenizer_of(loaded.processor)
    streamer = None if on_text is None else _Streamer(tokenizer, on_text)
    with contextlib.nullcontext() if plan is None else illava.patch(model, plan=plan) as handle:
        start = time.perf_counter()
        ids = model.generate(
            **inputs,
            **GREEDY,
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            pad_token_id=padding_of(model, loaded.processor),
        )
        new = ids[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(new.cpu(), skip_special_tokens=True)
        seconds = time.perf_counter() - start
        report = None if handle is None else handle.report
    lengths = answer_lengths(model, new)
    return [Answer(t.strip(), n, seconds, report) for t, n in zip(texts, lengths, strict=True)]
