"""What the tests of trust share: models left unpatched, a table of claims, one way to draw odd inputs.

A test says what it shows by `@pytest.mark.claim(area, what, "works" | "refused", how_we_know)`;
`pytest tests/trust --claims FILE.csv` writes one row per claim and family: what came out of its tests.
"""

import csv

import pytest
import torch
import transformers

import illava
from contract import tools

try:
    from hypothesis import HealthCheck, Phase, settings
except ImportError:  # the other tests here need no hypothesis
    settings = None

if settings is not None:
    # The same examples every time: a failure on one machine is a failure on all.
    settings.register_profile(
        "trust",
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],  # shrinking a failure here takes minutes
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )
    settings.load_profile("trust")


def pytest_addoption(parser):
    parser.addoption("--claims", metavar="FILE.csv", help="write what came out of every claim")


def pytest_configure(config):
    if path := config.getoption("--claims", None):
        config.pluginmanager.register(Claims(path))


@pytest.fixture(autouse=True)
def _as_new():
    yield
    for model in tools.built():
        illava.unpatch(model)
        if hasattr(model.model, "rope_deltas"):
            model.model.rope_deltas = None


class Claims:
    """Gathers outcomes by the marks `claim` and the parameter `family`."""

    def __init__(self, path: str) -> None:
        self.path, self.outcomes = path, {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if report.passed and report.when != "call":
            return report
        family = (getattr(item, "callspec", None) and item.callspec.params.get("family")) or "all"
        outcome = report.outcome
        if report.skipped:
            outcome = f"skipped: {report.longrepr[2].removeprefix('Skipped: ')}"
        for mark in item.iter_markers("claim"):
            self.outcomes.setdefault((*mark.args, family), []).append(outcome)
        return report

    def pytest_sessionfinish(self):
        with open(self.path, "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(
                ["area", "claim", "expected", "how we know", "family", "transformers", "torch", "result"]
            )
            for key, outcomes in sorted(self.outcomes.items()):
                result = "failed" if "failed" in outcomes else next(iter(sorted(set(outcomes))))
                writer.writerow([*key, transformers.__version__, torch.__version__, result])
