"""The search for a plan: against rules whose cheapest plan is known, and on a model that sees."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

import illava
from illava import evaluate, jobs
from illava.evaluate.by_agreement import DEFAULTS, Cheapest
from illava.evaluate.by_cost import as_fast_as, as_few_as
from illava.evaluate.found import BEST, DEFAULT
from illava.evaluate.judge import Judge
from illava.evaluate.prompts import decoded
from illava.evaluate.search_space import (
    ALIKE,
    ENCODER_REMOVES,
    NEAR,
    RULES,
    TOTALS,
    Candidate,
    frames_of,
)
from illava.evaluate.trials import Trials, Tried
from illava.plan import Plan
from illava.report import PictureRecord
from questions import write_questions

READER = Path(__file__).resolve().parent.parent / "checkpoints" / "qwen2_5_vl"


@pytest.fixture(scope="module")
def loaded():
    return evaluate.load(READER, device="cpu")


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    data = write_questions(tmp_path_factory.mktemp("data"), ("find", "count"), 4, side=96)
    return [decoded(item) for item in jobs.read_items(data)]


@pytest.fixture(scope="module")
def trials(loaded, items):
    return Trials(loaded, items[:4], 4, 4), Trials(loaded, items[4:6], 4, 4)


class Ruled(Judge):
    """A judge under which a plan changes all answers that break a rule, and no others."""

    def __init__(self, loaded, search, confirm, holds, holds_again=None):
        super().__init__(loaded, search, confirm, lambda *_: None)
        self.rules = {False: holds, True: holds_again or holds}
        self.asked = []

    def _run(self, candidate, trials, allowed):
        again = trials is self.confirm
        self.asked.append((candidate, again))
        return Tried([self.rules[again](candidate)] * trials.items)


def late_and_mild(candidate):
    """Encoder blocks from 3 on lose at most half, decoder layers from 2 on at most 78 % in all."""
    if min(candidate.vit_layers, default=9) in (1, 2, "output") or candidate.encoder_removes > 0.5:
        return False
    return not candidate.llm_layers or (min(candidate.llm_layers) >= 2 and candidate.reduction <= 0.78)


def all_of(space):
    """Every candidate of the space."""
    ways = product(space.encoder_layers, RULES, ENCODER_REMOVES)
    encoder = [Candidate(x, (), e, e, rule) for x, rule, e in ways]
    totals = dict.fromkeys([*TOTALS, *DEFAULTS[:5]])
    ways = product(space.decoder_layers, RULES, totals)
    decoder = [Candidate((), x, 0.0, r, rule) for x, rule, r in ways]
    return space.joined(encoder, decoder)


def cheapest_by_hand(space, rule):
    return min(filter(rule, all_of(space)), key=space.cost)


def test_the_places_of_the_default_are_tried(loaded, trials):
    """With its rule and near its share: what keeps most of both readers' answers is looked at."""
    space = Judge(loaded, *trials, lambda *_: None).space
    plan = space.seams.settle(Plan(reduction=0.778))
    assert NEAR.merge == plan.settings.merge
    assert NEAR.proportional is NEAR.distance_penalty is None, "the rule's own, as in the default"
    fitting = [c for c in all_of(space) if (c.vit_layers, c.llm_layers) == (plan.vit_layers, plan.llm_layers)]
    assert {(c.encoder_removes, c.reduction) for c in fitting if c.rule == NEAR} > {(0.5, 0.778)}


def test_the_cheapest_plan_that_holds_is_found(loaded, trials):
    judge = Ruled(loaded, *trials, late_and_mild)
    search = Cheapest(judge, 0.9)
    search.run()
    expected = cheapest_by_hand(judge.space, late_and_mild)
    assert search.best.plan == expected.plan
    assert search.best.agreement.value == 1
    assert search.default is None, "it merges in block 2"
    assert search.as_strong.plan.reduction == expected.reduction
    assert search.as_strong.agreement.value == 0
    assert len(judge.asked) < len(all_of(judge.space)) / 25, "not all of them"


