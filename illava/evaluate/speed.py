"""How fast and how large a model is under each plan, beside the unpatched model, in one alternating run."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import illava
from illava.errors import OutOfMemoryError
from illava.evaluate.loading import Loaded
from illava.evaluate.statistics import Estimate, middle
from illava.evaluate.timing import Decoding, Peak, Prefill, Side
from illava.memory import unless_out_of_memory
from illava.plan import Plan
from illava.report import Report

OK, OUT_OF_MEMORY, UNFINISHED = "ok", "out of memory", "not measured"
_TIMES = ("encoder_ms", "llm_ms", "ttft_ms")
# What every figure is, for tables, plots and JSON.
FIGURES = {
    "ttft_ms": "time to the first token, ms",
    "encoder_ms": "encoder and projector, ms",
    "llm_ms": "prefill of the language model, ms",
    "decode_tokens_per_s": "decoding, tokens/s",
    "kv_bytes": "key-value cache, bytes",
    "peak_bytes": "peak memory, bytes",
}


@dataclass(frozen=True)
class Figure:
    """One figure of one plan.

    Attributes:
        value: median over the rounds, of all inputs together; the ends are its quartiles.
        ratio: how many times better than the unpatched model, round by round; `None` of the unpatched
            model itself and where that did not fit.
        bound: how many times better the plan's operations allow; `None` where that is not counted.
    """

    value: Estimate
    ratio: Estimate | None = None
    bound: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        ratio = None if self.ratio is None else self.ratio.to_dict()
        return {**self.value.to_dict(), "ratio": ratio, "bound": self.bound}


@dataclass(frozen=True)
class Row:
    """What was measured of a plan, or of the unpatched model.

    Attributes:
        name: the plan's.
        plan: `None` for the unpatched model.
        status: `OK`, or why there are no figures.
        tokens, final_tokens: visual tokens of all inputs, before any merge and after the last; 0 where no
            plan merges, and so nothing counts them.
        figures: by name, see `FIGURES`; those that could be measured.
    """

    name: str
    plan: Plan | None
    status: str
    tokens: int
    final_tokens: int
    figures: dict[str, Figure]

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "name": self.name,
            "plan": None if self.plan is None else self.plan.to_dict(),
            "status": self.status,
            "tokens": self.tokens,
            "final_tokens": self.final_tokens,
            "figures": {name: figure.to_dict() for name, figure in self.figures.items()},
        }


@dataclass(frozen=True)
class Bench:
    """What `bench` measured: `rows[0]` is the unpatched model, the others are the plans in their order.

    Attributes:
        rounds: finished ones.
        interrupted: whether there should have been more.
        environment: model, device and dtype.
    """

    rows: list[Row]
    rounds: int
    interrupted: bool
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "environment": self.environment,
            "rounds": self.rounds,
            "interrupted": self.interrupted,
            "rows": [row.to_dict() for row in self.rows],
        }


@dataclass
class _Arm:
    """The unpatched model or a plan, and what is measured of it: of each round, of each input."""

    name: str
    plan: Plan | None
    status: str = OK
    reports: list[Report] = field(default_factory=list)
    peaks: list[Peak | None] = field(default_factory=list)
    prefills: list[list[tuple[Prefill, Prefill | None]]] = field(default_factory=list)
    decodings: list[list[tuple[Decoding, Decoding | None]]] = field(default_factory=list)

    def run(self, model: Any, call: Callable[[illava.Handle | None], Any]) -> Any:
        """What a call returns under this plan; running out of memory costs the arm, not the run."""

        def patched() -> Any:
            if self.plan is None:
                return call(None)
            with illava.patch(model, plan=self.plan) as handle:
                return call(handle)

        result = unless_out_of_memory(patched)
        if result is None:
            self.status = OUT_OF_MEMORY
        return result


def bench(
    loaded: Loaded,
    inputs: Sequence[Mapping[str, Any]],
    plans: Mapping[str, Plan],
    *,
    rounds: int = 5,
    warmup: int = 1,
    new_tokens: int = 0,
    progress: Callable[[str], None] = lambda what: None,
) -> Bench:
    """Time plans against the unpatched model.

    In every round each input is shown to the unpatched model, to every plan in turn, and to the unpatched
    model again; a ratio is that round's unpatched mean by the plan's, so that a busy machine slows both
    sides of it. Patching is not timed. After Ctrl-C the finished rounds are returned.

    Args:
        loaded: an unpatched model; random weights take as long as trained ones.
        inputs: of `generate`, on the model's device, e.g. from `build_inputs` or `noise_inputs`.
        plans: by name.
        rounds: timed calls of each plan and input.
        warmup: calls before them, of each.
        new_tokens: also decode so many tokens, and count how fast.
        progress: hears of every call before it is made; `calls` says how many there are.

    Raises:
        PlanError: a plan this model cannot carry out.
        OutOfMemoryError: not even one plan fits.
    """
    unpatched, arms = _Arm("unpatched", None), [_Arm(name, plan) for name, plan in plans.items()]
    sides = [Side(loaded.model, shown) for shown in inputs]
    done, interrupted = 0, False
    gc.collect()
    gc.freeze()  # each call collects garbage first: not through all of torch every time
    try:
        for arm in (unpatched, *arms):
            _warm_up(arm, sides, warmup, progress)
        if all(arm.status != OK for arm in (unpatched, *arms)):
            raise OutOfMemoryError(
                f"{loaded.name} does not fit with these inputs, unpatched or under any of these plans; give "
                "smaller pictures, a smaller batch, or a higher reduction"
            )
        for _ in range(rounds):
            _round(unpatched, arms, sides, new_tokens, progress)
            done += 1
    except KeyboardInterrupt:
        if not done:
            raise
        interrupted = True
    finally:
        gc.unfreeze()
    tokens = max(sum(report.tokens for report in arm.reports) for arm in (unpatched, *arms))
    rows = [_row(arm, unpatched, done, tokens) for arm in (unpatched, *arms)]
    return Bench(rows, done, interrupted, loaded.to_dict())


def calls(inputs: int, plans: int, *, rounds: int, warmup: int = 1, new_tokens: int = 0) -> int:
    """How many calls `bench` reports to `progress`."""
    return inputs * ((plans + 1) * warmup + rounds * (plans + 2) * (2 if new_tokens > 1 else 1))


def _warm_up(arm: _Arm, sides: Sequence[Side], warmup: int, progress: Callable[[str], None]) -> None:
    for side in sides:

        def first_calls(handle: illava.Handle | None, side: Side = side) -> bool:
            for _ in range(warmup):
                progress(f"warming up: {arm.name}")
                side.prefill()
            arm.peaks.append(side.peak())
            if handle is not None and handle.report is not None:
                arm.reports.append(handle.report)
            return True

        arm.run(side.model, first_calls)


def _round(
    unpatched: _Arm, arms: Sequence[_Arm], sides: Sequence[Side], new_tokens: int,
    progress: Callable[[str], None],
) -> None:  # fmt: skip
    """Nothing is kept of a round that is not finished."""
    kinds: list[tuple[str, str, Callable[[Side], Any]]] = [("prefills", "timing", Side.prefill)]
    if new_tokens > 1:
        kinds.append(("decodings", "decoding", lambda side: side.decode(new_tokens)))
    kept: list[tuple[_Arm, str, list[Any]]] = []
    for results, verb, measure in kinds:
        pairs: dict[str, list[Any]] = {arm.name: [] for arm in (unpatched, *arms)}
        for side in sides:

            def measured(arm: _Arm, side: Side = side, verb: str = verb, measure: Any = measure) -> Any:
                progress(f"{verb}: {arm.name}")
                return arm.run(side.model, lambda _: measure(side)) if arm.status == OK else None

            before = measured(unpatched)
            own = [measured(arm) for arm in arms]
            after = measured(unpatched)
            reference = before if after is None else after if before is None else _mean(before, after)
            pairs[unpatched.name].append((reference, None))
            for arm, result in zip(arms, own, strict=True):
                pairs[arm.name].append((result, reference))
        kept += [(arm, results, pairs[arm.name]) for arm in (unpatched, *arms)]
    for arm, results, found in kept:
        if arm.status == OK:
            getattr(arm, results).append(found)


def _mean(a: Any, b: Any) -> Any:
    if isinstance(a, Decoding):
        return Decoding(a.tokens_per_s + b.tokens_per_s, (a.requests_per_s + b.requests_per_s) / 2)
    times = {name: (getattr(a, name) + getattr(b, name)) / 2 for name in _TIMES}
    return Prefill(**times, kv_bytes=a.kv_bytes)


def _row(arm: _Arm, unpatched: _Arm, rounds: int, tokens: int) -> Row:
    final = sum(report.final_tokens for report in arm.reports) if arm.reports else tokens
    if arm.status != OK or not rounds:
        return Row(arm.name, arm.plan, arm.status if rounds else UNFINISHED, tokens, final, {})
    bounds = _bounds(arm)
    figures = {}
    for name in _TIMES:
        own = [sum(getattr(a, name) for a, _ in pairs) for pairs in arm.prefills]
        ratios = [
            sum(getattr(ref, name) for _, ref in pairs) / spent
            for pairs, spent in zip(arm.prefills, own, strict=True)
            if all(ref is not None for _, ref in pairs)
        ]
        figures[name] = Figure(middle(own), middle(ratios) if ratios else None, bounds.get(name))
    if arm.decodings:
        figures["decode_tokens_per_s"] = _decoding(arm)
    held = sum(a.kv_bytes for a, _ in arm.prefills[0])
    before = [ref.kv_bytes for _, ref in arm.prefills[0] if ref is not None]
    figures["kv_bytes"] = _size(held, sum(before) if before else None)
    if all(peak is not None for peak in arm.peaks):
        peak = max(peak.total for peak in arm.peaks if peak is not None)
        all_before = [p.total for p in unpatched.peaks if p is not None]
        fits = arm.plan is not None and unpatched.status == OK and all_before
        figures["peak_bytes"] = _size(peak, max(all_before) if fits else None)
    return Row(arm.name, arm.plan, OK, tokens, final, figures)


def _bounds(arm: _Arm) -> dict[str, float]:
    if not arm.reports:
        return {}
    vision, language = (
        [sum(getattr(getattr(r.flops, part), side) for r in arm.reports) for side in ("without", "with_")]
        for part in ("vision", "language")
    )
    total = [a + b for a, b in zip(vision, language, strict=True)]
    parts = {"encoder_ms": vision, "llm_ms": language, "ttft_ms": total}
    return {name: without / with_ for name, (without, with_) in parts.items() if with_}


def _decoding(arm: _Arm) -> Figure:
    """Of each round, tokens a second at the median step of each input, averaged over the inputs."""

    def speed(decodings: Sequence[Decoding]) -> float:
        return sum(middle(d.tokens_per_s).value for d in decodings) / len(decodings)

    own = [speed([a for a, _ in pairs]) for pairs in arm.decodings]
    ratios = [
        mine / speed([ref for _, ref in pairs if ref is not None])
        for pairs, mine in zip(arm.decodings, own, strict=True)
        if all(ref is not None for _, ref in pairs)
    ]
    return Figure(middle(own), middle(ratios) if ratios else None)


def _size(held: int, before: int | None) -> Figure:
    return Figure(middle([held]), None if before is None else middle([before / held]))
