"""Whatever the prompt and the plan: the plan is kept, order and positions are, nothing else is lost.

Prompts and plans are drawn by hypothesis, the same ones every time; `-m slow` draws many more.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import illava
from contract import tools
from contract.one_hot import account
from trust import odd

FEW, MANY = 6, 40


def check_encoder(plan, call):
    """Every frame loses what the plan says and keeps a unit; survivors stay in order."""
    for before, after in zip(call.stages, call.stages[1:], strict=False):
        assert set(after.units.tolist()) <= set(before.units.tolist())
    for stage in call.stages:
        assert (stage.units.diff() > 0).all()
        assert (stage.tokens.diff() > 0).all()
        assert min(stage.frame_counts) >= 1
        place = torch.arange(len(call.layout.frame_units))
        own = place.repeat_interleave(torch.tensor(call.layout.frame_units))[stage.units]
        assert torch.bincount(own, minlength=len(place)).tolist() == list(stage.frame_counts)
    removed = [sum(plan.vit_removed(units)) for units in call.layout.frame_units]
    left = [units - gone for units, gone in zip(call.layout.frame_units, removed, strict=True)]
    assert list(call.stages[-1].frame_counts) == left
    if shares := plan.settings.vit_shares:
        assert left == [max(1, round(shares[-1] * units)) for units in call.layout.frame_units]


def check_decoder(plan, call, text, rotary, full):
    """Text stays, in its place and with its rotary embedding; every picture loses what the plan says."""
    seen = None
    for stage in call.stages:
        for row, positions in enumerate(stage.positions.tolist()):
            real = [p for p in positions if p >= 0]
            assert positions == [-1] * (len(positions) - len(real)) + real, "padded on the left alone"
            assert real == sorted(set(real)), "in order, none twice"
            assert set(text[row].nonzero().flatten().tolist()) <= set(real), "no text is lost"
            assert seen is None or set(real) <= set(seen[row])
        seen = stage.positions.tolist()
    for layer, cos in rotary.items():
        positions = call.stage(layer).positions
        expected = full.expand(*full.shape[:-3], len(positions), -1, -1).movedim(-3, 0)  # [B, ..., L, D]
        found = cos.expand(*cos.shape[:-3], len(positions), -1, -1).movedim(-3, 0)
        for row, columns in enumerate(positions):
            kept = columns >= 0
            assert torch.equal(found[row][..., kept, :], expected[row][..., columns[kept], :])
    for number, (tokens, entered, left) in enumerate(
        zip(call.tokens, call.counts[0], call.counts[-1], strict=True)
    ):
        assert entered - left == sum(plan.llm_removed(tokens, entered)), f"picture {number}"
        assert left >= min(1, entered)
        if shares := plan.settings.llm_shares:
            assert left == min(entered, max(1, round(shares[-1] * tokens)))


def check_weights(decision):
    """Weights sum to one, by a name or by a function: nothing is made of padding."""
    torch.testing.assert_close(decision.weights.sum(dim=1), torch.ones(len(decision.recycled)))
    if decision.mixture is not None:
        for weights, kept, real in zip(decision.mixture, decision.kept_counts, decision.counts, strict=True):
            torch.testing.assert_close(weights[:kept, :real].sum(dim=1), torch.ones(kept))


def check_trace(report):
    """Every patch is accounted for, and what is left is what the report counts."""
    for picture, own in zip(report.pictures, report.provenance, strict=True):
        account(own)
        steps, layers = own.merges, picture.layers
        assert [(s.stage, s.layer) for s in steps] == [(r.stage, r.layer) for r in layers]
        assert [len(s.tokens) for s in steps] == [r.tokens_out for r in layers]


def check(family, rows, plan_settings, side="left"):
    model = tools.build(family)
    inputs = tools.prompt(family, *rows, side=side)
    text = odd.real_text(model, inputs)
    with odd.Watch(model) as unpatched:
        plain = tools.forward(model, inputs).logits
    with tools.patch(model, family, **plan_settings) as handle:
        with odd.Watch(model) as watch:
            logits = tools.forward(model, inputs, use_cache=True).logits
        report = handle.report
        assert logits.shape == plain.shape
        assert logits.isfinite().all()
        assert torch.equal(logits, tools.forward(model, inputs).logits), "the same bits again"
        for call in watch.vision:
            check_encoder(handle.plan, call)
        for call in (c for c in watch.language if c.changes_length):  # the model does the others by itself
            check_decoder(handle.plan, call, text, watch.rotary, unpatched.rotary[0])
        for decision in watch.decisions:
            check_weights(decision)
        assert (report is None) == handle.plan.removes_nothing
        if plan_settings["trace"] and report is not None:
            check_trace(report)
        for number, row in enumerate(rows):  # whoever sits beside
            alone = tools.forward(model, tools.prompt(family, row, seeds=[number], side=side)).logits[0]
            own = logits[number, inputs["attention_mask"][number].bool()]
            torch.testing.assert_close(own, alone, atol=1e-4, rtol=1e-4)
        if report is not None:
            assert min(p.final_tokens for p in handle.report.pictures) >= 1
    if plan_settings["trace"]:
        with tools.patch(model, family, **(plan_settings | dict(trace=False))):
            assert torch.equal(logits, tools.forward(model, inputs).logits), "to be traced changes nothing"
    assert torch.equal(tools.forward(model, inputs).logits, plain), "and no trace"


def drawn(family, data):
    rows, plan = data.draw(odd.prompts(family)), data.draw(odd.plans(family))
    check(family, rows, plan, data.draw(st.sampled_from(["left", "right"])))


@pytest.mark.claim("Odd inputs", "odd pictures and prompts, odd plans", "works", "drawn by hypothesis")
@pytest.mark.claim(
    "Determinism", "the same odd inputs twice, on a CPU", "works",
    "the same logits bit for bit, whatever hypothesis draws, and with a trace the same as without",
)  # fmt: skip
@tools.each_family
@given(data=st.data())
@settings(max_examples=FEW)
def test_whatever_is_asked(family, data):
    drawn(family, data)


@pytest.mark.parametrize("why", odd.REFUSED)
@tools.each_family
def test_what_is_never_drawn_is_refused(family, why):
    settings, said = odd.REFUSED[why]
    with pytest.raises(illava.PlanError, match=said):
        tools.patch(tools.build(family), family, **settings)


@tools.each_family
def test_windows_are_run_together_where_there_are_any(family):
    if family.startswith(odd.FAST):
        with tools.patch(tools.build(family), family, fast_windows=True):
            return
    with pytest.raises(illava.PlanError, match="leave fast_windows out"):
        tools.patch(tools.build(family), family, fast_windows=True)


@pytest.mark.slow
@tools.each_family
@given(data=st.data())
@settings(max_examples=MANY)
def test_whatever_is_asked_many_times(family, data):
    drawn(family, data)
