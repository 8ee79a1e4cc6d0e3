"""Selecting and recycling, whatever the importance holds: ties, NaN, infinities, and whoever sits beside."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from illava import merge

RULES = ("recycle", "prune", "linear")
IMPORTANCE = st.sampled_from([0.0, 1.0, 0.5, -1.0, float("nan"), float("inf"), float("-inf"), 1e-45, 3e38])
MORE = dict(max_examples=60)


@st.composite
def cases(draw):
    """Segments of a call, what each keeps, and the importance of every place, padding included."""
    counts = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    kept = [draw(st.integers(1, n)) for n in counts]
    width = max(counts)
    importance = [draw(st.lists(IMPORTANCE, min_size=width, max_size=width)) for _ in counts]
    return counts, kept, torch.tensor(importance), draw(st.integers(0, 3)), draw(st.integers(1, 7))


def decide(counts, kept, importance, spare, members, *, rule, features=None, share=0.5):
    """The segments' units lie end to end, `spare` units of no segment behind them."""
    total = sum(counts) + spare
    starts = torch.tensor([0, *counts]).cumsum(0)[:-1, None]
    index = (starts + torch.arange(max(counts))).clamp(max=total - 1)  # past a segment: its neighbour's
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(total, 1, 4, 8, generator=generator)
    keys = torch.randn(total, 1, 2, 8, generator=generator)
    if features is not None:
        queries, keys = queries + features[:, None, None, :1], keys + features[:, None, None, :1]
    return merge.select(
        importance, index, counts, kept, total_units=total, rule=rule, members=members, queries=queries,
        keys=keys, scale=8**-0.5, recycled_share=share,
    )  # fmt: skip


@pytest.mark.claim("Odd inputs", "ties, NaN and infinite scores", "works", "the plan's count is kept exactly")
@pytest.mark.parametrize("rule", RULES)
@given(case=cases())
@settings(**MORE)
def test_whatever_the_scores_the_plan_is_kept(rule, case):
    counts, kept, importance, spare, members = case
    decision = decide(*case, rule=rule)
    units = decision.keep.split([*counts, spare])
    assert [int(own.sum()) for own in units] == [*kept, spare]
    assert decision.kept_counts == tuple(kept)
    start = 0
    for row, (count, number) in enumerate(zip(counts, kept, strict=True)):
        own = decision.kept_table[row, :number].tolist()
        assert own == sorted(set(own)), "in their own order, none twice"
        assert own == [start + i for i in range(count) if units[row][i]]
        start += count


@pytest.mark.parametrize("rule", ["recycle", "linear"])
@given(case=cases())
@settings(**MORE)
def test_weights_sum_to_one_and_groups_stay_in_their_segment(rule, case):
    counts, _, _, spare, members = case
    decision = decide(*case, rule=rule)
    own = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    own = torch.cat([own, torch.full((spare,), -1)])
    torch.testing.assert_close(decision.weights.sum(dim=1), torch.ones(len(decision.recycled)))
    assert (decision.weights >= 0).all()
    assert decision.keep[decision.recycled].all()
    used = own[decision.sources] == own[decision.recycled][:, None]
    assert used.all(), "a weight of 0 is no protection from a neighbour's NaN"
    assert ((decision.sources == decision.recycled[:, None]) & (decision.weights > 0)).any(dim=1).all()


@pytest.mark.claim(
    "Odd inputs", "NaN in one picture of a call", "works", "its neighbours keep the same units, bit by bit"
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("rule", RULES)
@given(case=cases())
@settings(**MORE)
def test_what_is_not_finite_stays_in_its_segment(rule, bad, case):
    """The first segment's features, and so its queries and keys, are not finite; the others' are."""
    counts, kept, importance, spare, members = case
    first = counts[0]
    features = torch.randn(sum(counts) + spare, 6, generator=torch.Generator().manual_seed(1))
    broken = features.index_fill(0, torch.arange(first), bad)
    results = []
    for x in (features, broken):
        decision = decide(*case, rule=rule, features=x)
        results.append((decision.keep[first:], decision.blend(x)[first:]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
