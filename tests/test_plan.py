"""Budgets: what a plan removes where, and what it refuses."""

import dataclasses
import json
import random

import pytest

import illava
from illava.plan import DEFAULT_REDUCTION, PLAN_FIELDS, Plan
from illava.schedule import resolve, scale_layers

DEPTHS = dict(vit_depth=32, llm_depth=28)
VIT, LLM = (8, 12, 16, 20, 24), (7, 14)  # the default's layers


def settle(plan, merge_size=2, **changes):
    options = dict(vit_ranked=(7, 15), llm_ranked=(2, 8, 14), merge_size=merge_size, **DEPTHS)
    return resolve(plan, **(options | changes))


def outs(layers):
    return [out for _, _, out in layers]


# ---------------------------------------------------------------- the published plans


def test_the_papers_plan_by_hand():
    """576 visual tokens at 88.9 % lose 512: R_v = 0.4 * 512 / 3 = 68 1/3, R_t = (512 - 205) / 3 = 102 1/3."""
    schedule = settle(Plan.paper(0.889)).schedule([(1, 48, 48)])[0]
    assert schedule.frames == 1
    assert schedule.tokens == 576
    assert schedule.vit == ((5, 576, 508), (9, 508, 439), (13, 439, 371))
    assert schedule.llm == ((2, 371, 269), (8, 269, 166), (14, 166, 64))
    assert (schedule.encoder_tokens, schedule.final_tokens) == (371, 64)
    assert schedule.reduction == pytest.approx(1 - 64 / 576)


def test_the_papers_plan_defaults_to_two_thirds():
    assert Plan.paper().reduction == pytest.approx(2 / 3)
    said = dict(encoder_share=0.4, merge="recycle", recycled=0.2)
    assert Plan.paper(0.778, recycled=0.2) == Plan((5, 9, 13), (2, 8, 14), 0.778, **said)


def test_the_releases_plan_by_hand():
    """0.85 four times in the encoder, 0.9 four times in the LLM, rounded layer by layer."""
    plan = Plan.release()
    assert (plan.vit_layers, plan.llm_layers, plan.score) == ((5, 6, 7, 8), (19, 21, 23, 25), "lse")
    schedule = settle(plan).schedule([(1, 40, 40)])[0]
    assert outs(schedule.vit) == [340, 289, 246, 209]
    assert outs(schedule.llm) == [188, 169, 152, 137]


def test_the_first_versions_plan_by_hand():
    plan = Plan.first_version()
    assert (plan.merge, plan.queries, plan.llm_layers) == ("linear", "visual", (2,))
    schedule = settle(plan, merge_size=1).schedule([(1, 27, 27)])[0]
    assert schedule.tokens == 729
    assert outs(schedule.vit) == [637, 545, 453, 361]
    assert outs(schedule.llm) == [253]


def test_the_default_by_hand():
    """576 tokens at 87.5 %: of 504 the encoder's five blocks remove 302, the two decoder layers the rest."""
    plan = settle(Plan(reduction=0.875))
    assert (plan.vit_layers, plan.llm_layers) == (VIT, LLM)
    assert plan.settings.merge == "bipartite"
    assert (plan.encoder_share, plan.proportional, plan.distance_penalty) == (0.6, True, 0.2)
    assert plan.scored_at == {}, "nothing is ranked"
    schedule = plan.schedule([(1, 48, 48)])[0]
    assert outs(schedule.vit) == [516, 455, 395, 334, 274]
    assert outs(schedule.llm) == [173, 72]


@pytest.mark.parametrize("merge", ["recycle", "prune", "linear", len])
def test_other_rules_have_layers_and_a_share_of_their_own(merge):
    """The family's layers, and the paper's share of the encoder."""
    plan = settle(Plan(reduction=0.875, merge=merge))
    assert (plan.vit_layers, plan.llm_layers) == ((7, 15), (2, 8, 14))
    assert (plan.encoder_share, plan.proportional, plan.distance_penalty) == (0.4, False, 0)
    assert plan.scored_at == {2: 2, 8: 8, 14: 14}


