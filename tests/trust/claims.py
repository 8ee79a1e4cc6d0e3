"""What the tests marked `claim` found, as a table.

    pytest tests/trust -m "not soak and not gpu" --claims tests/trust/results/5.23.0.csv

writes a row per claim, family and version of transformers: the outcome of its tests (`passed`, `failed`, or
why they were skipped). It works under `pytest -n` as well: what a test found travels in its report.
"""

import csv
import json
from pathlib import Path

import pytest
import transformers

HEADER = ("topic", "claim", "verdict", "how we know", "family", "transformers", "outcome")
RESULTS = Path(__file__).parent / "results"


def of(item) -> list[tuple[str, ...]]:
    """The claims of a test: topic, claim, verdict, how we know."""
    return [mark.args for mark in item.iter_markers("claim")]


class Claims:
    """Gathers outcomes by claim and the test's parameter `family`."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.outcomes: dict[tuple[str, ...], list[str]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        callspec = getattr(item, "callspec", None)
        family = (callspec.params.get("family") if callspec else None) or "any"
        report.user_properties += [("claim", json.dumps([*claim, family])) for claim in of(item)]
        return report

    def pytest_runtest_logreport(self, report):
        if report.passed and report.when != "call":
            return
        outcome = report.outcome
        if report.skipped:
            outcome = f"skipped: {report.longrepr[2].removeprefix('Skipped: ')}"
        for name, value in report.user_properties:
            if name == "claim":
                self.outcomes.setdefault(tuple(json.loads(value)), []).append(outcome)

    def pytest_sessionfinish(self, session):
        if hasattr(session.config, "workerinput"):  # the process that gathers is another one
            return
        with open(self.path, "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(HEADER)
            for (*claim, family), outcomes in sorted(self.outcomes.items()):
                ran = [o for o in outcomes if not o.startswith("skipped")]
                result = "failed" if "failed" in ran else "passed" if ran else outcomes[0]
                writer.writerow([*claim, family, transformers.__version__, result])
