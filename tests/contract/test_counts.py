"""The plan is kept exactly: what the report says, what the cache holds, what the caller sees."""

import pytest
import torch

import zoo
from contract import tools
from contract.recorder import options


def from_reference(model, family, inputs, plan):
    return zoo.reference(family).forward(model, inputs, *tools.removed_by(plan), **options(plan))


def differences(layers) -> list[int]:
    return [record.tokens_removed for record in layers]


@tools.each_rule
@tools.each_single_row
def test_cache_lengths(family, kind, settings):
    """Every layer keeps the tokens that the reference has alive there, and only those."""
    model, inputs = tools.build(family), tools.prompt_of(family, kind)
    length = inputs["input_ids"].shape[1]
    with tools.patch(model, family, **settings) as handle:
        out = tools.forward(model, inputs, use_cache=True)
    alive = [sum(layer) for layer in from_reference(model, family, inputs, handle.plan).alive[:-1]]
    for kept, expected in zip(tools.held(out.past_key_values), alive, strict=True):
        assert kept in (None, expected)
    assert out.past_key_values.get_seq_length() == length  # the caller's
    assert out.logits.shape[1] == length


@tools.each_single_row_with_pictures
def test_the_report_knows_the_grid_of_merge_units(family, kind):
    """Of the call itself: of MiniCPM-V's two modes, of tiles and slices, of the frames of a video."""
    model, inputs = tools.build(family), tools.prompt_of(family, kind)
    with tools.patch(model, family, **tools.DEFAULT) as handle:
        tools.forward(model, inputs)
    for record in handle.report.pictures:
        frames, height, width = record.token_grid
        assert frames == record.frames
        assert frames * height * width == record.encoded_units
        assert height / width == record.grid[1] / record.grid[2]
        if family.startswith(("qwen", "internvl")):  # which hand over each unit as one token
            assert record.encoded_units == record.tokens


@tools.each_single_row_with_pictures
def test_report_has_the_numbers_of_the_plan(family, kind):
    model, inputs = tools.build(family), tools.prompt_of(family, kind)
    with tools.patch(model, family, **tools.DEEP) as handle:
        tools.forward(model, inputs)
    plan, report = handle.plan, handle.report
    text = zoo.FAMILIES[family].text_tokens(zoo.FAMILIES[family].KINDS[kind][0])
    assert report.tokens == inputs["input_ids"].shape[1] - text
    for record in report.pictures:
        vit = [r for r in record.layers if r.stage == "vit"]
        llm = [r for r in record.layers if r.stage == "llm"]
        assert [r.layer for r in vit] == list(plan.vit_layers)
        assert [r.layer for r in llm] == list(plan.llm_layers)
        frames, height, width = record.grid
        units = record.encoded_units // (record.tiles * frames)  # of one frame or tile
        if "minicpm" not in family:  # there a unit is 4 x 4 patches or 2 x 2, as the call says
            assert units == height * width // plan.merge_size**2
        schedule = plan.segment(frames, units)
        assert [r.tokens_in for r in vit] == [record.tiles * before for _, before, _ in schedule.vit]
        assert [r.tokens_out for r in vit] == [record.tiles * after for _, _, after in schedule.vit]
        assert differences(llm) == list(plan.llm_removed(record.tokens, record.entered_tokens))
        assert llm[0].tokens_in == record.entered_tokens
        assert record.final_tokens == llm[-1].tokens_out
        if record.encoded_units == record.tokens:  # nothing was cropped, pooled or interpolated
            assert record.entered_tokens == vit[-1].tokens_out
            assert abs(record.reduction - tools.DEEP["reduction"]) * record.tokens <= 3.5
    assert report.final_tokens == sum(record.final_tokens for record in report.pictures)


@tools.each_single_row_with_pictures
def test_report_has_the_numbers_of_the_reference(family, kind):
    """Counted by the reference one by one, not by the plan's arithmetic."""
    model, inputs = tools.build(family), tools.prompt_of(family, kind)
    with tools.patch(model, family, **tools.DEEP) as handle:
        tools.forward(model, inputs)
    plan, expected = handle.plan, from_reference(model, family, inputs, handle.plan)
    for stage, layers in (("vit", plan.vit_layers), ("llm", plan.llm_layers)):
        for layer in layers:
            merges = [m for m in expected.merges if (m.stage, m.layer) == (stage, layer)]
            records = [
                r for p in handle.report.pictures for r in p.layers if (r.stage, r.layer) == (stage, layer)
            ]
            assert sum(len(m.kept) for m in merges) == sum(r.tokens_out for r in records)
            if stage == "llm":
                assert sorted(len(m.kept) for m in merges) == sorted(r.tokens_out for r in records)
    alive = sum(expected.alive[0]) - sum(expected.alive[-1])
    assert alive == sum(p.entered_tokens - p.final_tokens for p in handle.report.pictures)
    assert handle.report.reduction > 0.6


@pytest.mark.capability("padded batch")
@tools.each_family
def test_report_and_cache_of_a_batch(family):
    """A layer of the cache is as long as its longest row; every row has the numbers it has alone."""
    model, rows = tools.build(family), zoo.FAMILIES[family].KINDS["batch"]
    longest, records = [], []
    with tools.patch(model, family, **tools.DEEP) as handle:
        for number, row in enumerate(rows):
            before = handle.report
            cache = tools.forward(
                model, tools.prompt(family, row, seeds=[number]), use_cache=True
            ).past_key_values
            kept = tools.held(cache)
            longest = [n and max(n, m) for n, m in zip(kept, longest or kept, strict=True)]
            if handle.report is not before:
                records.append([(p.tokens, differences(p.layers)) for p in handle.report.pictures])
        inputs = tools.prompt_of(family, "batch")
        cache = tools.forward(model, inputs, use_cache=True).past_key_values
    assert tools.held(cache) == longest
    assert cache.get_seq_length() == inputs["input_ids"].shape[1]
    together = [[] for _ in rows]
    for p in handle.report.pictures:
        together[p.row].append((p.tokens, differences(p.layers)))
    assert [row for row in together if row] == records


@tools.each_family
def test_hidden_states_come_back_at_the_callers_length(family):
    """A token merged away is zero from there on."""
    model, inputs = tools.build(family), tools.prompt_of(family, tools.mixed(family))
    with tools.patch(model, family, **tools.DEEP) as handle:
        out = tools.forward(model, inputs, output_hidden_states=True)
        assert torch.equal(out.logits, tools.forward(model, inputs).logits)
    alive = from_reference(model, family, inputs, handle.plan).alive
    assert len(out.hidden_states) == len(alive)
    for states, expected in zip(out.hidden_states, alive, strict=True):
        assert (states[0] != 0).any(-1).tolist() == expected


@tools.each_family
def test_a_picture_too_small_for_the_plan_keeps_a_token(family):
    model, inputs = tools.build(family), tools.prompt_of(family, tools.mixed(family))
    with tools.patch(model, family, reduction=0.999) as handle:
        assert tools.forward(model, inputs).logits.isfinite().all()
    assert min(p.final_tokens for p in handle.report.pictures) >= 1
