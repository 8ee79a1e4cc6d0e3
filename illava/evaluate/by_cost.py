"""The plan that keeps most of the answers at a given cost.

Every pair of sets of layers is as mild as the target allows, and the plans' next-token distributions are held
against the unpatched model's on more and more data, the better third of them going on each time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product

from illava.errors import NoPlanError
from illava.evaluate.found import Choice
from illava.evaluate.judge import Judge
from illava.evaluate.search_space import ENCODER_REMOVES, RULES, Candidate, Layers, Rule, Space

SURVIVE = 3  # one of so many goes on
_FINE = tuple(round(0.30 + 0.01 * step, 2) for step in range(69))  # 0.30 to 0.98


def as_fast_as(speedup: float, space: Space) -> list[Candidate]:
    """Every pair of sets, as mild as a speed-up allows.

    Raises:
        NoPlanError: none is as fast.
    """
    found = []
    for vit, rule, removes, llm in _pairs(space):
        for reduction in _FINE:
            if reduction <= removes and llm:
                continue
            one = Candidate(vit, llm, removes if llm else reduction, reduction, rule)
            if space.cost(one) <= 1 / speedup:
                found.append(one)
                break
    if not found:
        raise NoPlanError(f"no plan reaches a speed-up of {speedup} on this model; ask for less")
    return list(dict.fromkeys(found))


def as_few_as(tokens: int, pictures: Sequence[tuple[int, int]], space: Space) -> list[Candidate]:
    """Every pair of sets, removing as little of a prompt as leaves at most so many tokens of it.

    Args:
        tokens: visual tokens.
        pictures: the prompt's, each as its frames and the tokens of one.
        space: of the model.

    Raises:
        NoPlanError: there is nothing to remove, or no plan removes as much.
    """
    largest = sum(frames * each for frames, each in pictures)
    if tokens >= largest:
        raise NoPlanError(
            f"no prompt has more than {largest} visual tokens, so {tokens} asks for nothing; give fewer"
        )
    least = 1 - tokens / largest
    # Layers remove whole tokens, so that more may have to be asked for than is to be gone.
    steps = [share for step in range(101) if (share := math.ceil(1000 * least + step) / 1000) < 1]
    found = []
    for vit, rule, removes, llm in _pairs(space):
        for reduction in steps:
            one = Candidate(vit, llm, removes if llm else reduction, reduction, rule)
            if llm and removes >= reduction:
                continue
            if space.left(one, pictures) <= tokens:
                found.append(one)
                break
    if not found:
        raise NoPlanError(f"no plan leaves at most {tokens} visual tokens of {largest}; ask for more")
    return list(dict.fromkeys(found))


def _pairs(space: Space) -> Iterable[tuple[Layers, Rule, float, Layers]]:
    """Sets of both stages or one, their rule, and what the encoder removes."""
    for llm, rule in product(space.decoder_layers, RULES):
        yield (), rule, 0.0, llm
    yield from product(space.encoder_layers, RULES, ENCODER_REMOVES[1::2], (*space.decoder_layers, ()))


@dataclass
class Nearest:
    """A search for the candidate nearest to the unpatched model, which may be interrupted.

    Args:
        judge: of the model and the data.
        candidates: at least one.

    Attributes:
        distance: of each candidate in nats, summed over the batches it was tried on.
        alive: candidates that are still in it.
    """

    judge: Judge
    candidates: list[Candidate]
    distance: dict[Candidate, float] = field(default_factory=dict)
    alive: list[Candidate] = field(default_factory=list)

    def run(self) -> None:
        """Search."""
        batches, self.alive = self.judge.search.batches, self.candidates
        self.judge.tried += len(self.candidates)
        for number, batch in enumerate(batches):
            self.judge.stage(f"{len(self.alive)} plans left", number, len(batches))
            found = self.judge.search.divergence([c.plan for c in self.alive], batch)
            for candidate, nats in zip(self.alive, found, strict=True):
                self.distance[candidate] = self.distance.get(candidate, 0.0) + nats
            left = max(1, math.ceil(len(self.alive) / SURVIVE))
            self.alive = sorted(self.alive, key=self.distance.__getitem__)[:left]
            if left == 1:
                break

    def so_far(self) -> Choice | None:
        """The nearest, counted on data that had no part in the search; `None` before the first batch."""
        if not self.distance:
            return None
        return self.judge.choice(min(self.alive, key=self.distance.__getitem__))
