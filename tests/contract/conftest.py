import pytest

import illava
from contract import tools


@pytest.fixture(autouse=True)
def _as_new():
    """Tests share models: whatever a test did, the next one finds them unpatched."""
    yield
    for model in tools.built():
        illava.unpatch(model)
        if hasattr(model.model, "rope_deltas"):
            model.model.rope_deltas = None  # Hugging Face's memory of the last call's positions
