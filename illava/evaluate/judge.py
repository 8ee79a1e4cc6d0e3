"""Judges candidates on a user's data: each is run on the same items once, whoever asks again."""

from __future__ import annotations

from collections.abc import Callable

import illava
from illava.errors import DataError
from illava.evaluate.found import Choice, describe
from illava.evaluate.loading import Loaded
from illava.evaluate.search_space import Candidate, Shown, Space, frames_of
from illava.evaluate.statistics import share
from illava.evaluate.trials import Trials, Tried

# Hears what is being tried, and how much of how many steps is done of the search's present stage.
Progress = Callable[[str, int, int], None]


class Judge:
    """What is known of candidates so far.

    Args:
        loaded: an unpatched model with its processor.
        search, confirm: the data that chooses, and the data that the choice is counted on.
        progress: hears of every run.

    Attributes:
        space: which candidates there are.
        largest: visual tokens of the largest prompt of all the data.
        pictures: of that prompt, each as its frames and the tokens of one.
        tried: how many runs there were.

    Raises:
        DataError: items without pictures.
    """

    def __init__(self, loaded: Loaded, search: Trials, confirm: Trials, progress: Progress) -> None:
        self.search, self.confirm, self.progress = search, confirm, progress
        self.tried = 0
        self._stage, self._done, self._total = "searching", 0, 1
        self._runs: dict[tuple[Candidate, bool], Tried] = {}
        self.pictures: list[tuple[int, int]] = []
        reports, texts, self.largest = list[illava.Report](), list[int](), 0
        for batch in (batch for trials in dict.fromkeys((search, confirm)) for batch in trials.batches):
            if batch.shown is None:
                continue
            rows = _row_tokens(batch.shown, batch.items)
            lengths = batch.inputs["attention_mask"].sum(1).tolist()
            texts += [length - tokens for length, tokens in zip(lengths, rows, strict=True)]
            if max(rows) > self.largest:
                self.largest = max(rows)
                row = rows.index(self.largest)
                self._largest = batch, row
                self.pictures = [frames_of(p) for p in batch.shown.pictures if p.row == row]
            reports.append(batch.shown)
        if not reports:
            raise DataError("the items bring no pictures; a plan is searched for on pictures and questions")
        self.space = Space(loaded, Shown.median(reports, texts))

    def stage(self, name: str, done: int = 0, total: int = 1) -> None:
        """What the runs from here on are part of."""
        self._stage, self._done, self._total = name, done, total
        self.say("")

    def say(self, what: str) -> None:
        """Tell what goes on within the stage."""
        self.progress(f"{self._stage}: {what}" if what else self._stage, self._done, self._total)

    def holds(self, candidate: Candidate, allowed: int, *, confirm: bool = False) -> bool:
        """Whether at most so many answers change, on the data that chooses or on that which confirms."""
        trials = self.confirm if confirm else self.search
        return self._run(candidate, trials, allowed).equal.count(False) <= allowed

    def choice(self, candidate: Candidate, *, confirm: bool = True) -> Choice:
        """A candidate with its figures, counted on all of the data."""
        trials = self.confirm if confirm else self.search
        run = self._run(candidate, trials, None)
        batch, row = self._largest
        report = trials.merged(candidate.plan, batch)
        left = self.largest if report is None else _row_tokens(report, batch.items, final=True)[row]
        return Choice(candidate.plan, share(run.equal), run.bound, left)

    def _run(self, candidate: Candidate, trials: Trials, allowed: int | None) -> Tried:
        key = candidate, trials is self.confirm
        known = self._runs.get(key)
        if known is not None:
            whole = len(known.equal) == trials.items
            if whole or (allowed is not None and known.equal.count(False) > allowed):
                return known
        self.say(describe(candidate.plan))
        self.tried += 1
        self._runs[key] = trials.race(candidate.plan, allowed)
        return self._runs[key]


def _row_tokens(report: illava.Report, rows: int, *, final: bool = False) -> list[int]:
    """Visual tokens of each row of a batch."""
    tokens = [0] * rows
    for picture in report.pictures:
        tokens[picture.row] += picture.final_tokens if final else picture.tokens
    return tokens