def test_each_stage_has_what_its_rule_has():
    plan = settle(Plan(merge="recycle", vit_merge="bipartite"))
    assert (plan.vit_layers, plan.llm_layers) == ((8, 12, 16, 20, 24), (2, 8, 14))
    assert (plan.encoder_share, plan.proportional, plan.distance_penalty) == (0.6, True, 0.2)
    plan = settle(Plan(vit_merge="prune"))
    assert (plan.vit_layers, plan.llm_layers) == ((7, 15), (7, 14))
    assert (plan.encoder_share, plan.proportional, plan.distance_penalty) == (0.4, False, 0.2)


@dataclasses.dataclass
class Unhashable:
    share: float = 0.5

    def __call__(self, c, kept):
        return kept


def test_a_rule_that_cannot_be_hashed_is_one_as_well():
    plan = settle(Plan(merge=Unhashable(), score=Unhashable()))
    assert plan.scored_at == {2: 2, 8: 8, 14: 14}
    assert "Unhashable" in str(plan)


def test_what_is_said_stays():
    said = dict(vit_layers=(1,), llm_layers=(2,), encoder_share=0.4, proportional=False, distance_penalty=0)
    plan = settle(Plan(**said))
    assert (plan.vit_layers, plan.llm_layers) == ((1,), (2,))
    assert (plan.encoder_share, plan.proportional, plan.distance_penalty) == (0.4, False, 0)
    assert not settle(Plan(), weighable=False).proportional, "where attention cannot be told, it is not"


@pytest.mark.parametrize(
    "said",
    [
        dict(score="attention"), dict(score="lse"), dict(score=len), dict(queries="all"), dict(members=3),
        dict(recycled=0.2), dict(window_score="picture"), dict(vit_merge="bipartite", score="lse"),
    ],
    ids=str,
)  # fmt: skip
def test_what_the_rule_would_not_read_is_refused(said):
    """A score that ranks nothing would be ignored without a word."""
    name = [*said][-1]
    with pytest.raises(illava.PlanError, match=f'{name}=.*ranks none; give merge="recycle"'):
        Plan(**said)
    assert getattr(Plan(**{**said, "merge": "recycle", "vit_merge": None}), name) == said[name]
    assert getattr(Plan(**{**said, "vit_merge": "recycle"}), name) == said[name], "one stage reads it"


@pytest.mark.parametrize("named", [Plan.paper, Plan.release, Plan.first_version])
def test_named_plans_take_changes(named):
    changed = named(members=3, queries="all")
    assert (changed.members, changed.queries) == (3, "all")
    with pytest.raises(illava.PlanError, match="members=0"):
        named(members=0)
    with pytest.raises(TypeError):
        named(nothing=1)


# ---------------------------------------------------------------- a total reduction


def random_cases(number=300):
    rng = random.Random(0)
    for _ in range(number):
        vit = tuple(rng.sample(range(32), rng.randint(0, 4)))
        llm = tuple(rng.sample(range(28), rng.randint(0, 4)))
        plan = Plan(vit, llm, rng.choice([0, 0.1, 0.5, 2 / 3, 0.889, 0.99]), rng.choice([0, 0.25, 0.4, 1]))
        yield plan, rng.choice([1, 1, 2, 5]), rng.choice([1, 2, 3, 7, 24, 100, 576, 1031, 16384])


def test_final_tokens_are_what_is_left_after_even_steps():
    """final = N - R_v * B_v - R_t * B_t up to the remainder, and at least one token is left."""
    for plan, frames, frame_tokens in random_cases():
        model_plan = settle(plan)
        schedule = model_plan.segment(frames, frame_tokens)
        vit = [before - after for _, before, after in schedule.vit]
        llm = [before - after for _, before, after in schedule.llm]
        assert not vit or max(vit) - min(vit) <= frames, "R_v is a constant, but for a token of each frame"
        assert not llm or max(llm) - min(llm) <= 1, "R_t is a constant, but for a token"
        assert min([0, *vit, *llm]) == 0
        assert all(removed % frames == 0 for removed in vit), "every frame loses the same"
        assert schedule.tokens == frames * frame_tokens
        assert schedule.final_tokens == schedule.tokens - sum(vit) - sum(llm)
        assert schedule.encoder_tokens == schedule.tokens - sum(vit) >= frames, "never a frame's last token"
        assert schedule.final_tokens >= 1
        steps = [*schedule.vit, *schedule.llm]
        assert all(one[2] == next_[1] for one, next_ in zip(steps, steps[1:], strict=False))


