"""The page "What works, what does not, how we know" is the one that the tests' results make."""

import pytest
import transformers

from trust import claims, page


def test_the_page_is_made_of_the_results():
    assert page.PAGE.read_text() == page.render(), "run python tests/trust/page.py"


def rows_of(*outcomes):
    row = {"topic": "T", "claim": "c", "verdict": "works", "how we know": "h", "family": "any"}
    return [row | {"transformers": f"5.{n}", "outcome": outcome} for n, outcome in enumerate(outcomes)]


@pytest.mark.parametrize(
    ("outcomes", "line"),
    [
        (("passed", "passed"), "| c | works | yes | h |"),
        (("passed", "failed"), "| c | **fails** (should be: works) | yes | h |"),
        (("passed", "skipped: no net"), "| c | works | 5.0 (1) | h |"),
        (("failed", "skipped: no net"), "| c | **fails** (should be: works) | 5.0 (1) | h |"),
        (
            ("skipped: no net", "skipped: no net"),
            "| c | **not known** (should be: works) | not run (1) | h |",
        ),
    ],
)
def test_what_was_found_is_what_stands_there(outcomes, line):
    text = page.section("T", rows_of(*outcomes), ["5.0", "5.1"])
    assert line in text.splitlines()
    assert ("no net." in text) == any("no net" in outcome for outcome in outcomes)


def test_nothing_fails():
    assert [row for row in page.read() if row["outcome"] == "failed"] == []


def test_every_claim_has_a_result(request):
    """Of the tests collected now: a claim that is new or reworded needs a new table."""
    own = [row for row in page.read() if row["transformers"] == transformers.__version__]
    if not own:
        pytest.skip(f"no table for transformers {transformers.__version__}, see claims.py")
    known = {(row["topic"], row["claim"], row["verdict"], row["how we know"]) for row in own}
    asked = {claim for item in request.session.items for claim in claims.of(item)}
    assert asked - known == set()
