"""How near a patched model's answers are to the unpatched model's: item by item, and all together."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from illava.evaluate.forcing import Spoken
from illava.evaluate.statistics import Estimate, mean_of_items, share

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """An answer without capitals, punctuation, articles and spare spaces, as VQA scores them."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


@dataclass(frozen=True)
class Held:
    """One answer of a patched model, held against the unpatched model's.

    Attributes:
        unpatched, patched: the answers.
        tokens: of the unpatched answer, its end included.
        equal_tokens: of those, how many the patched model would have chosen as well, each after the
            unpatched model's beginning (teacher forcing).
        kl_sum: over those tokens, of KL(unpatched || patched) between next-token distributions, in nats.
    """

    unpatched: str
    patched: str
    tokens: int
    equal_tokens: int
    kl_sum: float

    @property
    def exact(self) -> bool:
        """The same answer, character by character."""
        return self.unpatched == self.patched

    @property
    def normalised(self) -> bool:
        """The same answer but for capitals, punctuation, articles and spaces."""
        return normalised(self.unpatched) == normalised(self.patched)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, `from_dict` reads them back."""
        return {
            "answer": self.patched,
            "exact": self.exact,
            "normalised": self.normalised,
            "tokens": self.tokens,
            "equal_tokens": self.equal_tokens,
            "kl_sum": self.kl_sum,
        }

    @classmethod
    def from_dict(cls, unpatched: str, values: Mapping[str, Any]) -> Held:
        """Of the unpatched answer and what `to_dict` gave.

        Raises:
            ValueError: it gave no such thing.
        """
        if not isinstance(values, Mapping) or not isinstance(values.get("answer"), str):
            raise ValueError("a plan without its answer")
        tokens, equal, kl = (values.get(name) for name in ("tokens", "equal_tokens", "kl_sum"))
        if not (isinstance(tokens, int) and isinstance(equal, int) and isinstance(kl, (int, float))):
            raise ValueError(f"tokens={tokens!r}, equal_tokens={equal!r}, kl_sum={kl!r} of a plan")
        return cls(unpatched, values["answer"], tokens, equal, kl)


def equal_choices(reference: Spoken, forced: Spoken) -> list[int]:
    """Of each answer, how many tokens would have been chosen by both. `[B]`"""
    pairs = zip(reference.scores, forced.scores, strict=True)
    same = torch.stack([a.argmax(-1) == b.argmax(-1) for a, b in pairs], dim=1)  # [B, n]
    return [int(same[row, :length].sum()) for row, length in enumerate(reference.lengths)]


def divergences(reference: Spoken, forced: Spoken) -> list[float]:
    """Of each answer, KL(reference || forced) summed over its tokens, in nats. `[B]`"""
    steps = [_kl(a, b) for a, b in zip(reference.scores, forced.scores, strict=True)]
    kl = torch.stack(steps, dim=1)  # [B, n]
    return [float(kl[row, :length].sum()) for row, length in enumerate(reference.lengths)]


def _kl(reference: Tensor, other: Tensor) -> Tensor:
    """`[B]` from two times `[B, vocabulary]` scores; what both forbid counts nothing."""
    p, q = (x.float().log_softmax(-1) for x in (reference, other))
    terms = torch.where(p == float("-inf"), 0.0, p.exp() * (p - q))
    return terms.sum(-1).clamp(min=0)  # rounding may leave it a hair below


@dataclass(frozen=True)
class Agreement:
    """A plan's answers, all together; every figure with its 95 % interval.

    Attributes:
        items: answers held against each other.
        exact, normalised: shares of equal answers (Wilson's interval).
        equal_tokens: share of the unpatched answers' tokens that the patched model would have chosen as
            well (bootstrap over items; Wilson's over items where all are equal).
        kl: mean divergence of the next-token distributions in nats (bootstrap over items).
    """

    items: int
    exact: Estimate
    normalised: Estimate
    equal_tokens: Estimate
    kl: Estimate

    @classmethod
    def of(cls, held: Iterable[Held]) -> Agreement:
        """Sum up answers.

        Raises:
            ValueError: there are none.
        """
        every: Sequence[Held] = list(held)
        tokens = [h.tokens for h in every]
        equal = mean_of_items([h.equal_tokens for h in every], tokens)
        if equal.value == 1:  # every draw of a bootstrap says 1, whether of three items or of thousands
            equal = Estimate(1.0, share([True] * len(every)).low, 1.0)
        return cls(
            len(every),
            share([h.exact for h in every]),
            share([h.normalised for h in every]),
            equal,
            mean_of_items([h.kl_sum for h in every], tokens),
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        figures = {n: getattr(self, n).to_dict() for n in ("exact", "normalised", "equal_tokens", "kl")}
        return {"items": self.items, **figures}