def test_reduction_and_encoder_share_are_reached_up_to_rounding():
    """Both stages' totals are met to half a token, the encoder's of every frame."""
    for reduction in (0.3, 0.667, 0.778, 0.889):
        for share in (0.2, 0.4, 0.7):
            for frames, tokens in ((1, 100), (1, 577), (4, 144), (1, 16384)):
                schedule = settle(Plan.paper(reduction, encoder_share=share)).segment(frames, tokens)
                total = frames * tokens
                gone = total - schedule.encoder_tokens
                assert gone == pytest.approx(share * reduction * total, abs=0.5 * frames)
                assert schedule.final_tokens == pytest.approx((1 - reduction) * total, abs=0.5)


def test_a_remainder_is_spread_over_the_layers_by_hand():
    """A tile of 36 tokens at 77.8 % loses 28: 0.6 * 28 = 17 over five blocks, 11 over two layers."""
    schedule = settle(Plan(reduction=7 / 9)).segment(1, 36)
    assert outs(schedule.vit) == [33, 29, 26, 22, 19]
    assert outs(schedule.llm) == [13, 8]


def test_tokens_removed_are_the_same_of_every_layer():
    """A budget that is said of each layer is met in each, and lowered in all where too little is left."""
    plan = Plan((2, 4), (6, 8, 9), vit_tokens_removed=7, llm_tokens_removed=9)
    assert outs(settle(plan).segment(1, 60).vit) == [53, 46]
    assert outs(settle(plan).segment(1, 60).llm) == [37, 28, 19]
    assert outs(settle(plan).segment(1, 20).llm) == [5, 4, 3]


@pytest.mark.parametrize("tokens", range(1, 12))
def test_small_pictures_lose_less_and_never_everything(tokens):
    schedule = settle(Plan.paper(0.95)).segment(1, tokens)
    assert 1 <= schedule.final_tokens <= tokens
    if tokens == 1:
        assert schedule.reduction == 0
    big = settle(Plan.paper(0.95)).segment(1, 1000)
    assert schedule.reduction <= big.reduction + 1e-9


@pytest.mark.parametrize(
    "layers",
    [dict(vit_layers=(3, 5), llm_layers=()), dict(vit_layers=(), llm_layers=(4, 7))],
    ids=["encoder alone", "LLM alone"],
)
def test_one_stage_alone_does_it_all(layers):
    """The encoder share says how two stages divide; where one is left out, the other removes everything."""
    schedule = settle(Plan(reduction=0.5, **layers)).segment(1, 400)
    assert schedule.final_tokens == 200
    assert len(schedule.vit) + len(schedule.llm) == 2


def test_encoder_share_of_one_leaves_nothing_for_the_llm():
    schedule = settle(Plan.paper(0.6, encoder_share=1)).segment(1, 500)
    assert schedule.encoder_tokens == schedule.final_tokens == 200
    schedule = settle(Plan.paper(0.6, encoder_share=0)).segment(1, 500)
    assert schedule.encoder_tokens == 500
    assert schedule.final_tokens == 200


def test_the_llm_makes_up_for_what_the_encoder_could_not_remove():
    """R_t is counted from what arrived: frames of one unit cannot lose any in the encoder."""
    schedule = settle(Plan.paper(0.5)).segment(300, 1)
    assert schedule.encoder_tokens == 300
    assert schedule.final_tokens == 150


def test_video_frames_merge_each_in_the_encoder_and_together_in_the_llm():
    video = settle(Plan.paper(0.75)).schedule([(4, 16, 24)])[0]
    frame = settle(Plan.paper(0.75)).schedule([(1, 16, 24)])[0]
    assert (video.frames, video.tokens) == (4, 384)
    assert outs(video.vit) == [4 * out for out in outs(frame.vit)]
    assert video.final_tokens == 96


def test_schedules_of_several_grids_come_in_their_order():
    model_plan = settle(Plan.paper())
    grids = [(1, 8, 12), (2, 4, 4), (1, 28, 28)]
    assert model_plan.schedule(grids) == [model_plan.schedule([g])[0] for g in grids]
    assert [s.tokens for s in model_plan.schedule(grids)] == [24, 8, 196]
    assert model_plan.schedule([]) == []


# ---------------------------------------------------------------- the two other budgets


