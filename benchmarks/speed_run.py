"""One case of speed.py: all its arms and the unpatched model, timed in turn."""

from __future__ import annotations

import gc
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from prefill_models import build_config, build_model
from speed_cases import PROFILED, SMALLER_MODEL, SMALLER_PICTURE, Arm, Case, plan_of
from speed_inputs import NEAR, Shown, show
from speed_measure import Decoding, Peak, Prefill, Side
from speed_models import MODELS
from speed_profile import Spent, profile
from speed_ranges import Ranges
from speed_rows import ABSENT, LIMIT, OK, OOM

import illava

# Arms between two timings of the unpatched model: near enough for both to meet the same machine.
IN_TURN = 4
# Share of a case's time that its rounds leave to decoding.
DECODING = 0.3


class TimeLimit(Exception):
    """A case took twice the time it may take."""


@dataclass(frozen=True)
class Settings:
    """What holds for every case: see speed.py's options."""

    device: str
    dtype: torch.dtype
    size: str
    text: int
    rounds: int
    warmup: int
    new_tokens: int
    decode_rounds: int
    limit: float
    inject_oom: str = ""
    profile: bool = False


@dataclass
class Trial:
    """One arm, or the unpatched model, and what was measured of it.

    Attributes:
        arm: `None` for the unpatched model.
        status: `OK`, or why there are no figures.
        prefills, decodings: one per round, each with the unpatched model's around it.
        report: illava's own of a warm-up call.
        own_shares: of illava's code in a prefill, one per call looked at.
        spent: where one prefill's time goes, if that was asked for.
    """

    arm: Arm | None
    side: Side | None = None
    plan: illava.Plan | None = None
    status: str = OK
    prefills: list[tuple[Prefill, Prefill | None]] = field(default_factory=list)
    decodings: list[tuple[Decoding, Decoding | None]] = field(default_factory=list)
    report: illava.Report | None = None
    layers: str = ""
    peak: Peak | None = None
    own_shares: list[float] = field(default_factory=list)
    spent: list[Spent] = field(default_factory=list)

    def patched(self) -> Any:
        """The model patched, if this arm patches it."""
        if self.side is None or self.plan is None:
            return nullcontext()
        fast_windows = self.arm is not None and self.arm.fast_windows
        return illava.patch(self.side.model, plan=self.plan, fast_windows=fast_windows)


class Models:
    """Built models; only those of the case at hand are kept."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._built: dict[tuple[str, str], Any] = {}

    def get(self, name: str, case: Case) -> Any:
        """A model of a case: the one it is about, or the next smaller one.

        Raises:
            torch.OutOfMemoryError: as building it does.
        """
        wanted = {(n, case.attn) for n in (case.model, MODELS[case.model].smaller) if n}
        for key in set(self._built) - wanted:
            del self._built[key]
        if (name, case.attn) not in self._built:
            free(self._settings.device)
            family = MODELS[name].of_size(self._settings.size)
            config, s = build_config(family, family.shape), self._settings
            model = build_model(family, config, s.device, s.dtype, case.attn)
            model.generation_config.eos_token_id = None  # answers are as long as asked for
            self._built[name, case.attn] = model
        return self._built[name, case.attn]


def free(device: str) -> None:
    """Give memory back that nobody holds."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def run_case(
    case: Case, arms: Sequence[Arm], models: Models, settings: Settings, step: Callable[[str], None]
) -> tuple[Trial, list[Trial]]:
    """Measure the arms of a case; `step` hears of every call.

    Returns:
        The unpatched model, and a trial for each arm.
    """
    unpatched, trials = Trial(None), [Trial(arm) for arm in arms]
    every = [unpatched, *trials]
    sides: dict[tuple[str, Shown], Side | None] = {}
    deadline = time.monotonic() + settings.limit
    try:
        with _alarm(2 * settings.limit):
            for trial in every:
                with _guarded(trial, settings):
                    _prepare(trial, case, models, settings, sides)
            gc.collect()
            gc.freeze()  # each call collects garbage first: not through all of torch every time
            for trial in every:
                if trial.status == OK and time.monotonic() > deadline:
                    trial.status = LIMIT
                if trial.status == OK:
                    with _guarded(trial, settings):
                        _warm_up(trial, settings, step)
            if settings.profile:
                _profile(every, settings)
            alive = [t for t in trials if t.status == OK]
            for number in range(settings.rounds):
                if number and time.monotonic() > deadline - DECODING * settings.limit:
                    break
                _in_turn(unpatched, alive, settings, step, "prefills", Side.prefill)
            if settings.new_tokens > 1:
                for _ in range(settings.decode_rounds):
                    if time.monotonic() < deadline:
                        _in_turn(
                            unpatched, alive, settings, step, "decodings",
                            lambda side: side.decode(settings.new_tokens),
                        )  # fmt: skip
    except TimeLimit:
        for trial in every:
            if not trial.prefills and trial.status == OK:
                trial.status = LIMIT
    finally:
        gc.unfreeze()
    for trial in every:
        if trial.side is not None:
            illava.unpatch(trial.side.model)
    return unpatched, trials


