import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

import on_triton  # noqa: E402

# The models here are tiny: threads cost more than they give.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def remote_code(tmp_path_factory):
    """Called with a name of `remote_code.CODE`: a folder with its files; skips where there are none."""
    from remote_code import folders

    with folders(tmp_path_factory.mktemp("remote_code")) as folder_of:
        yield folder_of


@pytest.fixture(scope="session")
def interpreter():
    """Calls a function with Triton's kernels interpreted."""
    with on_triton.interpreting() as run:
        yield run


@pytest.fixture(params=on_triton.PLACES)
def run(request):
    """Calls a function where Triton's kernels run."""
    return on_triton.on_cuda if request.param == "cuda" else request.getfixturevalue("interpreter")


def pytest_addoption(parser):
    parser.addoption("--support", metavar="FILE.csv", help="write what each family is capable of")


def pytest_configure(config):
    if config.getoption("--support"):
        config.pluginmanager.register(Support(config.getoption("--support")))


class Support:
    """Gathers results by the test's parameter `family` and its marks `capability`, for a table of both."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.outcomes: dict[tuple[str, str], list[str]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        family = getattr(item, "callspec", None) and item.callspec.params.get("family")
        if family is None and (mark := item.get_closest_marker("family")):
            family = mark.args[0]
        if family is None or (report.passed and report.when != "call"):
            return report
        report.user_properties += [
            ("capability", f"{family}/{mark.args[0]}") for mark in item.iter_markers("capability")
        ]
        return report

    def pytest_runtest_logreport(self, report):
        outcome = report.outcome
        if report.skipped:
            outcome = f"skipped: {report.longrepr[2].removeprefix('Skipped: ')}"
        for name, value in report.user_properties:
            if name == "capability":
                self.outcomes.setdefault(tuple(value.split("/", 1)), []).append(outcome)

    def pytest_sessionfinish(self, session):
        if hasattr(session.config, "workerinput"):  # under `pytest -n` another process gathers
            return
        import csv

        import remote_code
        import support_table

        import zoo

        families = zoo.FAMILIES | remote_code.FAMILIES
        with open(self.path, "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["family", *support_table.CAPABILITIES])
            for family in families:
                cells = [self.cell(family, families[family], name) for name in support_table.CAPABILITIES]
                writer.writerow([family, *cells])
            for family, reason in zoo.ABSENT.items():
                writer.writerow([family, *(reason for _ in support_table.CAPABILITIES)])

    def cell(self, family: str, module, capability: str) -> str:
        """`passed`, `failed`, or why there is nothing to test."""
        cannot = getattr(module, "CANNOT", {}).get(capability)
        limit = getattr(module, "LIMITS", {}).get(capability)
        outcomes = self.outcomes.get((family, capability), [])
        ran = [outcome for outcome in outcomes if not outcome.startswith("skipped")]
        if failed := ran.count("failed"):
            return f"failed: {failed} of {len(ran)} tests"
        if ran:
            return f"passed; unpatched cannot: {limit}" if limit else "passed"
        if outcomes:
            return f"unpatched cannot: {outcomes[0].removeprefix('skipped: ')}"
        return f"unpatched cannot: {cannot}" if cannot else "not run"
