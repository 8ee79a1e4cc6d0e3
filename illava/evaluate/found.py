"""What a search for a plan found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from illava.evaluate.speed import Bench
from illava.evaluate.statistics import Estimate
from illava.plan import Plan

# What the timed rows of `Found.speed` are called.
DEFAULT, BEST = "the default", "this plan"


@dataclass(frozen=True)
class Choice:
    """A plan and how it did.

    Attributes:
        plan: as `illava.patch` takes it.
        agreement: share of the answers that stay the same, with Wilson's 95 % interval.
        bound: how many times fewer operations its prefill needs on this data.
        final_tokens: visual tokens left of the largest prompt.
    """

    plan: Plan
    agreement: Estimate
    bound: float
    final_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "plan": self.plan.to_dict(),
            "agreement": self.agreement.to_dict(),
            "bound": self.bound,
            "final_tokens": self.final_tokens,
        }


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        best: the plan.
        default: the default plan at equal agreement, where agreement was asked for: the strongest
            reduction that holds; `None` if none does.
        as_strong: the default plan at the best plan's reduction, where agreement was asked for.
        largest: visual tokens of the largest prompt.
        tried: how many plans were run.
        items: answers that the agreement is counted on.
        unseen: whether these had no part in the search; too little data is not halved.
        interrupted: whether there was more to try or to time.
        speed: the unpatched model, `default` and `best`, timed in turns.
    """

    best: Choice
    default: Choice | None
    as_strong: Choice | None
    largest: int
    tried: int
    items: int
    unseen: bool
    interrupted: bool = False
    speed: Bench | None = None

    @property
    def faster_than_default(self) -> float | None:
        """How many times sooner the first token comes than under `default`.

        Both were timed in turns with the unpatched model, and each stands by its ratio to that model in
        the same rounds: so a machine that is busy now and then slows both sides.
        """
        rows = {row.name: row.figures.get("ttft_ms") for row in (self.speed.rows if self.speed else ())}
        ratios = [figure.ratio for name in (BEST, DEFAULT) if (figure := rows.get(name)) is not None]
        if len(ratios) < 2 or ratios[0] is None or ratios[1] is None:
            return None
        return ratios[0].value / ratios[1].value

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "best": self.best.to_dict(),
            "default": None if self.default is None else self.default.to_dict(),
            "default_as_strong": None if self.as_strong is None else self.as_strong.to_dict(),
            "faster_than_default": self.faster_than_default,
            "tried": self.tried,
            "items": self.items,
            "unseen": self.unseen,
            "interrupted": self.interrupted,
            "speed": None if self.speed is None else self.speed.to_dict(),
        }


def describe(plan: Plan) -> str:
    """A plan as Python, without what is left at its default."""
    default = Plan()
    said = {n: getattr(plan, n) for n in Plan.__dataclass_fields__ if getattr(plan, n) != getattr(default, n)}
    return f"illava.Plan({', '.join(f'{name}={value!r}' for name, value in said.items())})"