def test_tokens_most_alike_are_merged_where_that_alone_holds(loaded, trials):
    """In block 1, and in the decoder."""

    def alike(candidate):
        by_likeness = candidate.rule == ALIKE and candidate.vit_layers in ((1,), ())
        return by_likeness and (not candidate.llm_layers or late(candidate))

    def late(candidate):
        return min(candidate.llm_layers) >= 2 and candidate.reduction <= 0.889

    judge = Ruled(loaded, *trials, alike)
    search = Cheapest(judge, 0.9)
    search.run()
    plan = search.best.plan
    assert plan == cheapest_by_hand(judge.space, alike).plan
    assert (plan.vit_layers, plan.merge, plan.vit_merge) == ((1,), "bipartite", None)
    assert plan.llm_layers
    assert search.as_strong.plan.merge == "bipartite", "the default merges as it does"


def test_neighbours_first_where_tokens_most_alike_alone_do_not_hold(loaded, trials):
    judge = Ruled(loaded, *trials, lambda candidate: candidate.rule == NEAR)
    search = Cheapest(judge, 0.9)
    search.run()
    plan = search.best.plan
    assert plan == cheapest_by_hand(judge.space, judge.rules[False]).plan
    settled = judge.space.seams.settle(plan)
    assert (plan.merge, settled.distance_penalty, settled.proportional) == ("bipartite", 0.2, True)


def test_a_given_cost_is_met_with_every_rule(loaded, items):
    """Of the same layers and shares, which then cost the same."""
    judge = Judge(loaded, *[Trials(loaded, items[:1], 1, 1)] * 2, lambda *_: None)
    for found in (as_fast_as(1.3, judge.space), as_few_as(9, judge.pictures, judge.space)):
        plain, *others = ({c for c in found if c.rule == rule} for rule in RULES)
        for rule, own in zip(RULES[1:], others, strict=True):
            assert {replace(c, rule=rule) for c in plain} == own
            assert own
        assert len(found) == len(set(found))


def test_the_default_is_compared_where_it_agrees(loaded, trials):
    def mild(candidate):
        return candidate.reduction <= 0.45

    search = Cheapest(Ruled(loaded, *trials, mild), 0.9)
    search.run()
    assert search.default.plan.reduction == max(r for r in DEFAULTS if r <= 0.45)
    assert search.default.plan.vit_layers == (2, 3, 4, 5, 6)


def test_what_only_held_on_the_data_that_chose_it_is_not_taken(loaded, trials):
    def milder(candidate):
        return late_and_mild(candidate) and candidate.encoder_removes <= 0.3

    judge = Ruled(loaded, *trials, late_and_mild, milder)
    search = Cheapest(judge, 0.9)
    search.run()
    assert search.best.plan == cheapest_by_hand(judge.space, milder).plan


def test_nothing_holds(loaded, trials):
    with pytest.raises(illava.NoPlanError, match="keeps 90.0% of 2 answers; ask for less"):
        Cheapest(Ruled(loaded, *trials, lambda candidate: False), 0.9).run()


def test_a_plan_is_run_once_on_the_same_data(loaded, trials):
    heard = []
    judge = Judge(loaded, *trials, lambda *said: heard.append(said))
    strong, mild = Candidate((1,), (), 0.8, 0.8), Candidate((5,), (), 0.2, 0.2)
    for _ in range(3):
        judge.holds(strong, 0)
        judge.holds(mild, 4)
        judge.holds(mild, 4, confirm=True)
        choice = judge.choice(mild)
    assert judge.tried == 3
    with illava.patch(loaded.model, plan=mild.plan) as handle:
        loaded.model(**judge.confirm.on_device(judge.confirm.batches[0]))
        assert choice.bound == pytest.approx(handle.report.flops.speedup_bound)
        assert choice.final_tokens == handle.report.pictures[0].final_tokens
    assert choice.plan == mild.plan


@pytest.mark.slow
def test_a_search_on_real_answers(loaded, items):
    stages = []
    found = evaluate.find_plan(
        loaded, items, min_agreement=0.75, max_new_tokens=4, rounds=1,
        progress=lambda what, done, total: stages.append((what.split(":")[0], done, total)),
    )  # fmt: skip
    held = evaluate.fidelity(loaded, items, {"found": found.best.plan}, max_new_tokens=4)
    assert held.agreement["found"].exact == found.best.agreement
    assert found.best.agreement.value >= 0.75
    assert not found.unseen, "8 items are too few to halve"
    assert (found.items, found.largest, found.interrupted) == (8, 36, False)
    assert found.best.bound > found.default.bound
    assert {row.name for row in found.speed.rows} == {"unpatched", DEFAULT, BEST}
    assert found.faster_than_default > 0
    names = list(dict.fromkeys(name for name, _, _ in stages))
    assert names[:4] == ["answering without merging", "encoder blocks", "decoder layers", "both together"]
    assert all(0 <= done <= total for _, done, total in stages)


