"""The cheapest plan that keeps a user's answers, or the one that keeps most of them at a given cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from illava.errors import DataError, OutOfMemoryError, PlanError
from illava.evaluate.by_agreement import Cheapest
from illava.evaluate.by_cost import Nearest, as_fast_as, as_few_as
from illava.evaluate.found import BEST, DEFAULT, Choice, Found
from illava.evaluate.judge import Judge, Progress
from illava.evaluate.loading import Loaded
from illava.evaluate.prompts import decoded
from illava.evaluate.speed import Bench, bench, calls
from illava.evaluate.trials import Trials
from illava.jobs import Item
from illava.memory import unless_out_of_memory

# Fewer items than this are not halved into some to search with and some to confirm on.
HALVED_FROM = 40


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
    progress: Progress = lambda what, done, total: None,
) -> Found:
    """Search layers, shares and ratios on your own pictures and questions.

    After Ctrl-C the best that is known by then is returned, and says that it was interrupted.

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
        progress: called with what is being tried, and how many of how many steps of the search's present
            stage are done.

    Raises:
        PlanError: not exactly one target, or one out of range.
        DataError: no items, or one that cannot be read.
        NoPlanError: no plan reaches the target.
        OutOfMemoryError: the unpatched model cannot answer a single item.
    """
    targets = {"min_agreement": min_agreement, "speedup": speedup, "max_tokens": max_tokens}
    check_target(targets)
    ready = [decoded(item) for item in items]
    if not ready:
        raise DataError("no items to search with; give pictures and questions")
    halved = len(ready) >= HALVED_FROM
    progress("answering without merging", 0, 1 + halved)
    search = _fitting(loaded, ready[::2] if halved else ready, batch_size, max_new_tokens)
    progress("answering without merging", 1, 1 + halved)
    confirm = _fitting(loaded, ready[1::2], batch_size, max_new_tokens) if halved else search
    judge = Judge(loaded, search, confirm, progress)
    run: Cheapest | Nearest
    if min_agreement is not None:
        run = Cheapest(judge, min_agreement)
    elif speedup is not None:
        run = Nearest(judge, as_fast_as(speedup, judge.space))
    else:
        run = Nearest(judge, as_few_as(int(max_tokens or 0), judge.pictures, judge.space))
    interrupted, speed = False, None
    try:
        run.run()
    except KeyboardInterrupt:
        interrupted = True
    best = run.so_far()
    if best is None:
        raise KeyboardInterrupt
    default, as_strong, unseen = None, None, halved
    if isinstance(run, Cheapest):
        default, as_strong, unseen = run.default, run.as_strong, halved and run.best is not None
    if rounds and not interrupted:
        try:
            speed = _timed(loaded, confirm, best, default, rounds, progress)
        except KeyboardInterrupt:
            interrupted = True
        else:
            interrupted = speed.interrupted
    counted = confirm.items if unseen else search.items
    return Found(best, default, as_strong, judge.largest, judge.tried, counted, unseen, interrupted, speed)


def _fitting(loaded: Loaded, items: Sequence[Item], batch_size: int, max_new_tokens: int) -> Trials:
    """Trials in batches that fit: what does not is halved."""
    while True:
        trials = unless_out_of_memory(partial(Trials, loaded, items, batch_size, max_new_tokens))
        if trials is not None:
            return trials
        if batch_size == 1:
            raise OutOfMemoryError(
                f"{loaded.name} runs out of memory with a single item; a search needs the unpatched model's "
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


def _timed(
    loaded: Loaded, trials: Trials, best: Choice, default: Choice | None, rounds: int, progress: Progress
) -> Bench:
    """Both plans against the unpatched model, in turns, on a batch of the data."""
    plans = {} if default is None else {DEFAULT: default.plan}
    plans[BEST] = best.plan
    total, done = calls(1, len(plans), rounds=rounds), 0

    def count(what: str) -> None:
        nonlocal done
        progress(what, done, total)
        done += 1

    inputs = [trials.on_device(trials.batches[0])]
    return bench(loaded, inputs, plans, rounds=rounds, progress=count)
