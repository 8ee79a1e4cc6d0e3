"""Plans tried on batches of a user's data: how often the answer stays the same, and how far off it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import illava
from illava.evaluate.agreement import divergences
from illava.evaluate.forcing import Spoken, speak
from illava.evaluate.loading import Loaded
from illava.evaluate.prompts import batches, build_inputs, together
from illava.jobs import Item
from illava.plan import Plan
from illava.report import Report


@dataclass
class Batch:
    """A batch and what the unpatched model says to it.

    Attributes:
        inputs: of `generate`, on the host.
        items: how many.
        shown: the sizes of its pictures; `None` without any.
        answer: the unpatched model's.
        choices: `[items, n]` token it chose at each step.
        changed: answers that plans have changed so far.
    """

    inputs: dict[str, Any]
    items: int
    shown: Report | None
    answer: Spoken
    choices: Tensor
    changed: int = 0


@dataclass
class Tried:
    """How a plan did on the items it was tried on.

    Attributes:
        equal: of each item, whether the answer stayed the same.
        reports: of each batch.
    """

    equal: list[bool] = field(default_factory=list)
    reports: list[Report] = field(default_factory=list)

    @property
    def bound(self) -> float:
        """How many times fewer operations the plan needs, over all batches."""
        flops = [report.flops for report in self.reports]
        with_ = sum(f.vision.with_ + f.language.with_ for f in flops)
        return sum(f.vision.without + f.language.without for f in flops) / with_ if with_ else 1.0


class Trials:
    """Tries plans on data that the unpatched model has answered once.

    Args:
        loaded: an unpatched model with its processor.
        items: decoded.
        batch_size: items answered together, where the processor takes them so.
        max_new_tokens: longest answer.
    """

    def __init__(self, loaded: Loaded, items: Sequence[Item], batch_size: int, max_new_tokens: int) -> None:
        self._loaded, self._max_new_tokens = loaded, max_new_tokens
        groups = batches(items, batch_size)
        self.batches = [batch for group in groups for batch in together(self._batch, group)]
        self.items = sum(batch.items for batch in self.batches)

    def _batch(self, items: list[Item]) -> list[Batch]:
        inputs = build_inputs(self._loaded, items)
        # Only a merge knows how many visual tokens each picture becomes, in every family.
        shown = self._prefill(Plan(reduction=0.5), inputs)
        answer = speak(self._loaded, inputs, self._max_new_tokens)
        choices = torch.stack([scores.argmax(-1) for scores in answer.scores], dim=1)
        kept = Spoken(answer.ids, answer.lengths, [])  # distributions of all the data would not fit
        on_host = {name: x.cpu() for name, x in inputs.items()}
        return [Batch(on_host, len(items), shown, kept, choices)]

    def _prefill(self, plan: Plan, inputs: Mapping[str, Any]) -> Report | None:
        with illava.patch(self._loaded.model, plan=plan) as handle:
            speak(self._loaded, inputs, 1)
            return handle.report

    def on_device(self, batch: Batch) -> dict[str, Any]:
        """A batch's inputs where the model is."""
        return {name: x.to(self._loaded.device) for name, x in batch.inputs.items()}

    def merged(self, plan: Plan, batch: Batch) -> Report | None:
        """What a plan leaves of a batch's pictures; `None` if it removes nothing."""
        return self._prefill(plan, self.on_device(batch))

    def race(self, plan: Plan, allowed: int | None = None) -> Tried:
        """Try a plan, and stop where more than `allowed` answers have changed.

        Batches whose answers other plans have changed come first: they tell soonest.
        """
        tried = Tried()
        self.batches.sort(key=lambda batch: -batch.changed)
        for batch in self.batches:
            before = tried.equal.count(False)
            self._try(plan, batch, tried)
            batch.changed += tried.equal.count(False) - before
            if allowed is not None and tried.equal.count(False) > allowed:
                break
        return tried

    def divergence(self, plans: Iterable[Plan], batch: Batch) -> list[float]:
        """Mean divergence of each plan's next-token distributions on one batch, in nats."""
        inputs = self.on_device(batch)
        reference = speak(self._loaded, inputs, self._max_new_tokens, answer=batch.answer.ids)
        reference = Spoken(batch.answer.ids, batch.answer.lengths, reference.scores)
        found = []
        for plan in plans:
            with illava.patch(self._loaded.model, plan=plan):
                forced = speak(self._loaded, inputs, self._max_new_tokens, answer=batch.answer.ids)
            found.append(sum(divergences(reference, forced)) / max(1, sum(batch.answer.lengths)))
        return found

    def _try(self, plan: Plan, batch: Batch, tried: Tried) -> None:
        with illava.patch(self._loaded.model, plan=plan) as handle:
            forced = speak(self._loaded, self.on_device(batch), self._max_new_tokens, answer=batch.answer.ids)
            if handle.report is not None:
                tried.reports.append(handle.report)
        chosen = torch.stack([scores.argmax(-1) for scores in forced.scores], dim=1)  # [B, n]
        same = chosen == batch.choices
        tried.equal += [bool(same[row, :n].all()) for row, n in enumerate(batch.answer.lengths)]