@pytest.mark.slow
def test_at_98_percent_of_unseen_answers_the_plan_needs_fewer_operations_than_the_default(loaded, tmp_path):
    """Half of the 40 items choose, and the other half, never seen, count.

    The default keeps all of these answers with 95 % of the tokens gone, and an eighth fewer operations than
    its are left to find. So small a difference is no longer told by the clock of a busy machine.
    """
    data = write_questions(tmp_path, ("find",), 40, side=96)
    found = evaluate.find_plan(
        loaded, jobs.read_items(data), min_agreement=0.98, max_new_tokens=2, batch_size=5, rounds=9
    )
    assert (found.items, found.unseen) == (20, True)
    assert found.default.agreement.value == found.best.agreement.value >= 0.98
    unseen = list(jobs.read_items(data))[1::2]
    held = evaluate.fidelity(loaded, unseen, {"found": found.best.plan}, max_new_tokens=2)
    assert held.agreement["found"].exact == found.best.agreement
    assert found.best.bound > 1.1 * found.default.bound, "operations, which depend on no clock"
    assert found.faster_than_default > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["decoder layers", "the default", "timing"])
def test_ctrl_c_keeps_the_best_so_far(loaded, items, stage):
    def progress(what, done, total):
        if what.startswith(stage):
            raise KeyboardInterrupt

    found = evaluate.find_plan(
        loaded, items, min_agreement=0.75, max_new_tokens=4, rounds=1, progress=progress
    )
    assert found.interrupted
    assert found.speed is None
    assert found.best.agreement.value >= 0.75
    assert (found.as_strong is None) == (stage != "timing")
    assert getattr(loaded.model, "_illava_handle", None) is None


