"""The marker `claim` and the table it fills: what works, what is refused, and how we know.

    @pytest.mark.claim("Decoding", "beam search", "works", "how we know, in one sentence")

`pytest tests/trust --claims FILE.csv` writes a row per claim, family and version of transformers: the outcome
of its tests (`passed`, `failed`, or why they were skipped).
"""

import csv

import pytest
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

HEADER = ("topic", "claim", "verdict", "how we know", "family", "transformers", "outcome")


def pytest_addoption(parser):
    parser.addoption("--claims", metavar="FILE.csv", help="write what the tests of tests/trust found")


# Marks of transformers' own tests (see `peers.py`), which pytest must know to import them.
FLASH = [f"flash_attn{version}_test" for version in ("", "_2", "_3", "_4")]
PEERS = ("accelerate_tests", "torch_compile_test", *FLASH)


def pytest_configure(config):
    for mark in PEERS:
        config.addinivalue_line("markers", f"{mark}: of transformers' own tests")
    if config.getoption("--claims", None):
        config.pluginmanager.register(Claims(config.getoption("--claims")))


@pytest.fixture(autouse=True)
def _as_new():
    """Tests share models: whatever a test did, the next one finds them unpatched."""
    yield
    for model in tools.built():
        illava.unpatch(model)
        if hasattr(model.model, "rope_deltas"):
            model.model.rope_deltas = None  # Hugging Face's memory of the last call's positions


class Claims:
    """Gathers outcomes by claim and the test's parameter `family`."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.outcomes: dict[tuple[str, ...], list[str]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if report.passed and report.when != "call":
            return report
        outcome = report.outcome
        if report.skipped:
            outcome = f"skipped: {report.longrepr[2].removeprefix('Skipped: ')}"
        callspec = getattr(item, "callspec", None)
        family = (callspec.params.get("family") if callspec else None) or "any"
        for mark in item.iter_markers("claim"):
            self.outcomes.setdefault((*mark.args, family), []).append(outcome)
        return report

    def pytest_sessionfinish(self):
        with open(self.path, "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(HEADER)
            for (*claim, family), outcomes in sorted(self.outcomes.items()):
                failed = [o for o in outcomes if o == "failed"]
                ran = [o for o in outcomes if not o.startswith("skipped")]
                result = "failed" if failed else "passed" if ran else outcomes[0]
                writer.writerow([*claim, family, transformers.__version__, result])
