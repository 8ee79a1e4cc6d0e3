"""The marker `claim` and the table it fills: what works, what is refused, and how we know.

    @pytest.mark.claim("Decoding", "beam search", "works", "how we know, in one sentence")

See `claims.py` for how the table is written, `page.py` for the page that is made of it.
"""

import pytest

import illava
from contract import tools
from trust.claims import Claims

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