def _prepare(
    trial: Trial, case: Case, models: Models, settings: Settings, sides: dict[tuple[str, Shown], Side | None]
) -> None:
    """The arm's model, inputs and plan; arms that are shown the same share it."""
    arm, shown, near, name = trial.arm, case.shown, NEAR, case.model
    if arm is not None and arm.name == SMALLER_PICTURE:
        shown, near = Shown(shown.content, max(1, round(shown.tokens * (1 - arm.reduction)))), 1.1
    if arm is not None and arm.name == SMALLER_MODEL:
        name = MODELS[case.model].smaller or case.model
    if (name, shown) not in sides:
        model, family = models.get(name, case), MODELS[name].family
        batch = show(model, family, shown, case.rows, settings.text, settings.device, settings.dtype, near)
        sides[name, shown] = None if batch is None else Side(model, batch, settings.device)
    trial.side = sides[name, shown]
    if trial.side is None:
        trial.status = ABSENT
        return
    if arm is not None and arm.patches:
        trial.plan = plan_of(arm, trial.side.seams)


def _warm_up(trial: Trial, settings: Settings, step: Callable[[str], None]) -> None:
    """Calls that are not timed, and what is looked at from inside."""
    side = trial.side
    if side is None:
        return
    if trial.arm is not None and settings.inject_oom and settings.inject_oom == trial.arm.name:
        raise torch.OutOfMemoryError("injected by --inject-oom")
    with trial.patched() as handle:
        for _ in range(settings.warmup):
            side.prefill()
        trial.peak = side.peak()
        if handle is not None:
            trial.report = handle.report
            plan = handle.plan
            if not plan.removes_nothing:
                vit, llm = (" ".join(map(str, x)) for x in (plan.vit_layers, plan.llm_layers))
                trial.layers = f"vit {vit or '-'}; llm {llm or '-'}"
    if trial.report is not None:
        with Ranges.installed(), trial.patched():
            calls = 3 if side.clock.cuda else 1
            trial.own_shares = [side.own_share() for _ in range(calls)]
    step("warming up")


def _profile(trials: Sequence[Trial], settings: Settings) -> None:
    """Of the unpatched model, and of illava where it removes most."""
    most = max((t.arm.reduction for t in trials if t.arm is not None), default=0.0)
    for trial in trials:
        ours = trial.arm is None or (trial.arm.name in PROFILED and trial.arm.reduction == most)
        if ours and trial.side is not None and trial.status == OK:
            with _guarded(trial, settings), Ranges.installed(), trial.patched():
                trial.spent = profile(trial.side)


def _in_turn(
    unpatched: Trial,
    trials: Sequence[Trial],
    settings: Settings,
    step: Callable[[str], None],
    results: str,
    measure: Callable[[Side], Any],
) -> None:
    """One round: the unpatched model, a few arms, the unpatched model, a few more, and so on.

    What went before and what comes after an arm are averaged where both were measured.
    """

    def reference() -> Any:
        if unpatched.status != OK or unpatched.side is None:
            return None
        result = None
        with _guarded(unpatched, settings):
            result = measure(unpatched.side)
            getattr(unpatched, results).append((result, None))
        return result

    before = reference()
    for start in range(0, len(trials), IN_TURN):
        measured = []
        for trial in trials[start : start + IN_TURN]:
            if trial.status == OK and trial.side is not None:
                with _guarded(trial, settings), trial.patched():
                    measured.append((trial, measure(trial.side)))
            step("timing" if results == "prefills" else "decoding")
        after = reference()
        for trial, result in measured:
            getattr(trial, results).append((result, _mean(before, after)))
        before = after


def _mean(before: Any, after: Any) -> Any:
    if before is None or after is None:
        return before or after
    if isinstance(before, Decoding):
        requests = (before.requests_per_s + after.requests_per_s) / 2
        return Decoding(before.tokens_per_s + after.tokens_per_s, requests)
    pairs = ((getattr(before, n), getattr(after, n)) for n in ("encoder_ms", "llm_ms", "ttft_ms"))
    return Prefill(*(statistics.mean(pair) for pair in pairs), before.kv_bytes)


@contextmanager
def _guarded(trial: Trial, settings: Settings) -> Iterator[None]:
    """Running out of memory costs the arm, not the run."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _is_memory(error):
            raise
        trial.status, trial.prefills, trial.decodings = OOM, [], []
        error.__traceback__ = None  # its frames hold tensors
    if trial.status == OOM:
        free(settings.device)


def _is_memory(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "allocate memory" in text


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raises `TimeLimit` in what runs inside for longer."""

    def ring(*_: Any) -> None:
        raise TimeLimit

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
