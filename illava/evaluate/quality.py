"""Quality without labels: what the unpatched model answers is held against what each plan makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import illava
from illava.errors import DataError, PlanError
from illava.evaluate.agreement import Agreement, Held, divergences, equal_choices
from illava.evaluate.forcing import speak
from illava.evaluate.loading import Loaded, load
from illava.evaluate.prompts import batches, build_inputs, decoded, together
from illava.jobs import Item, Skipped
from illava.jobs.results import as_line
from illava.plan import Plan

Plans = Mapping[str, Plan]


def hold(
    loaded: Loaded, items: Sequence[Item], plans: Plans, *, max_new_tokens: int = 64
) -> list[dict[str, Held]]:
    """One batch of items: the unpatched model answers, and each plan is held against it.

    A patched model that would choose every token of an answer gives that answer; it generates freely only
    where it would not.

    Args:
        loaded: an unpatched model with its processor.
        items: decoded.
        plans: by name.
        max_new_tokens: longest answer.

    Returns:
        For each item, by the plan's name.

    Raises:
        PlanError: no plan, or one this model cannot carry out.
        DataError: what the processor refuses.
    """
    if not plans:
        raise PlanError("no plan to hold against the unpatched model; give at least one")
    inputs = build_inputs(loaded, items)
    reference = speak(loaded, inputs, max_new_tokens)
    texts = reference.texts(loaded)
    rows: list[dict[str, Held]] = [{} for _ in items]
    for name, plan in plans.items():
        with illava.patch(loaded.model, plan=plan):
            forced = speak(loaded, inputs, max_new_tokens, answer=reference.ids)
            equal = equal_choices(reference, forced)
            said = list(texts)
            if any(n < whole for n, whole in zip(equal, reference.lengths, strict=True)):
                freely = speak(loaded, inputs, max_new_tokens).texts(loaded)
                for row, whole in enumerate(reference.lengths):
                    said[row] = texts[row] if equal[row] == whole else freely[row]
        kl = divergences(reference, forced)
        for row, text in enumerate(texts):
            rows[row][name] = Held(text, said[row], reference.lengths[row], equal[row], kl[row])
    return rows


@dataclass(frozen=True)
class Fidelity:
    """What `fidelity` found.

    Attributes:
        agreement: by the plan's name.
        plans: by name, as asked for.
        skipped: items that could not be read or answered, each with its source and reason.
        disagreements: an entry for each item and plan whose answers differ, with its pictures.
    """

    plans: Plans
    agreement: dict[str, Agreement]
    skipped: list[dict[str, str]] = field(default_factory=list)
    disagreements: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "plans": {name: plan.to_dict() for name, plan in self.plans.items()},
            "agreement": {name: found.to_dict() for name, found in self.agreement.items()},
            "skipped": self.skipped,
            "disagreements": len(self.disagreements),
        }


def fidelity(
    loaded: Loaded,
    items: Iterable[Item | Skipped],
    plans: Plans,
    *,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    progress: Callable[[int], None] = lambda done: None,
) -> Fidelity:
    """Hold plans against the unpatched model on pictures and questions that need no labels.

    For data beyond a notebook's, `illava.jobs.run` with `FidelityWork` does the same in a resumable job, and
    `summarise` reads its results.

    Args:
        loaded: an unpatched model with its processor.
        items: for example `illava.jobs.read_items("pictures/")`; what cannot be read is left out, and said.
        plans: by name, e.g. `{"77.8 %": illava.Plan(reduction=0.778)}`.
        max_new_tokens: longest answer.
        batch_size: items answered together.
        progress: hears how many items are done, batch by batch.

    Raises:
        DataError: no item could be read.
        PlanError: a plan this model cannot carry out.
    """
    records: list[dict[str, Any]] = []
    work = FidelityWork(loaded, plans, max_new_tokens)
    for batch in batches(items, batch_size):
        ready: list[Item] = []
        for item in batch:
            try:
                ready.append(decoded(item))
            except DataError as error:
                records.append({"key": item.key, "source": item.source, "skipped": str(error)})
        if ready:
            records += together(partial(_answered, work), ready)
        progress(len(batch))
    return summarise(records, plans)


def _answered(work: FidelityWork, items: list[Item]) -> list[dict[str, Any]]:
    """Records of items; of one alone that cannot be answered, the reason."""
    try:
        results = work(items)
    except DataError as error:
        if len(items) > 1:
            raise
        return [{"key": items[0].key, "source": items[0].source, "failed": str(error)}]
    of_items = zip(items, results, strict=True)
    return [{"key": item.key, "source": item.source, **result} for item, result in of_items]


class FidelityWork:
    """The work of a fidelity job: see `illava.jobs.run`."""

    def __init__(self, loaded: Loaded, plans: Plans, max_new_tokens: int) -> None:
        self.loaded, self.plans, self.max_new_tokens = loaded, plans, max_new_tokens

    def __call__(self, items: list[Item]) -> list[dict[str, Any]]:
        rows = hold(self.loaded, items, self.plans, max_new_tokens=self.max_new_tokens)
        return [
            {
                "prompt": item.prompt,
                "images": [str(path) for path in item.images],
                "videos": [str(path) for path in item.videos],
                "answer": next(iter(row.values())).unpatched,
                "plans": {name: held.to_dict() for name, held in row.items()},
            }
            for item, row in zip(items, rows, strict=True)
        ]

    @classmethod
    def factory(
        cls, name: str, plans: Plans, *, max_new_tokens: int, **loading: Any
    ) -> Callable[[], FidelityWork]:
        """Makes the work once in every process, its model loaded by `load(name, **loading)`."""
        return partial(_make, name, dict(plans), max_new_tokens, loading)


def _make(name: str, plans: Plans, max_new_tokens: int, loading: dict[str, Any]) -> FidelityWork:
    return FidelityWork(load(name, **loading), plans, max_new_tokens)


def summarise(records: Iterable[Mapping[str, Any]], plans: Plans) -> Fidelity:
    """Sum up the records of a fidelity job; every answer stays in memory.

    Raises:
        DataError: not one item was answered, or a record is damaged or of other plans.
    """
    held: dict[str, list[Held]] = {name: [] for name in plans}
    skipped, differing = [], []
    for record in records:
        try:
            of_plans = _read(record)
        except ValueError as error:
            raise DataError(f"a record of fidelity is damaged ({error}): {record!r:.200}") from error
        if of_plans is None:
            skipped.append({"source": record["source"], "reason": record.get("skipped") or record["failed"]})
            continue
        if of_plans.keys() != held.keys():
            raise DataError(
                f"the result of {record['source']} is of the plans {', '.join(of_plans)}, not of "
                f"{', '.join(held)}; give the plans it was made with, or another file of results"
            )
        for name, one in of_plans.items():
            held[name].append(one)
            if not one.exact:
                about = {n: record[n] for n in ("key", "source", "images", "videos", "prompt")}
                kl = one.kl_sum / max(1, one.tokens)
                share = one.equal_tokens / max(1, one.tokens)
                differing.append(
                    about
                    | {"plan": name, "unpatched": one.unpatched, "patched": one.patched}
                    | {"normalised_equal": one.normalised, "equal_tokens": share, "kl": kl}
                )
    if not any(held.values()):
        why = f": {skipped[0]['source']}: {skipped[0]['reason']}" if skipped else ""
        raise DataError(f"no item could be answered{why}; see that the data and the model fit each other")
    return Fidelity(plans, {name: Agreement.of(of) for name, of in held.items()}, skipped, differing)


def read_records(path: str | Path) -> Iterator[dict[str, Any]]:
    """The records of a fidelity job's file of results.

    Raises:
        DataError: a line that is none; says which and why.
    """
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
                _read(record)
            except ValueError as error:
                raise DataError(
                    f"{path}:{number} is no result of a fidelity job ({error}); delete the line and run the "
                    "command again, which does its item anew, or give another file"
                ) from error
            yield record


def _read(record: Any) -> dict[str, Held] | None:
    """What a record says, by the plan's name; `None` of an item that was left out.

    Raises:
        ValueError: it is no record; says what is missing.
    """
    if not isinstance(record, Mapping):
        raise ValueError("no object")
    if "skipped" in record or "failed" in record:
        _strings(record, "key", "source", "skipped" if "skipped" in record else "failed")
        return None
    _strings(record, "key", "source", "prompt", "answer")
    for name in ("images", "videos"):
        if not isinstance(record.get(name), list):
            raise ValueError(f"no list of {name}")
    if not isinstance(record.get("plans"), Mapping) or not record["plans"]:
        raise ValueError("no plans")
    return {name: Held.from_dict(record["answer"], values) for name, values in record["plans"].items()}


def _strings(record: Mapping[str, Any], *names: str) -> None:
    for name in names:
        if not isinstance(record.get(name), str):
            raise ValueError(f"no text as {name!r}")


def write_disagreements(found: Fidelity, path: str | Path) -> None:
    """Write a line for every disagreement, those that differ most first."""
    with Path(path).open("wb") as file:
        for entry in sorted(found.disagreements, key=lambda entry: -entry["kl"]):
            file.write(as_line(entry) + b"\n")