def test_keep_ratio_never_keeps_nothing():
    plan = settle(Plan((1, 2, 3), (4, 5), vit_keep_ratio=0.01, llm_keep_ratio=0.01))
    for frames in (1, 3):
        for tokens in (1, 2, 50):
            schedule = plan.segment(frames, tokens)
            assert schedule.encoder_tokens == frames
            assert schedule.final_tokens == 1


def test_keep_ratio_of_one_removes_nothing():
    schedule = settle(Plan(vit_keep_ratio=1, llm_keep_ratio=1)).segment(1, 77)
    assert schedule.final_tokens == 77


@pytest.mark.parametrize("tokens", [1, 4, 30, 369, 370])
def test_tokens_removed_are_limited_by_the_picture(tokens):
    schedule = settle(Plan.first_version()).segment(1, tokens)
    per_layer = min(92, (tokens - 1) // 4)
    assert schedule.encoder_tokens == tokens - 4 * per_layer
    assert schedule.final_tokens == max(1, schedule.encoder_tokens - 108)


@pytest.mark.parametrize(
    ("budget", "vit", "llm"),
    [
        (dict(vit_keep_ratio=0.5), VIT, ()),
        (dict(llm_keep_ratio=0.5), (), LLM),
        (dict(vit_tokens_removed=3), VIT, ()),
        (dict(llm_tokens_removed=3), (), LLM),
        (dict(vit_tokens_removed=3, llm_tokens_removed=3), VIT, LLM),
        (dict(reduction=0.5), VIT, LLM),
        (dict(), VIT, LLM),
    ],
)
def test_a_stage_whose_budget_is_not_said_is_left_alone(budget, vit, llm):
    plan = settle(Plan(**budget))
    assert (plan.vit_layers, plan.llm_layers) == (vit, llm)


@pytest.mark.parametrize(
    ("settings", "budget", "reduction"),
    [
        ({}, "reduction", DEFAULT_REDUCTION),
        (dict(reduction=0.4), "reduction", 0.4),
        (dict(reduction=0), "reduction", 0),
        (dict(vit_keep_ratio=0.9), "keep ratio", None),
        (dict(llm_tokens_removed=4), "tokens removed", None),
    ],
)
def test_which_budget_was_said(settings, budget, reduction):
    assert Plan(**settings).budget == budget
    assert settle(Plan(**settings)).reduction == reduction


@pytest.mark.parametrize(
    ("settings", "nothing"),
    [
        (dict(reduction=0), True),
        (dict(vit_layers=(), llm_layers=()), True),
        (dict(reduction=0.1), False),
        (dict(vit_layers=(), reduction=0.1), False),
        (dict(vit_tokens_removed=5), False),
    ],
)
def test_removes_nothing(settings, nothing):
    plan = settle(Plan(**settings))
    assert plan.removes_nothing is nothing
    assert (plan.segment(1, 200).reduction == 0) is nothing


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(reduction=1), r"reduction=1 is outside \[0, 1\); for example 0\.667"),
        (dict(reduction=-0.1), r"reduction=-0\.1 is outside \[0, 1\)"),
        (dict(reduction=88.9), r"reduction=88\.9 is outside \[0, 1\)"),
        (dict(reduction=float("nan")), r"reduction=nan is outside \[0, 1\)"),
        (dict(reduction="0.5"), r"reduction='0\.5' is outside \[0, 1\)"),
        (dict(reduction=True), r"reduction=True is outside \[0, 1\)"),
        (dict(encoder_share=1.1), r"encoder_share=1\.1 is outside \[0, 1\]"),
        (dict(encoder_share=-1), r"encoder_share=-1 is outside \[0, 1\]"),
        (dict(vit_keep_ratio=0), r"vit_keep_ratio=0 is outside \(0, 1\].*without a token"),
        (dict(llm_keep_ratio=1.5), r"llm_keep_ratio=1\.5 is outside \(0, 1\].*without a token"),
        (dict(recycled=0), r"recycled=0 is outside \(0, 1\]"),
        (dict(members=0), r"members=0 is not a whole number of at least 1"),
        (dict(members=2.0), r"members=2\.0 is not a whole number of at least 1"),
        (dict(vit_tokens_removed=-1), r"vit_tokens_removed=-1 is not a whole number of at least 0"),
        (dict(llm_tokens_removed=True), r"llm_tokens_removed=True is not a whole number of at least 0"),
        (dict(score="norm"), r"score='norm' is not known; choose one of None, 'attention', 'lse'"),
        (
            dict(merge="tome"),
            r"merge='tome' is not known; choose one of 'bipartite', 'recycle', 'prune', 'linear'",
        ),
        (dict(queries="cls"), r"queries='cls' is not known; choose one of 'text', 'all', 'visual', 'last'"),
        (dict(window_score="x"), r"window_score='x' is not known; choose one of 'window', 'picture'"),
        (dict(vit_layers=5), r"vit_layers=5 is a single number; give a tuple, vit_layers=\(5,\)"),
        (dict(llm_layers=(1, 1)), r"llm_layers=\(1, 1\) names a layer twice; each layer merges once"),
        (dict(llm_layers=(2, -1)), r"llm_layers=\(2, -1\): \[-1\] are not layer numbers.*count from 0"),
        (dict(vit_layers=(True,)), r"vit_layers=\(True,\): \[True\] are not layer numbers"),
        (dict(vit_layers=(1.0,)), r"vit_layers=\(1\.0,\): \[1\.0\] are not layer numbers"),
        (
            dict(merge="recycle", proportional=True),
            r"proportional=True is of encoder tokens that stand for several; 'recycle' counts none: give",
        ),
        (dict(vit_merge="prune", proportional=True), r"proportional=True .*'prune' counts none: give"),
        (
            dict(reduction=0.5, vit_keep_ratio=0.9),
            r"two budgets at once: reduction=0\.5, vit_keep_ratio=0\.9; give only reduction or only keep",
        ),
        (
            dict(vit_keep_ratio=0.9, llm_tokens_removed=3),
            r"vit_keep_ratio=0\.9, llm_tokens_removed=3; give only keep ratio or only tokens removed",
        ),
    ],
)
def test_a_wrong_setting_is_named_with_its_value_and_what_to_give(settings, message):
    with pytest.raises(illava.PlanError, match=message) as caught:
        Plan(**settings)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, illava.IllavaError)


