import pytest

import illava
from contract import tools


@pytest.fixture(autouse=True)
def _unpatched():
    """Tests share models: whatever a test did, the next one finds them unpatched."""
    yield
    for model in tools.built():
        illava.unpatch(model)
