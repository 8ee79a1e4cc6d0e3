"""All windows, frames and pictures of an encoder in one attention call."""

import pytest
import torch

import illava
import tiny
import zoo
from contract import tools
from zoo import internvl

FAMILIES = tiny.FAMILIES
PLAN = dict(vit_layers=(0, 1), llm_layers=(0, 2), reduction=0.7, merge="recycle", recycled=0.3)
PROMPT = [3, tiny.A, 4, tiny.V, 2, tiny.C, 6]


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


class Calls:
    """Counts calls of the fused attention in the vision encoder."""

    def __init__(self, monkeypatch, model):
        self.count, own = 0, torch.nn.functional.scaled_dot_product_attention

        def counted(*args, **kwargs):
            self.count += self.seeing
            return own(*args, **kwargs)

        self.seeing = False
        model.model.visual.register_forward_pre_hook(lambda *_: setattr(self, "seeing", True))
        model.model.visual.register_forward_hook(lambda *_: setattr(self, "seeing", False))
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_results_with_and_without_merging(family, attention):
    model, inputs = tiny.build(family, attention=attention), tiny.prompt(PROMPT)
    expected = logits(model, inputs)
    with illava.patch(model, reduction=0, fast_windows=True):
        torch.testing.assert_close(logits(model, inputs), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(model, inputs), expected)
    with illava.patch(model, **PLAN):
        merged = logits(model, inputs)
    with illava.patch(model, **PLAN, fast_windows=True):
        torch.testing.assert_close(logits(model, inputs), merged, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(merged, expected, atol=1e-3)
    assert torch.equal(logits(model, inputs), expected)


@pytest.mark.parametrize("plan", [dict(reduction=0), dict(reduction=0.5, encoder_share=0)], ids=str)
def test_patches_joined_inside_an_encoder_that_merges_nothing(plan):
    """Spans behind the module that joins them are those of the halved grid, as where blocks merge."""
    family = "minicpmv4_6"
    if family not in zoo.FAMILIES:
        pytest.skip(zoo.ABSENT[family])
    model, inputs = tools.build(family), tools.prompt_of(family, tools.mixed(family))
    with tools.patch(model, family, **plan):
        expected = logits(model, inputs)
    with tools.patch(model, family, **plan, fast_windows=True):
        torch.testing.assert_close(logits(model, inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("plan", [dict(reduction=0), PLAN], ids=["alone", "merging"])
def test_one_call_for_spans_of_one_length(plan, monkeypatch):
    model, inputs = tiny.build("qwen2_5_vl"), tiny.prompt([3, tiny.Image(16, 16), 4])
    calls = Calls(monkeypatch, model)
    logits(model, inputs)
    loops = calls.count
    calls.count = 0
    with illava.patch(model, fast_windows=True, **plan):
        logits(model, inputs)
    assert loops >= 2 + 2 * 16  # two blocks over the whole picture, two over its 16 windows
    assert calls.count <= len(model.model.visual.blocks) * 3  # survivors leave windows of few lengths


def test_gradients_flow():
    model, inputs = tiny.build("qwen2_5_vl"), tiny.prompt(PROMPT)
    with illava.patch(model, reduction=0, fast_windows=True):
        model(**inputs).logits.sum().backward()
    gradient = model.model.visual.blocks[0].attn.qkv.weight.grad
    assert torch.isfinite(gradient).all()
    assert gradient.abs().sum() > 0


def test_where_there_is_nothing_to_run_together():
    model = internvl.build()
    with pytest.raises(illava.PlanError, match="leave fast_windows out"):
        illava.patch(model, fast_windows=True)
    assert not hasattr(model.model, "_illava_handle")