@pytest.mark.parametrize("layer", [0.0, 1.5, -0.25, float("nan"), float("inf")])
def test_a_fraction_out_of_the_depth_is_no_layer(layer):
    with pytest.raises(illava.PlanError, match="is a share of the depth"):
        Plan(vit_layers=(layer,))


def test_one_fraction_is_no_tuple():
    with pytest.raises(illava.PlanError, match=r"vit_layers=0\.5 is not a tuple"):
        Plan(vit_layers=0.5)


def test_limits_of_the_ranges_are_allowed():
    Plan(reduction=0, encoder_share=0, recycled=1, members=1, merge="recycle")
    Plan(distance_penalty=0)
    Plan(distance_penalty=2)
    Plan(encoder_share=1, vit_keep_ratio=1, llm_keep_ratio=1)
    Plan(vit_tokens_removed=0, llm_tokens_removed=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(vit_layers=(5, 32)), r"vit_layers=\(5, 32\).*32 vit layers.*\[32\] are out of range.*up to 31"),
        (dict(llm_layers=(28, 40)), r"28 llm layers.*\[28, 40\] are out of range; choose layers up to 27"),
        (
            dict(vit_layers=(1,), llm_layers=(2,), vit_keep_ratio=0.5),
            r"llm_layers=\(2,\) merge, but llm_keep_ratio does not.*give llm_keep_ratio, or llm_layers=\(\)",
        ),
        (
            dict(vit_layers=(1,), llm_layers=(2,), llm_tokens_removed=5),
            r"vit_layers=\(1,\) merge, but vit_tokens_removed does not say.*or vit_layers=\(\)",
        ),
    ],
)
def test_a_plan_a_model_cannot_carry_out(settings, message):
    with pytest.raises(illava.PlanError, match=message):
        settle(Plan(**settings))


@pytest.mark.parametrize("grid", [(1, 7, 8), (1, 8, 7), (0, 8, 8), (1, 0, 8), (1, 8, -2)])
def test_a_grid_that_is_not_of_whole_units_is_refused(grid):
    with pytest.raises(
        illava.PlanError, match=r"not made of whole merge units of 2 x 2 .*image_grid_thw"
    ) as e:
        settle(Plan()).schedule([(1, 8, 8), grid])
    assert str(grid) in str(e.value)


# ---------------------------------------------------------------- the value itself


