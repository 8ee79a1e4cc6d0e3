"""A patch touches one model, and leaves nothing behind on it."""

import copy

import pytest
import torch

import illava
from contract import tools

pytestmark = pytest.mark.capability("reversible")


def warm(model, family):
    """Hugging Face puts its own recorders on a model when first asked for hidden states."""
    inputs = tools.prompt_of(family, tools.mixed(family))
    tools.forward(model, inputs, output_hidden_states=True)
    return inputs


@pytest.mark.parametrize("how", ["used", "failing in a block", "failing in a decoder layer"])
@tools.each_family
def test_no_trace(family, how):
    model = tools.build(family)
    inputs = warm(model, family)
    before = tools.trace(model)
    handle = tools.patch(model, family, **tools.DEEP)
    assert tools.trace(model) != before
    if how == "used":
        tools.generate(model, tools.prompt_of(family, "batch"), do_sample=False)
    else:
        parts = tools.blocks(model) if "block" in how else tools.layers(model)
        tools.fail_inside(model, parts[2], inputs)
        assert handle.active
    handle.remove()
    assert not handle.active
    assert tools.trace(model) == before


@pytest.mark.parametrize("place", ["blocks", "layers"])
@tools.each_family
def test_merging_goes_on_after_a_failure(family, place):
    model, inputs = tools.build(family), tools.prompt_of(family, tools.mixed(family))
    with tools.patch(model, family, **tools.DEEP):
        expected = tools.greedy(model, inputs)
        tools.fail_inside(model, getattr(tools, place)(model)[2], inputs)
        ids, logits, cache = tools.greedy(model, inputs)
    assert torch.equal(ids, expected[0])
    assert torch.equal(logits, expected[1])
    assert tools.held(cache) == tools.held(expected[2])


@pytest.mark.parametrize("patched", [True, False])
@tools.each_family
def test_a_model_can_be_patched_after_a_failure(family, patched):
    """A call was interrupted while hidden states were recorded; nothing else was done to the model."""
    model = tools.zoo.FAMILIES[family].build()  # its own: whatever is left on it must reach no other test
    inputs = tools.prompt_of(family, "one picture")
    if patched:
        tools.patch(model, family, **tools.DEEP)
    tools.fail_inside(model, tools.blocks(model)[2], inputs, restore=False)
    tools.fail_inside(model, tools.layers(model)[2], inputs, restore=False, output_hidden_states=True)
    illava.unpatch(model)
    with tools.patch(model, family, **tools.DEEP), tools.patch(tools.build(family), family, **tools.DEEP):
        logits = [tools.forward(m, inputs).logits for m in (model, tools.build(family))]
    assert torch.equal(*logits)


@tools.each_family
def test_a_failed_patch_leaves_no_trace(family, monkeypatch):
    model = tools.build(family)
    warm(model, family)
    before = tools.trace(model)
    monkeypatch.setattr(illava.Handle, "_hook_layer", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tools.patch(model, family, **tools.DEEP)
    assert tools.trace(model) == before


@tools.each_family
def test_reduction_0_installs_nothing(family):
    """So it costs nothing: no hook, no view of a config, no method on any module."""
    model = tools.build(family)
    warm(model, family)
    before = tools.trace(model)
    with tools.patch(model, family, reduction=0):
        now = tools.trace(model)
    assert [name for name in before if now[name] != before[name]] == ["model"]
    assert set(now["model"][1]) - set(before["model"][1]) == {"_illava_handle"}
    assert now["model"][2:] == before["model"][2:]


@tools.each_family
def test_another_model_of_the_family_is_untouched(family):
    """While the first is patched, and after it has merged."""
    model, other = tools.build(family), tools.zoo.FAMILIES[family].build(seed=1)
    inputs = warm(other, family)
    expected, ids = tools.forward(other, inputs).logits, tools.generate(other, inputs, do_sample=False)
    before = tools.trace(other)
    with tools.patch(model, family, **tools.DEEP) as handle:
        merged = tools.forward(model, inputs).logits
        assert handle.report.reduction > 0.6
        assert torch.equal(expected, tools.forward(other, inputs).logits)
        assert torch.equal(ids, tools.generate(other, inputs, do_sample=False))
        assert tools.trace(other) == before
    assert not torch.equal(merged, tools.forward(model, inputs).logits)


@tools.each_family
def test_copying_needs_removal(family):
    model = tools.build(family)
    with (
        tools.patch(model, family, **tools.DEEP),
        pytest.raises(illava.AlreadyPatchedError, match="remove"),
    ):
        copy.deepcopy(model)
    copy.deepcopy(model)
