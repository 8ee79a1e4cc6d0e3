"""Other ways to group tokens (accuracy_rules.py), each against its definition written anew with loops."""

import math

import accuracy_rules as rules
import pytest
import torch

import illava
from contract import tools
from zoo.common import Image


def likeness(one, other):
    return float(torch.nn.functional.cosine_similarity(one, other, dim=0))


def points(count, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=draw), torch.randint(1, 4, (count,), generator=draw).float()


def greedily(x, sizes, keep):
    groups = [[i] for i in range(len(x))]

    def mean(group):
        return sum(sizes[i] * x[i] for i in group) / sum(sizes[i] for i in group)

    while len(groups) > keep:
        pairs = [(a, b) for a in range(len(groups)) for b in range(a)]
        a, b = max(pairs, key=lambda pair: likeness(mean(groups[pair[0]]), mean(groups[pair[1]])))
        groups[b] += groups.pop(a)
    return groups


def by_means(x, sizes, keep):
    x = [v / v.norm() for v in x]
    centres = [x[round(i * (len(x) - 1) / max(1, keep - 1))] for i in range(keep)]
    for _ in range(rules.ITERATIONS):
        group = [max(range(keep), key=lambda k, v=v: likeness(v, centres[k])) for v in x]
        for k in range(keep):
            if mine := [i for i in range(len(x)) if group[i] == k]:
                centres[k] = sum(sizes[i] * x[i] for i in mine)
    group = [max(range(keep), key=lambda k, v=v: likeness(v, centres[k])) for v in x]
    near = [likeness(v, centres[k]) for v, k in zip(x, group, strict=True)]
    groups = [[i for i in range(len(x)) if group[i] == k] for k in sorted(set(group))]
    places = [max(mine, key=lambda i: near[i]) for mine in groups]
    for i in sorted(set(range(len(x))) - set(places), key=lambda i: near[i])[: keep - len(groups)]:
        next(mine for mine in groups if i in mine).remove(i)
        groups.append([i])
    return groups


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("keep", [1, 2, 5, 11, 12])
@pytest.mark.parametrize(("group", "slowly"), [(rules.greedy, greedily), (rules.k_means, by_means)])
def test_groups_are_those_of_the_definition(group, slowly, keep, seed):
    x, sizes = points(12, seed)
    owner = group(x, sizes, keep)
    found = [[i for i in range(12) if owner[i] == place] for place in owner.unique().tolist()]
    assert sorted(found) == sorted(sorted(mine) for mine in slowly(x, sizes, keep))
    assert len(found) == keep
    assert all(place in mine for place, mine in zip(owner.unique().tolist(), found, strict=True))


def test_k_means_fills_up_groups_that_lost_their_units():
    x = torch.ones(8, 3) + torch.arange(8)[:, None] * torch.tensor([0, 0, 1e-3])  # all but one direction
    x[7] = torch.tensor([-1.0, 0, 0])
    owner = rules.k_means(torch.cat((x[:1].expand(6, 3), x[6:])), torch.ones(8), 5)
    assert len(owner.unique()) == 5


def merged(family, settings, monkeypatch):
    """Every merge of a call by a rule: what was to choose from, and the decision."""
    seen = tools.watch_decisions(monkeypatch)
    model = tools.build(family)
    inputs = tools.prompt(family, [5, Image(140, 168, 1), 7], [4, Image(112, 84, 2), 3])
    layers = {"vit_layers": (1,), "llm_layers": (0, 1)}
    with illava.patch(model, reduction=0.7, **layers, **settings):
        tools.forward(model, inputs)
    assert {c.stage for c, _ in seen} == {"vit", "llm"}
    return seen


@pytest.mark.parametrize("name", rules.RULES)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl"])
def test_each_rule_leaves_as_many_as_asked_and_loses_what_it_says(family, name, monkeypatch):
    seen = merged(family, rules.RULES[name], monkeypatch)
    for c, decision in seen:
        assert decision.kept_counts == c.keep_counts
        if name == "random":
            assert decision.mixture is None
            continue
        for row, (units, keep) in enumerate(zip(c.counts, c.keep_counts, strict=True)):
            weights = decision.mixture[row, :keep, :units]
            torch.testing.assert_close(weights.sum(1), torch.ones(keep))
            assert (weights > 0).sum() == units  # each goes into one, none is lost


def test_a_recycled_unit_may_keep_a_share_of_its_own(monkeypatch):
    paper = merged("qwen2_5_vl", {"merge": "recycle"}, monkeypatch)
    for own in (0.0, 0.8):
        monkeypatch.undo()
        seen = merged("qwen2_5_vl", rules.keeping(own), monkeypatch)
        c, decision = seen[0]
        _, made = paper[0]  # of the same features: the first merge of each call
        assert torch.equal(decision.keep, made.keep)
        expected = made.blend(c.features)
        expected = own * c.features + (1 - own) * expected
        torch.testing.assert_close(decision.blend(c.features)[decision.keep], expected[made.keep])
        assert len(made.recycled) > 0
        assert not math.isclose(float((expected - c.features)[made.keep].abs().max()), 0)
