"""Provenance: what every token is made of, as slow references have it, and every patch accounted for."""

from dataclasses import replace

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

import illava
import zoo
from contract import tools
from contract.one_hot import Follower, account, check_step, expected, same_provenance
from contract.recorder import options
from illava.families import qwen2_vl
from zoo.common import V5

RULES = {
    "prune": dict(reduction=0.778, merge="prune"),
    "linear": dict(reduction=0.778, merge="linear"),
    "whole picture": dict(reduction=0.667, merge="recycle", window_score="picture", recycled=0.4),
    "encoder alone": dict(reduction=0.6, merge="recycle", encoder_share=1.0, llm_layers=()),
    "language model alone": dict(reduction=0.6, merge="recycle", vit_layers=()),
    "small frames keep all": dict(vit_tokens_removed=3, llm_tokens_removed=4, merge="recycle"),
}


def compare(family, kind, settings, monkeypatch):
    """One call, against the one-hot features of its reference."""
    model, inputs = tools.build(family), tools.prompt_of(family, kind)
    with tools.patch(model, family, trace=True, **settings) as handle:
        tools.forward(model, inputs)
    report = handle.report
    merges = Follower(zoo.reference(family), monkeypatch)
    zoo.reference(family).forward(model, inputs, *tools.removed_by(handle.plan), **options(handle.plan))
    assert merges.merges, "the reference merged nothing: the case tests nothing"
    starts = [int(names[0]) for names in report._trace.language.tokens]
    order = sorted(range(len(starts)), key=starts.__getitem__)
    pictures = [(p.kind, p.frames, p.unit_side) for p in report.provenance]
    found = expected(family, model, inputs, merges, pictures, order, handle.plan)
    for record, own, wanted in zip(report.pictures, report.provenance, found, strict=True):
        assert own.known
        assert [(s.stage, s.layer) for s in own.merges] == [(r.stage, r.layer) for r in record.layers]
        for step in (*own.merges, own.entry):
            check_step(step, wanted[step.stage, step.layer], wanted["stands"], own)
        account(own)


@tools.each_family
def test_as_the_reference(family, monkeypatch):
    compare(family, tools.mixed(family), tools.DEEP, monkeypatch)


