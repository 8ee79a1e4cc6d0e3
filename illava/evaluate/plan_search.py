"""The cheapest plan that keeps a user's answers, or the one that keeps most of them at a given cost.

**Agreement.** A plan holds if at least so many answers stay exactly the same. For each set of encoder
blocks alone, and of decoder layers alone, the strongest merging that holds is found; a plan that fails is
given up as soon as it has changed too many answers, so most cost a batch. Then plans of both stages are
tried, the cheapest first, on the assumption that what fails alone fails together. The first that holds is
tried again on data that had no part in the search, since the best of many looks better than it is; if it
fails there, the search goes on.

**Cost.** With the speed-up or the tokens given, every pair of sets is as mild as the target allows, and the
plans' next-token distributions are held against the unpatched model's on more and more data, the better
third of them going on each time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import illava
from illava.errors import DataError, NoPlanError, OutOfMemoryError, PlanError
from illava.evaluate.loading import Loaded
from illava.evaluate.memory import free, is_memory
from illava.evaluate.prompts import decoded
from illava.evaluate.search_space import ENCODER_REMOVES, Candidate, Shown, Space
from illava.evaluate.speed import Bench, bench
from illava.evaluate.statistics import Estimate, share
from illava.evaluate.trials import Trials, Tried
from illava.jobs import Item
from illava.plan import Plan

# Fewer items than this are not halved into some to search with and some to confirm on.
HALVED_FROM = 40
DEFAULTS = (0.95, 0.889, 0.778, 0.667, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)
_FINE = tuple(round(0.30 + 0.01 * step, 2) for step in range(69))  # 0.30 to 0.98
SURVIVE = 3  # one of so many goes on

Say = Callable[[str], None]


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
        default: the family's own layers at equal agreement, where agreement was asked for: the strongest
            reduction that holds; `None` if none does.
        tried: how many plans were run.
        items: answers that the agreement is counted on.
        unseen: whether these had no part in the search; too little data is not halved.
        interrupted: whether there was more to try.
        speed: the unpatched model, `default` and `best`, timed in turns.
    """

    best: Choice
    default: Choice | None
    tried: int
    items: int
    unseen: bool
    interrupted: bool = False
    speed: Bench | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "best": self.best.to_dict(),
            "default": None if self.default is None else self.default.to_dict(),
            "tried": self.tried,
            "items": self.items,
            "unseen": self.unseen,
            "interrupted": self.interrupted,
            "speed": None if self.speed is None else self.speed.to_dict(),
        }


def find_plan(
    loaded: Loaded,
    items: Iterable[Item],
    *,
    min_agreement: float | None = None,
    speedup: float | None = None,
    max_tokens: int | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    rounds: int = 5,
    progress: Say = lambda what: None,
) -> Found:
    """Search layers, shares and ratios on your own pictures and questions.

    Args:
        loaded: an unpatched model with its processor.
        items: with pictures; all are held in memory, and a hundred or two tell enough.
        min_agreement: the cheapest plan under which at least this share of the answers stays the same;
        speedup: or the plan that keeps most, of those whose prefill needs this many times fewer operations;
        max_tokens: or the plan that keeps most, of those that leave at most so many visual tokens
            of a prompt.
        max_new_tokens: longest answer.
        batch_size: items answered together.
        rounds: of timing the result against the unpatched model; 0 for none.
        progress: hears what is being tried.

    Raises:
        PlanError: not exactly one target, or one out of range.
        DataError: no items, or one that cannot be read.
        NoPlanError: no plan reaches the target.
    """
    targets = {"min_agreement": min_agreement, "speedup": speedup, "max_tokens": max_tokens}
    check_target(targets)
    ready = [decoded(item) for item in items]
    if not ready:
        raise DataError("no items to search with; give pictures and questions")
    progress("answering without merging")
    halved = len(ready) >= HALVED_FROM
    search = _fitting(loaded, ready[::2] if halved else ready, batch_size, max_new_tokens)
    confirm = _fitting(loaded, ready[1::2], batch_size, max_new_tokens) if halved else search
    run = _Search(loaded, search, confirm, progress)
    default = None
    if min_agreement is not None:
        best, default = run.cheapest(min_agreement)
    elif speedup is not None:
        best = run.nearest(run.as_fast_as(speedup), f"a speed-up of {speedup}")
    else:
        best = run.nearest(run.as_few_as(int(max_tokens or 0)), f"at most {max_tokens} tokens")
    speed = run.timed(best, default, rounds) if rounds and not run.interrupted else None
    return Found(best, default, run.tried, confirm.items, halved, run.interrupted, speed)


