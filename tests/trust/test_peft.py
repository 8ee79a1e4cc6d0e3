"""LoRA adapters on a patched model: attached, disabled, merged, unloaded, trained."""

import pytest
import torch
from torch import nn

import illava
import zoo
from contract import tools
from illava.hooks import ConfigView
from trust import faults


def claim(name, how, verdict="works"):
    return pytest.mark.claim("PEFT", name, verdict, how)


def lora(model, **settings) -> nn.Module:
    """Adapters that say something from the start, on every linear layer of both stages."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    settings = dict(r=2, lora_alpha=2, target_modules="all-linear", init_lora_weights=False) | settings
    return get_peft_model(model, LoraConfig(**settings)).eval()


def adapters(model) -> dict:
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def logits(model, inputs):
    return tools.forward(model, inputs).logits


@claim(
    "LoRA attached before or after patching; disabled, and unloaded before or after removal",
    "the bits of a model without PEFT where it is off, of the other order where it is on",
)
@faults.some_families
def test_lora(family):
    inputs = tools.prompt_of(family, tools.mixed(family))
    base = tools.build(family)
    plain = logits(base, inputs)
    with tools.patch(base, family, **tools.DEEP):
        merged = logits(base, inputs)
    plain_tuned = logits(lora(zoo.FAMILIES[family].build()), inputs)
    found = []
    for order in ("LoRA first", "patch first"):
        model = zoo.FAMILIES[family].build()
        if order == "LoRA first":
            tuned = lora(model)
            handle = tools.patch(tuned, family, **tools.DEEP)
        else:
            handle = tools.patch(model, family, **tools.DEEP)
            tuned = lora(model)
        found.append(logits(tuned, inputs))
        assert not torch.allclose(found[-1], merged, atol=1e-2)
        with tuned.disable_adapter():
            assert torch.equal(logits(tuned, inputs), merged)
        handle.remove()
        assert torch.equal(logits(tuned, inputs), plain_tuned)
        with tools.patch(tuned, family, **tools.DEEP):
            assert torch.equal(logits(tuned, inputs), found[-1])
            model = tuned.unload()  # the adapters leave first
            assert torch.equal(logits(model, inputs), merged)
        assert torch.equal(logits(model, inputs), plain)
        assert not [m for m in model.modules() if isinstance(getattr(m, "config", None), ConfigView)]
    assert torch.equal(*found)


@claim("LoRA merged into the weights of a patched model", "the logits of the adapters but for rounding")
@faults.some_families
def test_merged_adapters(family):
    inputs, tuned = tools.prompt_of(family, "one picture"), lora(zoo.FAMILIES[family].build())
    with tools.patch(tuned, family, **tools.DEEP):
        apart = logits(tuned, inputs)
        tuned.merge_adapter()
        torch.testing.assert_close(logits(tuned, inputs), apart, atol=1e-3, rtol=1e-3)
        tuned.unmerge_adapter()
        torch.testing.assert_close(logits(tuned, inputs), apart, atol=1e-3, rtol=1e-3)
        alone = tuned.merge_and_unload()
        torch.testing.assert_close(logits(alone, inputs), apart, atol=1e-3, rtol=1e-3)


PROJECTORS = {
    "qwen2_5_vl": "merger",
    "internvl": "multi_modal_projector",
    "llava_next": "multi_modal_projector",
}
each_projector = pytest.mark.parametrize(("family", "name"), PROJECTORS.items())


@claim("modules_to_save with the projector, before patching", "with the adapter on and off")
@each_projector
def test_a_projector_that_peft_saves(family, name):
    inputs, model = tools.prompt_of(family, "one picture"), zoo.FAMILIES[family].build()
    with tools.patch(model, family, **tools.DEEP):
        merged = logits(model, inputs)
    tuned = lora(model, modules_to_save=[name])
    with tools.patch(tuned, family, **tools.DEEP):
        with tuned.disable_adapter():
            assert torch.equal(logits(tuned, inputs), merged)
        on = logits(tuned, inputs)
    bare = tuned.merge_and_unload()
    with tools.patch(bare, family, **tools.DEEP):
        torch.testing.assert_close(logits(bare, inputs), on, atol=1e-3, rtol=1e-3)


@claim(
    "modules_to_save with the projector, after patching", "PEFT copies a module with hooks on it", "refused"
)
@each_projector
def test_a_projector_that_peft_copies(family, name):
    model = zoo.FAMILIES[family].build()
    with (
        tools.patch(model, family, **tools.DEEP),
        pytest.raises(illava.AlreadyPatchedError, match="remove"),
    ):
        lora(model, modules_to_save=[name])


@claim(
    "modules_to_save with the encoder or an attention", "it trains a copy that hooks would miss", "refused"
)
@pytest.mark.parametrize("name", ["vision_tower", "self_attn"])
def test_an_encoder_that_peft_saves(name):
    tuned = lora(zoo.FAMILIES["llava_next"].build(), target_modules=["down_proj"], modules_to_save=[name])
    with pytest.raises(illava.AlreadyPatchedError, match="Undo the other one"):
        tools.patch(tuned, "llava_next", **tools.DEEP)


@claim(
    "gradients of LoRA adapters",
    "each adapter that has one unpatched has one; a step along them raises the loss by their length",
)
@pytest.mark.parametrize("merge", ["recycle", "prune", "bipartite"])
@faults.some_families
def test_gradients(family, merge):
    # In double precision (but for norms and softmaxes, which transformers takes in single) the step can be so
    # small that no other token is chosen on the way.
    inputs = tools.prompt_of(family, "one picture", dtype=torch.float64)
    tuned = lora(zoo.FAMILIES[family].build(dtype=torch.float64)).double()
    if hasattr(tuned.model, "set_experts_implementation"):
        tuned.model.set_experts_implementation("eager")  # torch's grouped products know no doubles

    def loss() -> torch.Tensor:
        """Of the last three tokens; Hugging Face's own loss would round to single precision."""
        logits = tuned(**inputs).logits[0, -4:-1]
        return nn.functional.cross_entropy(logits, inputs["input_ids"][0, -3:])

    def gradients() -> dict:
        tuned.zero_grad()
        loss().backward()
        found = {name: p.grad for name, p in adapters(tuned).items() if p.grad is not None}
        assert all(g.isfinite().all() for g in found.values())
        return {name: g.clone() for name, g in found.items() if g.any()}

    unpatched = gradients()
    settings = tools.DEEP if merge == "recycle" else tools.DEFAULT | {"merge": merge}
    with tools.patch(tuned, family, **settings) as handle:
        slopes = gradients()
        assert handle.report.reduction > 0.6
        assert set(slopes) == set(unpatched)
        assert {".language_model." in name for name in slopes} == {True, False}
        if merge == "recycle":
            return  # the weights with which tokens are merged count as constants, so these are no slopes
        length = torch.stack([g.norm() for g in slopes.values()]).norm()
        losses, step, weights = [], 3e-6, adapters(tuned)
        with torch.no_grad():
            for factor in (step, -2 * step):
                for name, g in slopes.items():
                    weights[name] += g / length * factor
                losses.append(loss())
    torch.testing.assert_close((losses[0] - losses[1]) / (2 * step), length, rtol=1e-2, atol=0)
