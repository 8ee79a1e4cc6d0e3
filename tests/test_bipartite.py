"""Bipartite soft matching: rounds, ragged segments, weights, and what becomes of it in a model."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import illava
import zoo
from contract import tools
from illava import bipartite
from illava.errors import PlanError
from illava.families.layout import Layout
from illava.schedule import resolve
from illava.tracing import _sources
from illava.vision import VisionCall
from illava.vision_scores import BlockAttention
from references.core import pairs_joined
from zoo.common import Image


def segments(counts, seed=0, g=2, d=5):
    """Features, sizes and a table of units of segments that lie one behind the other."""
    draw = torch.Generator().manual_seed(seed)
    total = sum(counts)
    features = torch.randn(total, g, d, generator=draw)
    sizes = torch.randint(1, 5, (total,), generator=draw).float()
    starts = torch.tensor([0, *counts]).cumsum(0)[:-1]
    index = (starts[:, None] + torch.arange(max(counts))).clamp(max=total - 1)
    return features, sizes, index


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("counts", "keeps"),
    [
        ((8,), (5,)),
        ((9,), (5,)),
        ((9,), (4,)),
        ((11,), (1,)),
        ((6, 11, 1, 2), (5, 2, 1, 1)),
        ((7, 7), (7, 3)),
    ],
)
def test_pairs_are_those_of_the_definition(counts, keeps, seed):
    features, sizes, index = segments(counts, seed)
    made = bipartite.join(features, sizes, index, counts, keeps)
    blended, grown = made.blend(features), made.grow(sizes)
    assert made.kept_counts == keeps
    for row, (count, keep) in enumerate(zip(counts, keeps, strict=True)):
        own = index[row, :count]
        weights = sizes[own].tolist()
        kept, grew, expected = pairs_joined(features[own], count - keep, weights)
        assert own[made.keep[own]].tolist() == own[kept].tolist()
        assert made.kept_table[row, :keep].tolist() == own[kept].tolist()
        torch.testing.assert_close(blended[own[kept]].flatten(0, 1), expected)
        assert grown[own[kept]].tolist() == weights
        assert ((grown[own] > sizes[own]) & made.keep[own]).nonzero().flatten().tolist() == grew


@pytest.mark.parametrize("penalty", [0.1, 0.7, 2.0])
@pytest.mark.parametrize("keeps", [(9, 5, 1), (3, 2, 1), (1, 1, 1)])
def test_what_stands_apart_is_less_alike(keeps, penalty):
    """Up to where neighbours always come first."""
    counts = (18, 7, 2)
    features, sizes, index = segments(counts, seed=8)
    draw = torch.Generator().manual_seed(9)
    grid = torch.stack([torch.randint(0, side, (27,), generator=draw) for side in (3, 4, 9)], dim=1)
    joining = dict(distance_penalty=penalty, grid=grid)
    made = bipartite.join(features, sizes, index, counts, keeps, **joining)
    blended = made.blend(features)
    for row, (count, keep) in enumerate(zip(counts, keeps, strict=True)):
        own = index[row, :count]
        kept, _, expected = pairs_joined(
            features[own], count - keep, sizes[own].tolist(), None, penalty, grid[own].tolist()
        )
        assert own[made.keep[own]].tolist() == own[kept].tolist()
        torch.testing.assert_close(blended[own[kept]].flatten(0, 1), expected)
    anywhere = bipartite.join(features, sizes, index, counts, keeps)
    assert keeps == (1, 1, 1) or not torch.equal(anywhere.owner, made.owner)


def test_equal_things_far_apart_stay_two():
    """Two equal pairs at the ends of a row: without a penalty all four become one before the rest does."""
    features = torch.eye(6)[[0, 0, 1, 2, 3, 4, 0, 0]][:, None]  # [8, 1, 6]
    sizes, index = torch.ones(8), torch.arange(8)[None]
    grid = torch.stack((torch.zeros(8), torch.zeros(8), torch.arange(8)), dim=1).long()
    apart = bipartite.join(features, sizes, index, (8,), (6,), distance_penalty=0.1, grid=grid)
    assert apart.owner.tolist() == [1, 1, 2, 3, 4, 5, 7, 7]
    anywhere = bipartite.join(features, sizes, index, (8,), (6,))
    assert anywhere.owner.tolist() == [1, 1, 2, 3, 4, 5, 1, 7]


LAYOUTS = {
    "windows": Layout(((1, 8, 12), (2, 6, 10)), 2, window_side=2),
    "tiles with CLS": Layout(((1, 8, 8),) * 2, 2, raster=True, prefix=1, row_tokens=65),
    "single patches": Layout(((1, 3, 5), (1, 4, 2)), 1, raster=True, row_tokens=15),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_units_stand_where_their_patches_do(layout):
    raster, patches, first = layout.raster_units().tolist(), layout.patches().tolist(), 0
    places = iter(zip(raster, layout.places.tolist(), strict=True))
    for frame, (height, width) in enumerate(layout.frames):
        for _ in range(layout.frame_units[frame]):
            number, place = next(places)
            row, column = divmod(min(patches[number]) - first, width)
            assert place == [frame, row // layout.side, column // layout.side]
        first += height * width
    assert len({tuple(place) for place in layout.places.tolist()}) == layout.total_units


def test_units_that_take_in_none_are_left_bit_for_bit():
    features, sizes, index = segments((12, 5))
    features = features.to(torch.bfloat16)
    made = bipartite.join(features, sizes, index, (12, 5), (10, 5))
    same = made.grow(sizes) == sizes
    assert same.sum() > 10
    assert torch.equal(made.blend(features)[same], features[same])
    nothing = bipartite.join(features, sizes, index, (12, 5), (12, 5))
    assert nothing.keep.all()
    assert torch.equal(nothing.blend(features), features)


def test_segments_have_nothing_to_do_with_each_other_nor_with_padding():
    features, sizes, index = segments((6, 11, 3), seed=5)
    together = bipartite.join(features, sizes, index, (6, 11, 3), (3, 6, 2))
    alone = bipartite.join(features, sizes, index[1:2], (11,), (6,))
    assert torch.equal(together.owner[6:17], alone.owner[6:17])
    assert torch.equal(together.blend(features)[6:17], alone.blend(features)[6:17])
    assert alone.keep[:6].all()  # units of no segment stay
    assert torch.equal(alone.blend(features)[:6], features[:6])


def test_what_is_not_finite_goes_into_nothing_before_others_have():
    features, sizes, index = segments((8,), seed=2)
    features[2] = float("nan")
    features[5] = float("inf")
    made = bipartite.join(features, sizes, index, (8,), (5,))
    assert made.keep[2]
    assert made.keep[5]
    left = made.blend(features)[made.keep]
    assert left.isfinite().flatten(1).all(1).sum() == 3  # the two, and no third


def test_gradients_reach_all_that_went_in():
    features, sizes, index = segments((9,), seed=3)
    made = bipartite.join(features, sizes, index, (9,), (4,))
    x = features.clone().requires_grad_()
    made.blend(x)[made.keep].sum().backward()
    share = sizes / torch.zeros(9).index_add(0, made.owner, sizes)[made.owner]
    torch.testing.assert_close(x.grad, share[:, None, None].expand_as(x))


def test_the_record_says_of_what_each_is_made():
    features, sizes, index = segments((9, 4), seed=4)
    made = bipartite.join(features, sizes, index, (9, 4), (3, 2))
    unit, source, weight = _sources(made, made.keep)
    matrix = torch.zeros(13, 13).index_put((unit, source), weight)
    torch.testing.assert_close(
        (matrix @ features.flatten(1))[made.keep], made.blend(features).flatten(1)[made.keep]
    )
    torch.testing.assert_close(matrix.sum(1), made.keep.float())


@tools.each_family
def test_every_patch_is_accounted_for(family):
    """Provenance adds up: none is lost in the encoder, all weights of a token are 1."""
    model, inputs = tools.build(family), tools.prompt_of(family, tools.mixed(family))
    with tools.patch(
        model, family, trace=True, reduction=0.7, llm_layers=(), vit_merge="bipartite"
    ) as handle:
        tools.forward(model, inputs)
    for own in handle.report.provenance:
        for step in own.merges:
            rows = step.sources.to_dense()
            torch.testing.assert_close(rows.sum(1), torch.ones(len(rows)))
            assert (rows > 0).any(0).all()


@tools.each_family
def test_every_token_is_accounted_for_in_both_stages(family):
    """What the language model was given is all there after its last merge; all weights of a token are 1."""
    model, inputs = tools.build(family), tools.prompt_of(family, tools.mixed(family))
    with tools.patch(model, family, trace=True, reduction=0.7, merge="bipartite") as handle:
        tools.forward(model, inputs)
    seen = 0
    for own in handle.report.provenance:
        entered = (own.entry.sources.to_dense() > 0).any(0)  # [P]
        for step in own.merges:
            rows = step.sources.to_dense()
            torch.testing.assert_close(rows.sum(1), torch.ones(len(rows)))
            if step.stage == "llm":
                assert ((rows > 0).any(0) == entered).all()
                seen += 1
    assert seen


@pytest.mark.parametrize("rule", [dict(merge="recycle", vit_merge="bipartite"), {}], ids=str)
def test_a_batch_says_what_its_rows_say(rule):
    family = "qwen2_5_vl"
    model, rows = tools.build(family), [[5, Image(140, 168), 7], [4, Image(112, 84), 3, Image(84, 84), 6]]
    with illava.patch(model, reduction=0.7, **rule):
        inputs = tools.prompt(family, *rows)
        together = tools.forward(model, inputs).logits
        for number, row in enumerate(rows):
            alone = tools.forward(model, tools.prompt(family, row, seeds=[number])).logits[0]
            real = inputs["attention_mask"][number].bool()
            torch.testing.assert_close(together[number, real], alone, atol=1e-5, rtol=1e-5)


LAYERS = {"qwen2_5_vl": (0, 2), "internvl": ("input", 1), "minicpmv4_6": (0, 1, 3)}  # its layer 0 is linear


@pytest.mark.parametrize("family", [family for family in LAYERS if family in zoo.FAMILIES])
def test_the_language_model_needs_no_attention_for_it(family, monkeypatch):
    """Nor do its layers attend otherwise than they would, so that each of them can merge, and its input."""

    def fail(*args, **kwargs):
        raise AssertionError("statistics that nobody reads")

    monkeypatch.setattr("illava.language.attention_importance", fail)
    model, inputs = tools.build(family), tools.prompt_of(family, tools.mixed(family))
    with illava.patch(model, llm_layers=LAYERS[family], reduction=0.7) as handle:
        tools.forward(model, inputs)
    assert handle.plan.scored_at == {}
    assert all(picture.reduction > 0.6 for picture in handle.report.pictures)
    ranked = illava.patch(model, reduction=0.7, merge="recycle")
    with ranked, pytest.raises(AssertionError, match="nobody reads"):
        tools.forward(model, inputs)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_the_encoder_keeps_no_attention_for_it(family, monkeypatch):
    kept = []
    made = BlockAttention.__init__
    monkeypatch.setattr(BlockAttention, "__init__", lambda *args: kept.append(1) or made(*args))
    model, inputs = tools.build(family), tools.prompt_of(family, tools.mixed(family))
    with illava.patch(model, **tools.DEFAULT) as handle:
        tools.forward(model, inputs)
        assert any(picture.entered_tokens < picture.tokens for picture in handle.report.pictures)
    assert not kept
    with illava.patch(model, **tools.DEEP):
        tools.forward(model, inputs)
    assert kept


def test_rules_are_named():
    with pytest.raises(PlanError, match="merge='greedy' is not known"):
        illava.Plan(merge="greedy")
    with pytest.raises(PlanError, match="vit_merge='greedy' is not known"):
        illava.Plan(vit_merge="greedy")
    plan = illava.Plan(vit_merge="bipartite", merge="prune")
    assert illava.Plan.from_json(plan.to_json()) == plan
    assert illava.Plan.from_json("{}") == replace(plan, vit_merge=None, merge="bipartite")


@pytest.mark.parametrize("rule", ["bipartite", "recycle"])
def test_whether_observed_attention_is_finite(rule):
    """Of published code, whose attention is its own; padding may hold anything."""
    parts = SimpleNamespace(full_attention_blocks={0, 1}, window_patches=0, dead_rows=-torch.inf, regrid=None)
    plan = resolve(
        illava.Plan((0, 1), (), 0.5, merge=rule),
        vit_ranked=(), llm_ranked=(), vit_depth=2, llm_depth=2, merge_size=1,
    )  # fmt: skip
    call = VisionCall(plan, parts, LAYOUTS["single patches"], torch.device("cpu"), "sdpa")
    for block in (0, 1):
        width = call.stages[-1].width
        q = torch.randn(2, width, 2, 4)
        q[1, -1 if block else 0] = torch.nan  # the second picture is the smaller
        call.begin_attention(block, None)
        call.decide_observed(q, q, 0.5)
        call.merge(block, torch.randn(2, width, 8))
    assert [told.item() for told in call.record.finite.values()] == [False, True]