@pytest.mark.slow
@tools.each_single_row_with_pictures
def test_every_prompt(family, kind, monkeypatch):
    compare(family, kind, tools.DEEP, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("settings", RULES.values(), ids=RULES.keys())
@tools.each_family
def test_every_rule(family, settings, monkeypatch):
    compare(family, tools.mixed(family), settings, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
@tools.each_family
def test_a_row_of_a_batch_is_as_alone(family, side):
    model, rows = tools.build(family), zoo.FAMILIES[family].KINDS["batch"]
    with tools.patch(model, family, trace=True, **tools.DEEP) as handle:
        tools.forward(model, tools.prompt_of(family, "batch", side=side))
        together = handle.report.provenance
        for number, row in enumerate(rows):
            own = [p for p in together if p.row == number]
            if not tools.pictures_of([row]):
                assert not own
                continue
            tools.forward(model, tools.prompt(family, row, seeds=[number]))
            for one, other in zip(own, handle.report.provenance, strict=True):
                same_provenance(one, other)


@pytest.mark.parametrize("name", ["tokens", "recycled", "mixed", "state", "sources", "stands"])
def test_the_comparison_of_rows_reads_every_field(name):
    """One entry that differs in one step, and two pictures are not the same."""
    model, inputs = tools.build("qwen2_5_vl"), tools.prompt_of("qwen2_5_vl", "one picture")
    with tools.patch(model, "qwen2_5_vl", trace=True, **tools.DEEP) as handle:
        tools.forward(model, inputs)
    (own,) = handle.report.provenance
    same_provenance(own, replace(own))
    *steps, last = own.merges
    changed = getattr(last, name).to_dense().clone()
    changed.view(-1)[-1] = changed.view(-1)[-1] == 0
    other = replace(own, merges=(*steps, replace(last, **{name: changed})))
    with pytest.raises(AssertionError):
        same_provenance(own, other)


@pytest.mark.slow
@tools.each_family
def test_beams_see_what_their_row_sees(family):
    model, inputs = tools.build(family), tools.beams_of(family)
    with tools.patch(model, family, trace=True, **tools.DEEP) as handle:
        tools.generate(model, inputs, tokens=2, num_beams=3, do_sample=False)
        beams = handle.report.provenance
        tools.forward(model, inputs)
        plain = handle.report.provenance
    assert len(beams) == 3 * len(plain)
    assert [p.kind for p in beams if p.row % 3 == 0] == [p.kind for p in plain]
    for kind in ("image", "video"):
        for repeat in range(3):
            own = [p for p in beams if p.kind == kind and p.row % 3 == repeat]
            for one, other in zip(own, [p for p in plain if p.kind == kind], strict=True):
                assert one.row // 3 == other.row
                same_provenance(one, other)


def test_a_function_of_ones_own_says_the_weights():
    """A rule that hands each kept unit an equal share of everything."""

    def everything(c, kept):
        return c.real[:, None].expand(-1, kept.shape[1], -1) / c.real.sum(1)[:, None, None]

    model, inputs = tools.build("qwen2_5_vl"), tools.prompt_of("qwen2_5_vl", "several pictures")
    with tools.patch(model, "qwen2_5_vl", trace=True, reduction=0.6, merge=everything) as handle:
        tools.forward(model, inputs)
    for picture in handle.report.provenance:
        account(picture)
        for step in picture.merges:
            torch.testing.assert_close(step.share, step.share.mean().expand_as(step.share))
            assert step.recycled.all()


@pytest.mark.skipif(not V5, reason="transformers 4.57 takes no encoded pictures")
def test_features_that_the_caller_brings():
    """Nothing is known of patches then: visual tokens count as such."""
    model, inputs = tools.build("qwen2_5_vl"), tools.prompt_of("qwen2_5_vl", "one picture")
    places = tools.visual_places(model, inputs)
    features = torch.randn(len(places), 32, generator=torch.Generator().manual_seed(0))
    with tools.patch(model, "qwen2_5_vl", trace=True, **tools.DEEP) as handle:
        called = {name: x for name, x in inputs.items() if name != "pixel_values"}
        given = BaseModelOutputWithPooling(pooler_output=(features,))
        tools.forward(model, called, mm_encoder_outputs={"image": given})
        own = handle.report.provenance[0]
    assert not own.known
    assert own.frames == ((1, len(places)),)
    assert [s.stage for s in own.merges] == ["llm", "llm"]
    account(own)


def test_a_projector_without_its_encoder(monkeypatch):
    """Nobody knows what it reads then: nothing is written down, as in a language model called alone."""
    model, find = tools.build("qwen2_5_vl"), qwen2_vl.find_seams
    read = []

    def find_seams(model):
        seams = find(model)
        own = [replace(p, reads=lambda output, alive: read.append(alive) or []) for p in seams.projectors]
        return replace(seams, projectors=tuple(own))

    monkeypatch.setattr(qwen2_vl, "find_seams", find_seams)
    config = model.config
    given = torch.Generator().manual_seed(0)
    features = torch.randn(16, config.vision_config.hidden_size, generator=given)
    embeds = torch.randn(1, 5, config.text_config.hidden_size, generator=given)
    core = model.model

    def alone():
        with torch.no_grad():
            return core.visual.merger(features), core.language_model(inputs_embeds=embeds).last_hidden_state

    plain = alone()
    with tools.patch(model, "qwen2_5_vl", trace=True, **tools.DEEP) as handle:
        patched = alone()
        assert handle.report is None
        assert not read
        tools.forward(model, tools.prompt_of("qwen2_5_vl", "one picture"))
        assert len(read) == 1, "with the encoder it is written down"
    for one, other in zip(plain, patched, strict=True):
        assert torch.equal(one, other)


def test_without_trace_nothing_is_kept():
    model, inputs = tools.build("qwen2_5_vl"), tools.prompt_of("qwen2_5_vl", "one picture")
    with tools.patch(model, "qwen2_5_vl", **tools.MAIN) as handle:
        tools.forward(model, inputs)
    assert handle.report.provenance is None
    assert isinstance(handle.report, illava.Report)
