"""The cheapest plan under which enough answers stay exactly the same.

For each set of encoder blocks alone, with each rule, and of decoder layers alone, the strongest merging
that holds is found; a plan that fails is given up as soon as it has changed too many answers, so most cost
a batch. Then plans of both stages are tried, the cheapest first, on the assumption that what fails alone
fails together. The first that holds is tried again on data that had no part in the search, since the best
of many looks better than it is; if it fails there, the search goes on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from illava.errors import NoPlanError
from illava.evaluate.found import Choice
from illava.evaluate.judge import Judge
from illava.evaluate.search_space import ENCODER_REMOVES, Candidate

# Reductions of the default plan, from the strongest to the mildest.
DEFAULTS = (0.95, 0.889, 0.778, 0.667, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)


@dataclass
class Cheapest:
    """A search for the cheapest plan, which may be interrupted.

    Args:
        judge: of the model and the data.
        min_agreement: least share of answers that stay the same.

    Attributes:
        best: the cheapest that holds on both halves of the data.
        default: the default plan at the strongest reduction that does.
        as_strong: that plan at the best plan's reduction, whether it holds or not.
        held: candidates that hold on the data that chooses.
    """

    judge: Judge
    min_agreement: float
    best: Choice | None = None
    default: Choice | None = None
    as_strong: Choice | None = None
    held: set[Candidate] = field(default_factory=set)

    def run(self) -> None:
        """Search.

        Raises:
            NoPlanError: nothing holds.
        """
        judge, space = self.judge, self.judge.space
        encoder = self._strongest_of("encoder blocks", space.encoder_only())
        decoder = self._strongest_of("decoder layers", space.decoder_only())
        joined = space.joined(_and_milder(encoder), _and_milder(decoder))
        found = self._first("both together", joined)
        if found is None:
            raise NoPlanError(
                f"none of {judge.tried} plans keeps {self.min_agreement:.1%} of {judge.confirm.items} "
                "answers; ask for less, or give more items: with few, one answer that changes is too many"
            )
        self.best = judge.choice(found)
        row = [space.default(reduction) for reduction in DEFAULTS]
        judge.stage("the default, to compare with")
        milder = self._strongest(row)
        if milder is not None:
            same = self._first("the default, to compare with", row[row.index(milder) :])
            self.default = None if same is None else judge.choice(same)
        self.as_strong = judge.choice(space.default(found.reduction))

    def so_far(self) -> Choice | None:
        """The cheapest that held when the search was interrupted."""
        if self.best is not None or not self.held:
            return self.best
        return self.judge.choice(min(self.held, key=self.judge.space.cost), confirm=False)

    def _allowed(self, items: int) -> int:
        """Answers that may change, of so many."""
        return math.floor((1 - self.min_agreement) * items + 1e-9)

    def _holds(self, candidate: Candidate) -> bool:
        holds = self.judge.holds(candidate, self._allowed(self.judge.search.items))
        if holds:
            self.held.add(candidate)
        return holds

    def _confirmed(self, candidate: Candidate) -> bool:
        allowed = self._allowed(self.judge.confirm.items)
        return self.judge.holds(candidate, allowed, confirm=True)

    def _strongest_of(self, stage: str, rows: Sequence[Sequence[Candidate]]) -> list[Candidate]:
        found = []
        for number, row in enumerate(rows):
            self.judge.stage(stage, number, len(rows))
            if (strongest := self._strongest(row)) is not None:
                found.append(strongest)
        return found

    def _strongest(self, row: Sequence[Candidate]) -> Candidate | None:
        """The first of a row that holds: what is stronger is taken to fail, what is milder to hold."""
        if self._holds(row[0]):
            return row[0]
        low, high = 0, len(row) - 1  # fails, holds
        if not self._holds(row[high]):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._holds(row[middle]) else (middle, high)
        return row[high]

    def _first(self, stage: str, candidates: Sequence[Candidate]) -> Candidate | None:
        """The first that holds, on data that chose it and on data that did not."""
        failing: set[Candidate] = set()
        for number, candidate in enumerate(candidates):
            self.judge.stage(stage, number, len(candidates))
            parts = candidate.parts
            if failing & {candidate, *parts} or not self._holds(candidate):
                continue
            if self._confirmed(candidate):
                return candidate
            # What fails on the other data alone fails there in every company.
            failing |= {part for part in parts if not self._confirmed(part)}
        return None


def _and_milder(strongest: Sequence[Candidate]) -> list[Candidate]:
    """What holds, and the same layers removing less."""
    found = []
    for one in strongest:
        found.append(one)
        if one.vit_layers:
            milder = [e for e in ENCODER_REMOVES if e < one.encoder_removes]
            found += [Candidate(one.vit_layers, (), e, e, one.rule) for e in milder]
        else:
            milder = [r for r in DEFAULTS[:5] if r < one.reduction]
            found += [Candidate((), one.llm_layers, 0.0, r, one.rule) for r in milder]
    return found
