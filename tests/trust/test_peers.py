"""transformers' own common tests, on models patched as they are made: what passes unpatched passes patched.

They run where `ILLAVA_TRANSFORMERS_SOURCE` names transformers' source (see `peers.py`). "Every merge idle"
has all hooks at work and removes nothing; at 66.7 % the tests in `NO_LONGER` make no sense any more. How many
there are and how many pass unpatched is written in `results/peers.json`, for the page.
"""

import json
from collections import Counter
from functools import cache

import pytest
import transformers

from contract import tools
from trust import claims, peers

WHY_NOT = peers.why_not()
pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "it can run"),
]

ROUTER = "router logits are refused while tokens are merged, with what to do instead"
CHECKPOINTING = "gradient checkpointing is refused while tokens are merged, with what to do instead"
# What does not hold of a model that merges, by the beginning of test[family].
NO_LONGER = {
    "test_enable_input_require_grads_with_gradient_checkpointing": CHECKPOINTING,
    "test_training_gradient_checkpointing": CHECKPOINTING,
    "test_output_router_logits": ROUTER,
    "test_capture_outputs_decorator[qwen3_vl_moe]": ROUTER,
}
NAMES = [] if WHY_NOT else peers.names()


@cache
def unpatched(family, name):
    return peers.run(family, name, None)


def unpatched_passes(family, name):
    if (outcome := unpatched(family, name)) != "passed":
        pytest.skip(f"unpatched: {outcome}")


@tools.each_family
def test_how_many_there_are_is_what_is_written(family):
    """What is skipped, or fails unpatched, is not held against the patched model: these are the others."""
    written = json.loads((claims.RESULTS / "peers.json").read_text())
    if (own := written.get(transformers.__version__)) is None:
        pytest.skip(f"results/peers.json knows nothing of transformers {transformers.__version__}")
    kinds = Counter(unpatched(family, name).split(":")[0] for name in NAMES)
    assert own["mixins"] == peers.mixins()
    assert own["tests"][family] == kinds


@pytest.mark.claim("transformers' own tests", "every merge idle", "works", "all that pass unpatched pass")
@pytest.mark.parametrize("name", NAMES)
@tools.each_family
def test_as_unpatched_where_nothing_is_removed(family, name):
    unpatched_passes(family, name)
    assert peers.run(family, name, tools.NOTHING["every merge idle"]) == "passed"


@pytest.mark.claim(
    "transformers' own tests", "66.7 % removed", "works",
    "all that pass unpatched, but those of gradient checkpointing and router logits, which are refused",
)  # fmt: skip
@pytest.mark.parametrize("name", NAMES)
@tools.each_family
def test_as_unpatched_where_tokens_are_merged(family, name):
    unpatched_passes(family, name)
    outcome = peers.run(family, name, tools.MAIN)
    reason = next((why for start, why in NO_LONGER.items() if f"{name}[{family}]".startswith(start)), None)
    if reason is None:
        assert outcome == "passed"
    else:
        assert outcome.startswith("failed: illava.errors."), "refused, and not some other error"
