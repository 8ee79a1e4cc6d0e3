"""Padding, beams and several answers give each row what it gets alone."""

import pytest
import torch

import zoo
from contract import tools


def rows_of(family):
    return list(enumerate(zoo.FAMILIES[family].KINDS["batch"]))


@pytest.mark.capability("padded batch")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@tools.each_family
@tools.each_rule
def test_forward(family, side, attention, settings):
    model = tools.build(family, attention)
    inputs = tools.prompt_of(family, "batch", side=side)
    with tools.patch(model, family, **settings):
        logits = tools.forward(model, inputs).logits
        for number, row in rows_of(family):
            alone = tools.forward(model, tools.prompt(family, row, seeds=[number])).logits[0]
            real = inputs["attention_mask"][number].bool()
            torch.testing.assert_close(logits[number, real], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.capability("padded batch")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@tools.each_family
@tools.each_rule
def test_generate(family, attention, settings):
    model = tools.build(family, attention)
    with tools.patch(model, family, **settings):
        ids, logits, _ = tools.greedy(model, tools.prompt_of(family, "batch"), tokens=8)
        for number, row in rows_of(family):
            alone_ids, alone, _ = tools.greedy(model, tools.prompt(family, row, seeds=[number]), tokens=8)
            torch.testing.assert_close(logits[number], alone[0], atol=1e-4, rtol=1e-4)
            assert ids[number].tolist() == alone_ids[0].tolist()


@pytest.mark.capability("padded batch")
@tools.each_family
@tools.each_rule
def test_a_long_text_beside_a_short_picture(family, settings):
    """The row of text keeps its length, the other is padded to it: nothing may leak from padding."""
    first = tools.pictures_of(zoo.FAMILIES[family].KINDS["one picture"])[0]
    rows = [[400], [2, first, 3]]
    model = tools.build(family)
    with tools.patch(model, family, **settings):
        ids, logits, _ = tools.greedy(model, tools.prompt(family, *rows))
        for number, row in enumerate(rows):
            alone_ids, alone, _ = tools.greedy(model, tools.prompt(family, row, seeds=[number]))
            torch.testing.assert_close(logits[number], alone[0], atol=1e-4, rtol=1e-4)
            assert ids[number].tolist() == alone_ids[0].tolist()


@pytest.mark.capability("padded batch")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@tools.each_family
@tools.each_rule
def test_rows_of_one_length_that_merging_makes_ragged(family, attention, settings):
    """Nothing is padded by the caller, so only illava knows of the padding there is after a merge."""
    model = tools.build(family, attention)
    picture = tools.pictures_of(zoo.FAMILIES[family].KINDS["one picture"])[0]
    length = tools.prompt(family, [2, picture, 3])["input_ids"].shape[1]
    words = 1 + length - tools.prompt(family, [1])["input_ids"].shape[1]
    rows = [[words], [2, picture, 3]]
    inputs = tools.prompt(family, *rows)
    assert inputs["attention_mask"].all()
    with tools.patch(model, family, **settings):
        ids, logits, _ = tools.greedy(model, inputs)
        for number, row in enumerate(rows):
            alone_ids, alone, _ = tools.greedy(model, tools.prompt(family, row, seeds=[number]))
            torch.testing.assert_close(logits[number], alone[0], atol=1e-4, rtol=1e-4)
            assert ids[number].tolist() == alone_ids[0].tolist()


@pytest.mark.capability("beams")
@tools.each_family
@tools.each_rule
def test_beams(family, settings):
    model = tools.build(family)
    beams = dict(num_beams=2, num_return_sequences=2, do_sample=False)
    with tools.patch(model, family, **settings) as handle:
        together = tools.generate(model, tools.beams_of(family), **beams)[:, -6:]
        assert handle.report.reduction > 0.6
        for number, row in enumerate(zoo.FAMILIES[family].BEAMS):
            alone = tools.generate(model, tools.prompt(family, row, seeds=[number]), **beams)[:, -6:]
            assert torch.equal(together[2 * number : 2 * number + 2], alone)


@pytest.mark.capability("beams")
@tools.each_family
@tools.each_rule
def test_several_sampled_answers_share_one_prefill(family, settings):
    """Rows expanded from one prompt hold the same survivors: the first tokens' scores agree."""
    row = zoo.FAMILIES[family].BEAMS[0]
    model, inputs = tools.build(family), tools.prompt(family, row)
    several = dict(do_sample=True, return_dict_in_generate=True, output_logits=True)
    with tools.patch(model, family, **settings) as handle:
        alone = tools.generate(model, inputs, **several).logits[0]
        pictures = len(handle.report.pictures)
        logits = tools.generate(model, inputs, num_return_sequences=3, **several).logits[0]
        assert len(handle.report.pictures) == 3 * pictures
    torch.testing.assert_close(logits, alone.expand(3, -1), atol=1e-4, rtol=1e-4)