def _fitting(loaded: Loaded, items: Sequence[Item], batch_size: int, max_new_tokens: int) -> Trials:
    """Trials in batches that fit: what does not is halved."""
    while True:
        try:
            return Trials(loaded, items, batch_size, max_new_tokens)
        except (MemoryError, RuntimeError) as error:
            if not is_memory(error):
                raise
            error.__traceback__ = None  # its frames hold tensors
        free()
        if batch_size == 1:
            raise OutOfMemoryError(
                f"{loaded.name} runs out of memory, unpatched, with a single item; a search needs its "
                "answers, so give smaller pictures"
            )
        batch_size //= 2


def check_target(targets: Mapping[str, Any]) -> None:
    """See that exactly one target is given, and that it can be reached by some model.

    Raises:
        PlanError: none, several, or one out of range.
    """
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1:
        said = " and ".join(f"{n}={v}" for n, v in given.items()) or "none"
        raise PlanError(f"give exactly one of {', '.join(targets)} (got {said})")
    ((name, value),) = given.items()
    low, high = {"min_agreement": (0, 1), "speedup": (1, 100), "max_tokens": (0, math.inf)}[name]
    if not low < value <= high:
        raise PlanError(f"{name}={value} is out of range; give one above {low} and at most {high}")


class _Search:
    """One search: what was tried, and what holds so far."""

    def __init__(self, loaded: Loaded, search: Trials, confirm: Trials, progress: Say) -> None:
        self.loaded, self.search, self.confirm, self.progress = loaded, search, confirm, progress
        self.tried, self.interrupted = 0, False
        first = search.race(Plan(reduction=0.5), allowed=-1).reports  # sizes of the first batch's pictures
        if not first:
            raise DataError("the items bring no pictures; a plan is searched for on pictures and questions")
        self.largest = max(self._tokens(report) for report in first)
        lengths = search.batches[0].inputs["attention_mask"].sum(1).tolist()
        rows = [sum(p.tokens for p in first[0].pictures if p.row == row) for row in range(len(lengths))]
        texts = [int(length) - tokens for length, tokens in zip(lengths, rows, strict=True)]
        self.space = Space(loaded, Shown.median(first, texts))

    # Agreement ----------------------------------------------------------------------------------

    def cheapest(self, min_agreement: float) -> tuple[Choice, Choice | None]:
        """The cheapest plan that holds, and the strongest of the family's default layers."""
        allowed = math.floor((1 - min_agreement) * self.search.items + 1e-9)
        confirmed = math.floor((1 - min_agreement) * self.confirm.items + 1e-9)
        held: list[Candidate] = []
        try:
            encoder = [self._strongest(row, allowed, held) for row in self.space.encoder_only()]
            decoder = [self._strongest(row, allowed, held) for row in self.space.decoder_only()]
            milder = self._and_milder(encoder), self._and_milder(decoder)
            best = self._first(self.space.joined(*milder), allowed, confirmed, held)
            if best is None:
                raise NoPlanError(
                    f"none of {self.tried} plans keeps {min_agreement:.1%} of {self.confirm.items} "
                    "answers; ask for "
                    "less, or give more items: with few, one answer that changes is too many"
                )
            mine = (self.space.default(reduction) for reduction in DEFAULTS)
            return best, self._first(mine, allowed, confirmed, [])
        except KeyboardInterrupt:
            if not held:
                raise
            self.interrupted = True
            return self._choice(min(held, key=self.space.cost), self.search), None

    def _strongest(self, row: Sequence[Candidate], allowed: int, held: list[Candidate]) -> Candidate | None:
        """The first of a row that holds: what is stronger is taken to fail, what is milder to hold."""

        def holds(place: int) -> bool:
            if self._holds(row[place], self.search, allowed):
                held.append(row[place])
                return True
            return False

        if holds(0):
            return row[0]
        low, high = 0, len(row) - 1  # fails, holds
        if not holds(high):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if holds(middle) else (middle, high)
        return row[high]

    @staticmethod
    def _and_milder(strongest: Sequence[Candidate | None]) -> list[Candidate]:
        """What holds, and the same layers removing less."""
        found = []
        for one in strongest:
            if one is None:
                continue
            found.append(one)
            if one.vit_layers:
                found += [
                    Candidate(one.vit_layers, (), e, e) for e in ENCODER_REMOVES if e < one.encoder_removes
                ]
            else:
                found += [Candidate((), one.llm_layers, 0.0, r) for r in DEFAULTS[:5] if r < one.reduction]
        return found

    def _first(
        self, candidates: Iterable[Candidate], allowed: int, confirmed: int, held: list[Candidate]
    ) -> Choice | None:
        """The first that holds, on data that chose it and on data that did not."""
        failing: set[Candidate] = set()
        for candidate in candidates:
            parts = candidate.parts
            if failing & {candidate, *parts}:
                continue
            if candidate not in held and not self._holds(candidate, self.search, allowed):
                continue
            if candidate not in held:
                held.append(candidate)
            if self.confirm is self.search or self._holds(candidate, self.confirm, confirmed):
                return self._choice(candidate, self.confirm)
            # What fails on the other data alone fails there in every company.
            failing |= {part for part in parts if not self._holds(part, self.confirm, confirmed)}
        return None

    def _holds(self, candidate: Candidate, trials: Trials, allowed: int) -> bool:
        self.progress(f"{self.tried} tried, now {describe(candidate.plan)}")
        self.tried += 1
        return trials.race(candidate.plan, allowed).equal.count(False) <= allowed

    # Cost ---------------------------------------------------------------------------------------

    def as_fast_as(self, speedup: float) -> list[Candidate]:
        """Every pair of sets, as mild as a speed-up allows."""
        found = []
        for vit, removes, llm in self._pairs():
            for reduction in _FINE:
                if reduction <= removes and llm:
                    continue
                one = Candidate(vit, llm, removes if llm else reduction, reduction)
                if self.space.cost(one) <= 1 / speedup:
                    found.append(one)
                    break
        return list(dict.fromkeys(found))

    def as_few_as(self, tokens: int) -> list[Candidate]:
        """Every pair of sets, removing as much of the largest prompt as it takes."""
        reduction = max(0.0, 1 - tokens / self.largest)
        if not reduction:
            raise NoPlanError(
                f"no prompt has more than {self.largest} visual tokens, so {tokens} asks for nothing; give "
                "fewer"
            )
        reduction = min(0.999, math.ceil(reduction * 1000 + 2) / 1000)  # rounding to whole tokens adds a few
        found = [
            Candidate(vit, llm, removes if llm else reduction, reduction)
            for vit, removes, llm in self._pairs()
            if not llm or removes < reduction
        ]
        return list(dict.fromkeys(found))

    def _pairs(self) -> Iterable[tuple[Any, float, Any]]:
        """Sets of both stages or one, and what the encoder removes."""
        for vit in ((), *self.space.encoder_layers):
            for removes in ENCODER_REMOVES[1::2] if vit else (0.0,):
                for llm in (*self.space.decoder_layers, ()) if vit else self.space.decoder_layers:
                    yield vit, removes, llm

    def nearest(self, candidates: list[Candidate], target: str) -> Choice:
        """The candidate nearest to the unpatched model."""
        if not candidates:
            raise NoPlanError(f"no plan reaches {target} on this model; ask for less")
        distance = dict.fromkeys(candidates, 0.0)
        alive = candidates
        try:
            for batch in self.search.batches:
                self.progress(f"{len(alive)} plans left")
                found = self.search.divergence([c.plan for c in alive], batch)
                self.tried += len(alive) if batch is self.search.batches[0] else 0
                for candidate, nats in zip(alive, found, strict=True):
                    distance[candidate] += nats
                alive = sorted(alive, key=distance.__getitem__)[: max(1, math.ceil(len(alive) / SURVIVE))]
                if len(alive) == 1:
                    break
        except KeyboardInterrupt:
            if not any(distance.values()):
                raise
            self.interrupted = True
        return self._choice(min(alive, key=distance.__getitem__), self.confirm)

    # Results ------------------------------------------------------------------------------------

    def _choice(self, candidate: Candidate, trials: Trials) -> Choice:
        self.progress(f"counting answers under {describe(candidate.plan)}")
        tried: Tried = trials.race(candidate.plan)
        left = max((self._tokens(r, final=True) for r in tried.reports), default=self.largest)
        return Choice(candidate.plan, share(tried.equal), tried.bound, left)

    @staticmethod
    def _tokens(report: illava.Report, *, final: bool = False) -> int:
        """Visual tokens of the batch's largest row."""
        rows: dict[int, int] = {}
        for picture in report.pictures:
            rows[picture.row] = rows.get(picture.row, 0) + (picture.final_tokens if final else picture.tokens)
        return max(rows.values())

    def timed(self, best: Choice, default: Choice | None, rounds: int) -> Bench:
        """Both plans against the unpatched model on a batch of the data."""
        plans = {} if default is None else {"default layers": default.plan}
        inputs = [self.confirm.on_device(self.confirm.batches[0])]
        return bench(
            self.loaded, inputs, plans | {"this plan": best.plan}, rounds=rounds, progress=self.progress
        )


def describe(plan: Plan) -> str:
    """A plan as Python, without what is left at its default."""
    default = Plan()
    said = {n: getattr(plan, n) for n in Plan.__dataclass_fields__ if getattr(plan, n) != getattr(default, n)}
    return f"illava.Plan({', '.join(f'{name}={value!r}' for name, value in said.items())})"
