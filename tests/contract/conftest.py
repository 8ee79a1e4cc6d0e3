import pytest
from contract import tools

import illava


@pytest.fixture(autouse=True)
def _unpatched():
    """Tests share models: whatever a test did, the next one finds them unpatched."""
    yield
    for model in tools.built():
        illava.unpatch(model)