def test_ctrl_c_before_anything_holds_ends_the_search(loaded, items):
    def progress(what, done, total):
        if what.startswith("encoder"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate.find_plan(loaded, items, min_agreement=0.75, max_new_tokens=4, progress=progress)


@pytest.mark.slow
def test_a_speed_up_is_reached_and_no_more_than_that(loaded, items):
    found = evaluate.find_plan(loaded, items[:2], speedup=1.4, max_new_tokens=2, rounds=0)
    assert found.best.bound >= 1.38
    plan, space = (
        found.best.plan,
        Judge(loaded, *[Trials(loaded, items[:2], 1, 2)] * 2, lambda *_: None).space,
    )
    removes = plan.encoder_share * plan.reduction
    milder = Candidate(plan.vit_layers, plan.llm_layers, removes, plan.reduction - 0.01)
    assert plan.llm_layers, "or the encoder would have to remove less, too"
    assert space.cost(milder) > 1 / 1.4
    assert found.default is None


@pytest.mark.slow
def test_so_many_tokens_are_left(loaded, items):
    found = evaluate.find_plan(loaded, items[:2], max_tokens=9, max_new_tokens=2, rounds=0)
    assert 7 <= found.best.final_tokens <= 9
    with pytest.raises(illava.NoPlanError, match="more than 36 visual tokens"):
        evaluate.find_plan(loaded, items[:2], max_tokens=36, max_new_tokens=2)


def test_so_many_tokens_are_left_of_pictures_of_every_size(loaded, items, tmp_path):
    """The largest is in no batch of its own at the front."""
    large = write_questions(tmp_path, ("find",), 1, side=192)
    mixed = [items[0], *map(decoded, jobs.read_items(large)), items[1]]
    found = evaluate.find_plan(loaded, mixed, max_tokens=40, max_new_tokens=2, batch_size=1, rounds=0)
    assert found.largest == 144
    with illava.patch(loaded.model, plan=found.best.plan) as handle:
        left = []
        for item in mixed:
            evaluate.answer(loaded, item, max_new_tokens=1)
            left.append(handle.report.final_tokens)
    assert 30 <= max(left) == found.best.final_tokens <= 40


def test_what_is_left_is_that_of_the_largest_prompt_wherever_it_is(loaded, items, tmp_path):
    """Here in the half that chooses, while answers are counted on the other."""
    (large,) = map(decoded, jobs.read_items(write_questions(tmp_path, ("find",), 1, side=192)))
    trials = [Trials(loaded, half, 1, 2) for half in ([items[0], large], [items[1]])]
    judge = Judge(loaded, *trials, lambda *_: None)
    choice = judge.choice(Candidate((3,), (), 0.5, 0.5))
    assert (judge.largest, choice.final_tokens) == (144, 72)
    assert judge.choice(Candidate((), (), 0.0, 0.0)).final_tokens == 144


@pytest.mark.parametrize("reader", ["internvl", "qwen2_5_vl"])
def test_every_plan_of_a_search_by_tokens_leaves_no_more_than_that(reader, tmp_path):
    """Layers remove whole tokens, whose rounding adds up; what is reckoned is what calls then leave."""
    loaded = evaluate.load(READER.parent / reader, device="cpu")
    item = decoded(next(iter(jobs.read_items(write_questions(tmp_path, ("find",), 1, side=192)))))
    judge = Judge(loaded, *[Trials(loaded, [item], 1, 1)] * 2, lambda *_: None)
    most = judge.largest // 4
    found = as_few_as(most, judge.pictures, judge.space)
    left = [judge.space.left(candidate, judge.pictures) for candidate in found]
    assert max(left) <= most
    tiles = sum(frames for frames, _ in judge.pictures)
    for candidate, tokens in zip(found, left, strict=True):
        # A layer removes whole tokens, a block of the encoder one of each tile.
        step = len(candidate.llm_layers) or tiles * len(candidate.vit_layers)
        assert tokens >= most - step, "as little is removed as will do"
    for candidate in found[:: len(found) // 8]:
        assert judge.choice(candidate).final_tokens == judge.space.left(candidate, judge.pictures)


@pytest.mark.parametrize(
    ("grid", "tiles", "tokens", "expected"),
    [
        ((1, 12, 12), 5, 180, (5, 36)),  # tiles
        ((8, 6, 6), 1, 72, (8, 9)),  # frames
        ((1, 12, 12), 5, 181, (1, 181)),  # cropped, so that tiles have no equal shares
        (None, 0, 7, (1, 7)),  # features came from the caller
    ],
)
def test_pictures_as_the_encoder_sees_them(grid, tiles, tokens, expected):
    assert frames_of(PictureRecord("image", 0, grid, tiles, tokens, tokens, tokens, (), None)) == expected


def test_no_plan_leaves_so_few(loaded, trials):
    judge = Judge(loaded, *trials, lambda *_: None)
    with pytest.raises(illava.NoPlanError, match="at most 0 visual tokens of 36"):
        as_few_as(0, judge.pictures, judge.space)


def test_a_speed_up_out_of_reach(loaded, items):
    with pytest.raises(illava.NoPlanError, match="speed-up of 50"):
        evaluate.find_plan(loaded, items[:2], speedup=50, max_new_tokens=2)


@pytest.mark.parametrize(
    ("targets", "reason"),
    [
        ({}, "got none"),
        ({"speedup": 2, "max_tokens": 9}, "speedup=2 and max_tokens=9"),
        ({"min_agreement": 98}, "min_agreement=98 is out of range"),
        ({"speedup": 1}, "speedup=1 is out of range"),
        ({"max_tokens": 0}, "max_tokens=0 is out of range"),
    ],
)
def test_targets_that_are_none(loaded, items, targets, reason):
    with pytest.raises(illava.PlanError, match=reason):
        evaluate.find_plan(loaded, items, **targets)


def test_items_without_pictures(loaded):
    item = jobs.Item("a", (), (), "which digit is red ?", "a")
    with pytest.raises(illava.DataError, match="bring no pictures"):
        evaluate.find_plan(loaded, [item], min_agreement=0.9, max_new_tokens=2)
    with pytest.raises(illava.DataError, match="no items"):
        evaluate.find_plan(loaded, [], min_agreement=0.9)