def test_shares_of_the_depth_are_layers_of_each_model():
    plan = Plan((0.25, 0.375, 0.5, 0.625), (0.25, 0.5))
    assert settle(plan).vit_layers == (8, 12, 16, 20)
    assert settle(plan).llm_layers == (7, 14)
    small = settle(plan, vit_depth=8, llm_depth=8)
    assert (small.vit_layers, small.llm_layers) == ((2, 3, 4, 5), (2, 4))
    mixed = settle(Plan(("output", 0.5, 3), ("input", 0.999), merge="bipartite"))
    assert (mixed.vit_layers, mixed.llm_layers) == ((3, 16, 32), (-1, 27))


def test_shares_of_the_depth_that_fall_on_one_layer():
    """A total is shared by the layers there are; what is said of each layer would be done once too few."""
    plan = Plan((0.25, 0.375, 0.5, 0.625), reduction=0.76, encoder_share=0.4)
    tiny = settle(plan, vit_depth=2, llm_depth=28)
    assert tiny.vit_layers == (0, 1)
    assert tiny.segment(1, 100).final_tokens == 24
    ratio = Plan((0.25, 0.26), vit_keep_ratio=0.5)
    with pytest.raises(illava.PlanError, match=r"these are only \(8,\), and vit_keep_ratio is said"):
        settle(ratio)


def test_layers_are_settled_in_ascending_order():
    plan = settle(Plan([9, 5], [14, 2]))
    assert (plan.vit_layers, plan.llm_layers) == ((5, 9), (2, 14))
    assert plan.settings.vit_layers == (9, 5)


@pytest.mark.parametrize(
    "plan", [Plan(), Plan.paper(0.889), Plan.release(), Plan.first_version(), Plan((), ())]
)
def test_round_trip_through_json(plan):
    """JSON turns tuples into lists; the plan turns them back."""
    back = Plan(**json.loads(json.dumps(plan.to_dict())))
    assert back == plan
    assert hash(back) == hash(plan)
    assert set(plan.to_dict()) == PLAN_FIELDS


def test_plans_are_frozen():
    plan = Plan()
    model_plan = settle(plan)
    for thing, name in (
        (plan, "reduction"),
        (model_plan, "vit_layers"),
        (model_plan.segment(1, 9), "tokens"),
    ):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(thing, name, 1)


@pytest.mark.parametrize(
    ("plan", "parts"),
    [
        (
            Plan.paper(0.889),
            ["[5, 9, 13] of 32", "[2, 8, 14] of 28", "reduction 88.9%", "share 40%", "recycle"],
        ),
        (Plan(), ["[8, 12, 16, 20, 24] of 32", "reduction 66.7%", "share 60%", "bipartite, 0.2 less alike"]),
        (Plan(merge="recycle"), ["[7, 15] of 32", "share 40%; recycle, score attention"]),
        (
            Plan(merge="recycle", vit_merge="bipartite"),
            ["recycle (bipartite in the encoder), 0.2 less alike where apart, score attention"],
        ),
        (Plan.release(), ["[19, 21, 23, 25] of 28", "keep ratio 0.85 in the encoder, 0.9", "score lse"]),
        (Plan.first_version(), ["92 tokens removed per encoder layer, 108 per LLM layer", "linear"]),
    ],
)
def test_a_settled_plan_prints_its_numbers(plan, parts):
    assert [p for p in parts if p not in str(settle(plan))] == []
    assert ("score" in str(settle(plan))) is (plan != Plan()), "the default ranks nothing"


@pytest.mark.parametrize(
    ("layers", "of_depth", "depth", "scaled"),
    [
        ((2, 8, 14), 28, 28, (2, 8, 14)),
        ((2, 8, 14), 28, 36, (3, 10, 18)),
        ((2, 8, 14), 28, 4, (0, 1, 2)),
        ((5, 9, 13), 32, 2, (0, 1)),
        ((31,), 32, 1, (0,)),
    ],
)
def test_layers_at_the_same_relative_depth(layers, of_depth, depth, scaled):
    assert scale_layers(layers, of_depth, depth) == scaled


@pytest.mark.parametrize("depth", range(1, 60))
def test_scaled_layers_are_layers_of_the_model(depth):
    scaled = scale_layers((0, 9, 13, 31), 32, depth)
    assert list(scaled) == sorted(set(scaled))
    assert scaled[0] >= 0
    assert scaled[-1] < depth
