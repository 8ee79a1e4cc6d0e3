"""Selecting and recycling, against loops that say what they mean."""

import itertools
import math

import pytest
import torch

from illava import groups as groups_module
from illava.groups import affinity, recycled_count
from illava.merge import compact, select

D, HEADS, KEY_HEADS = 8, 4, 2


class Case:
    """Segments scattered over `total` units, with random importance, queries and keys."""

    def __init__(self, counts, *, unit=1, spare=3, heads=HEADS, key_heads=KEY_HEADS, seed=0, ties=False):
        g = torch.Generator().manual_seed(seed)
        self.counts, self.unit = list(counts), unit
        self.total = sum(counts) + spare
        places = torch.randperm(self.total, generator=g)[: sum(counts)].split(self.counts)
        self.units = [p.sort().values.tolist() for p in places]  # ascending within a segment
        self.index = torch.zeros(len(counts), max(counts), dtype=torch.long)
        self.importance = torch.full(self.index.shape, 1e9)  # padding may hold anything
        for row, units in enumerate(self.units):
            values = torch.rand(len(units), generator=g)
            self.importance[row, : len(units)] = (values * 3).round() if ties else values
            self.index[row, : len(units)] = torch.tensor(units)
        self.queries = torch.randn(self.total, unit, heads, D, generator=g)
        self.keys = torch.randn(self.total, unit, key_heads, D, generator=g)
        self.features = torch.randn(self.total, unit, D, generator=g)

    def select(self, keep_counts, **options):
        return select(
            self.importance, self.index, self.counts, keep_counts, total_units=self.total,
            queries=self.queries, keys=self.keys, scale=D**-0.5, **options,
        )  # fmt: skip

    def ranking(self, segment):
        """Units of a segment, the most important first; of equals the earlier first."""
        values = self.importance[segment].tolist()
        return [
            u for _, u in sorted(enumerate(self.units[segment]), key=lambda pair: (-values[pair[0]], pair[1]))
        ]

    def affinity(self, unit, targets):
        """Softmax over all tokens of all targets, averaged over heads and both units' tokens."""
        heads, per_key = self.queries.shape[2], self.queries.shape[2] // self.keys.shape[2]
        totals = [0.0] * len(targets)
        for head, slot in itertools.product(range(heads), range(self.unit)):
            q = self.queries[unit, slot, head]
            logits = [
                [(q @ self.keys[t, s, head // per_key]).item() * D**-0.5 for s in range(self.unit)]
                for t in targets
            ]
            norm = sum(math.exp(x) for row in logits for x in row)
            for number, row in enumerate(logits):
                totals[number] += sum(math.exp(x) / norm for x in row) / self.unit
        return [t / (heads * self.unit) for t in totals]

    def loop(self, keep_counts, *, rule="recycle", share=0.05, members=5):
        """The whole decision, one segment and one unit at a time: keep, {recycled: {source: weight}}."""
        keep, groups = set(range(self.total)), {}
        for segment, (count, kept) in enumerate(zip(self.counts, keep_counts, strict=True)):
            if kept == count:
                continue
            ranked = self.ranking(segment)
            keep -= set(ranked[kept:])
            if rule == "linear":
                absorbed = ranked[kept - 1 :]  # the last survivor, then the dropped, the least important last
                total = sum(range(1, len(absorbed) + 1))
                groups[absorbed[0]] = {u: (n + 1) / total for n, u in enumerate(absorbed)}
            if rule == "recycle":
                c = min(kept, max(1, round(share * kept)))
                targets = ranked[kept - c :]
                for unit in targets[:c]:
                    scores = dict(zip(targets, self.affinity(unit, targets), strict=True))
                    others = sorted((t for t in targets if t != unit), key=lambda t: -scores[t])
                    group = [unit, *others[: members - 1]]
                    groups[unit] = {u: scores[u] / sum(scores[g] for g in group) for u in group}
        return keep, groups

    def blend(self, groups):
        out = self.features.clone()
        for unit, group in groups.items():
            for slot in range(self.unit):
                out[unit, slot] = sum(w * self.features[u, slot] for u, w in group.items())
        return out


def groups_of(decision):
    """The decision's groups as `{recycled: {source: weight}}`, unused places left out."""
    found = {}
    for unit, sources, weights in zip(
        decision.recycled.tolist(), decision.sources.tolist(), decision.weights.tolist(), strict=True
    ):
        assert unit not in found
        real = [(s, w) for s, w in zip(sources, weights, strict=True) if w > 0]
        assert len({s for s, _ in real}) == len(real), "a unit counted twice in a group"
        found[unit] = dict(real)
    return found


def assert_same_groups(found, expected):
    assert found.keys() == expected.keys()
    for unit, group in expected.items():
        assert found[unit] == pytest.approx(group, abs=1e-5)


RAGGED = {
    "one segment": ([12], [7]),
    "one survivor": ([9], [1]),
    "ragged": ([12, 3, 7, 1, 20], [6, 2, 1, 1, 15]),
    "some lose nothing": ([6, 8, 5], [6, 3, 5]),
    "one unit less": ([5, 9], [4, 8]),
}


@pytest.mark.parametrize("unit", [1, 4])
@pytest.mark.parametrize(
    "options",
    [
        dict(rule="recycle"),
        dict(rule="recycle", share=0.5),
        dict(rule="recycle", share=1.0, members=3),
        dict(rule="recycle", share=0.4, members=1),
        dict(rule="recycle", share=0.3, members=100),
        dict(rule="prune"),
        dict(rule="linear"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", RAGGED)
def test_decision_and_features_are_those_of_the_loop(name, options, unit):
    counts, keep_counts = RAGGED[name]
    case = Case(counts, unit=unit, seed=len(name))
    keep, groups = case.loop(keep_counts, **options)
    named = {"recycled_share" if k == "share" else k: v for k, v in options.items()}
    decision = case.select(keep_counts, **named)
    assert decision.keep.nonzero().flatten().tolist() == sorted(keep)
    assert_same_groups(groups_of(decision), groups)
    torch.testing.assert_close(decision.blend(case.features), case.blend(groups), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rule", ["recycle", "prune", "linear"])
def test_table_lists_each_segments_survivors_in_their_own_order(rule):
    counts, keep_counts = RAGGED["ragged"]
    case = Case(counts)
    decision = case.select(keep_counts, rule=rule)
    assert decision.kept_counts == tuple(keep_counts)
    for segment, kept in enumerate(keep_counts):
        row = decision.kept_table[segment, :kept].tolist()
        assert row == sorted(case.ranking(segment)[:kept])
    assert decision.keep.sum() == case.total - sum(counts) + sum(keep_counts)


def test_units_of_no_segment_survive():
    case = Case([4, 5], spare=6)
    decision = case.select([1, 1])
    outside = set(range(case.total)) - set(sum(case.units, []))
    assert len(outside) == 6
    assert decision.keep[sorted(outside)].all()
    assert not outside & set(decision.sources.flatten().tolist())


@pytest.mark.parametrize("rule", ["recycle", "prune", "linear"])
def test_of_equals_the_earlier_unit_wins(rule):
    case = Case([10], spare=0)
    case.importance[:] = 0.5
    decision = case.select([4], rule=rule)
    assert decision.kept_table.tolist() == [[0, 1, 2, 3]]
    if rule != "prune":
        assert decision.recycled.tolist() == [3], "the last of the kept recycles"


@pytest.mark.parametrize("seed", range(5))
def test_ties_within_a_random_ranking(seed):
    case = Case([15, 8], seed=seed, ties=True)
    keep, groups = case.loop([7, 3], share=0.4)
    decision = case.select([7, 3], recycled_share=0.4)
    assert decision.keep.nonzero().flatten().tolist() == sorted(keep)
    assert_same_groups(groups_of(decision), groups)


@pytest.mark.parametrize("rule", ["recycle", "prune", "linear"])
def test_segments_that_keep_everything_are_left_exactly_as_they_are(rule):
    case = Case([5, 8])
    decision = case.select([5, 8], rule=rule)
    assert decision.keep.all()
    assert decision.recycled.numel() == 0
    assert decision.blend(case.features) is case.features


def test_a_segment_that_keeps_everything_does_not_recycle_beside_one_that_does():
    case = Case([5, 8])
    decision = case.select([5, 2], recycled_share=1.0)
    assert set(decision.recycled.tolist()) <= set(case.units[1])
    blended = decision.blend(case.features)
    assert torch.equal(blended[case.units[0]], case.features[case.units[0]])


@pytest.mark.parametrize("counts", [([9], [4]), ([9, 2, 30], [4, 1, 3])])
@pytest.mark.parametrize("members", [1, 2, 5, 64])
@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_groups(counts, members, share):
    """Weights sum to 1, a recycled unit is in its own group, nobody joins another segment's group."""
    case = Case(counts[0])
    decision = case.select(counts[1], recycled_share=share, members=members)
    torch.testing.assert_close(decision.weights.sum(1), torch.ones(len(decision.recycled)))
    assert decision.weights.dtype == torch.float32
    assert decision.weights.min() >= 0
    assert decision.keep[decision.recycled].all()
    for unit, group in groups_of(decision).items():
        segment = next(s for s, units in enumerate(case.units) if unit in units)
        assert unit in group
        assert set(group) <= set(case.units[segment])
        targets = counts[0][segment] - counts[1][segment]
        targets += recycled_count(counts[1][segment], targets, share)
        assert len(group) == min(members, targets)
        informative = case.ranking(segment)[: counts[0][segment] - targets]
        assert not set(group) & set(informative), "informative units give nothing away"


def test_a_unit_of_which_nobody_thinks_much_is_still_in_its_own_group():
    """Self is a member even where every other unit has a higher affinity."""
    case = Case([10], spare=0, heads=1, key_heads=1)
    recycled = case.ranking(0)[2]
    case.queries[:] = torch.ones(D) * 4
    case.keys[:] = torch.ones(D)
    case.keys[recycled] = -1.0
    group = groups_of(case.select([3], members=2))[recycled]
    assert group[recycled] < 1e-3
    assert len(group) == 2


@pytest.mark.parametrize(
    ("kept", "removed", "share", "expected"),
    [
        (100, 1, 0.05, 5),
        (4, 1, 0.05, 1),
        (1, 9, 0.05, 1),
        (10, 5, 1.0, 10),
        (10, 0, 0.5, 0),
        (30, 5, 0.05, 2),
    ],
)
def test_how_many_recycle(kept, removed, share, expected):
    assert recycled_count(kept, removed, share) == expected


def test_the_least_important_weighs_most_in_the_linear_rule():
    """First version: R + 1 for the least important down to 1 for the one that carries the sum."""
    case = Case([6], spare=0)
    decision = case.select([3], rule="linear")
    ranked = case.ranking(0)
    assert decision.recycled.tolist() == [ranked[2]]
    expected = {ranked[2]: 0.1, ranked[3]: 0.2, ranked[4]: 0.3, ranked[5]: 0.4}
    assert groups_of(decision)[ranked[2]] == pytest.approx(expected)


def test_recycling_needs_queries_and_keys_and_the_other_rules_do_not():
    case = Case([6])
    without = dict(total_units=case.total)
    with pytest.raises(ValueError, match="'recycle' needs the layer's queries and keys"):
        select(case.importance, case.index, [6], [3], **without)
    for rule in ("prune", "linear"):
        select(case.importance, case.index, [6], [3], rule=rule, **without)


# ---------------------------------------------------------------- features


@pytest.mark.parametrize("unit", [2, 4])
def test_the_inner_layout_of_a_unit_survives(unit):
    """Slot s of a merged unit is made of slots s alone: the slots' own labels come out unmixed."""
    case = Case([12, 9], unit=unit)
    labels = torch.arange(unit).float()[None, :, None].expand(case.total, unit, 1)
    blended = case.select([4, 2], recycled_share=1.0).blend(labels)
    torch.testing.assert_close(blended, labels)


@pytest.mark.parametrize("rule", ["recycle", "prune", "linear"])
def test_constant_features_stay_constant(rule):
    case = Case([20, 5])
    constant = torch.full((case.total, 3), 2.5)
    torch.testing.assert_close(case.select([4, 1], rule=rule).blend(constant), constant)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_blending_keeps_type_and_shape_and_touches_recycled_units_only(dtype):
    case = Case([20, 5], unit=4)
    features = case.features.to(dtype)
    before = features.clone()
    decision = case.select([8, 2], recycled_share=0.3)
    blended = decision.blend(features)
    others = torch.ones(case.total, dtype=torch.bool)
    others[decision.recycled] = False
    assert blended.dtype == dtype
    assert blended.shape == features.shape
    assert torch.equal(blended[others], features[others])
    assert not torch.isclose(blended[~others], features[~others]).flatten(1).all(1).any()
    assert torch.equal(features, before), "in place"


def test_blending_hands_gradients_to_every_member_by_its_weight():
    case = Case([10], spare=1)
    features = case.features.clone().requires_grad_()
    decision = case.select([4], members=3)
    unit = decision.recycled.item()
    decision.blend(features)[unit].sum().backward()
    expected = torch.zeros(case.total)
    for source, weight in groups_of(decision)[unit].items():
        expected[source] = weight
    torch.testing.assert_close(features.grad, expected[:, None, None].expand_as(features))


def test_blending_gradients_against_finite_differences():
    case = Case([8], unit=2)
    features = case.features.double().requires_grad_()
    decision = case.select([3], recycled_share=0.7)
    # The sum is taken in fp32, hence the loose step and tolerance.
    assert torch.autograd.gradcheck(decision.blend, features, eps=1e-2, atol=1e-3)


# ---------------------------------------------------------------- parts


@pytest.mark.parametrize("seed", range(4))
def test_compact_pushes_kept_places_to_the_right(seed):
    keep = torch.rand(5, 12, generator=torch.Generator().manual_seed(seed)) < 0.5
    keep[0], keep[1] = True, False
    index = compact(keep, 12)
    for row in range(5):
        places = keep[row].nonzero().flatten().tolist()
        assert index[row].tolist()[12 - len(places) :] == places
        assert sorted(index[row].tolist()) == list(range(12))
    short = compact(keep[2:], int(keep[2:].sum(1).max()))
    for row, line in zip(keep[2:], short.tolist(), strict=True):
        places = row.nonzero().flatten().tolist()
        assert line[len(line) - len(places) :] == places
        assert not row[line[: len(line) - len(places)]].any()


def test_compact_to_nothing():
    assert compact(torch.zeros(2, 3, dtype=torch.bool), 0).shape == (2, 0)


def affinity_inputs(unit, heads=HEADS, key_heads=KEY_HEADS):
    g = torch.Generator().manual_seed(unit)
    queries = torch.randn(3, 5, unit, heads, D, generator=g)
    keys = torch.randn(3, 11, unit, key_heads, D, generator=g)
    is_target = torch.arange(11)[None] < torch.tensor([11, 6, 8])[:, None]
    return queries, keys, is_target


@pytest.mark.parametrize("unit", [1, 4])
@pytest.mark.parametrize("limit", [1, 1200, 5000])
def test_affinity_in_blocks_is_affinity_in_one(unit, limit, monkeypatch):
    queries, keys, is_target = affinity_inputs(unit)
    whole = affinity(queries, keys, is_target, 0.3)
    calls = []
    matmul = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: calls.append(1) or matmul(a, b))
    monkeypatch.setattr(groups_module, "BLOCK_ELEMENTS", limit)
    blocks = affinity(queries, keys, is_target, 0.3)
    if limit == 1:
        assert len(calls) == 5, "one recycled unit at a time"
    torch.testing.assert_close(blocks, whole, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("unit", [1, 4])
def test_affinity_is_a_share_of_the_real_targets(unit):
    """Summed over targets and their tokens it is 1; padding gets nothing."""
    queries, keys, is_target = affinity_inputs(unit)
    scores = affinity(queries, keys, is_target, 0.3)
    assert scores.shape == (3, 5, 11)
    torch.testing.assert_close(scores.sum(-1) * unit, torch.ones(3, 5))
    assert (scores[~is_target[:, None].expand_as(scores)] == 0).all()
    garbage = keys.clone()
    garbage[~is_target] = 1e4
    assert torch.equal(affinity(queries, garbage, is_target, 0.3), scores)


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 1), (4, 2), (6, 3), (4, 4)])
def test_grouped_query_heads_share_their_keys(heads, key_heads):
    queries, keys, is_target = affinity_inputs(2, heads, key_heads)
    repeated = keys.repeat_interleave(heads // key_heads, dim=3)
    one, other = affinity(queries, keys, is_target, 0.3), affinity(queries, repeated, is_target, 0.3)
    torch.testing.assert_close(one, other)
    if heads > key_heads > 1:
        wrong = keys.repeat(1, 1, 1, heads // key_heads, 1)  # heads taken in turn, not in groups
        assert not torch.allclose(one, affinity(queries, wrong, is_target, 0.3), atol=1e-3)


def test_low_precision_queries_are_scored_in_fp32():
    queries, keys, is_target = affinity_inputs(1)
    scores = affinity(queries.bfloat16(), keys.bfloat16(), is_target, 0.3)
    assert scores.dtype == torch.float32
    exact = affinity(queries.bfloat16().float(), keys.bfloat16().float(), is_target, 0.3)
    torch.testing.assert_close(scores, exact)


def test_a_group_of_one_keeps_its_features_whatever_its_affinity():
    """members=1 absorbs nothing: the recycled unit stays as it is, weight 1."""
    case = Case([10], spare=0, heads=1, key_heads=1)
    case.queries[:] = torch.ones(D) * 40
    case.keys[:] = torch.ones(D)
    case.keys[case.ranking(0)[2]] = -1.0
    decision = case.select([3], members=1)
    assert decision.weights.tolist() == [[1.0]]
