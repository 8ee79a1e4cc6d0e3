"""The page "What works, what does not, how we know" is the one that the tests' results make."""

import pytest
import transformers

from trust import claims, page


def test_the_page_is_made_of_the_results():
    assert page.PAGE.read_text() == page.render(), "run python tests/trust/page.py"


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
