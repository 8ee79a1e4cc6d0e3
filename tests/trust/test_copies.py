"""Copying, pickling and saving a patched model, and the cache that one has filled."""

import copy
import hashlib
import io
import pickle

import pytest
import torch

import illava
from contract import tools

PLANS = {
    "both stages": tools.DEEP,
    "encoder only": dict(llm_layers=()),
    "language model only": dict(vit_layers=()),
    "reduction 0": dict(reduction=0),
}
COPIES = {
    "copy.deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "torch.save": lambda x: torch.save(x, io.BytesIO()),
}
each_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
each_copy = pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)


@pytest.mark.claim(
    "Copies", "deepcopy, pickle and torch.save of a patched model", "refused",
    "the error says to remove first; after removal all three work")  # fmt: skip
@each_copy
@each_plan
@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl", "llava_next"])
def test_a_patched_model(family, plan, make):
    model = tools.build(family)
    with (
        tools.patch(model, family, **plan) as handle,
        pytest.raises(illava.AlreadyPatchedError, match="remove"),
    ):
        make(model)
    assert not handle.active
    make(model)


@pytest.mark.claim(
    "Copies", "deepcopy and pickle of a module of a patched model", "refused",
    "its hooks would go on working for the original; every module that carries one refuses")  # fmt: skip
@each_copy
@tools.each_family
def test_a_module_of_a_patched_model(family, make):
    model = tools.build(family)
    with tools.patch(model, family, **tools.DEEP):
        hooked = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
        assert len(hooked) > 8
        for module in hooked:
            with pytest.raises(illava.AlreadyPatchedError, match="remove"):
                make(module)


@pytest.mark.claim(
    "Copies", "save_pretrained and state_dict of a patched model", "works",
    "the files are byte for byte those of the unpatched model, also after it has merged")  # fmt: skip
@tools.each_family
def test_save_pretrained(family, tmp_path):
    model, inputs = tools.build(family), tools.prompt_of(family, "one picture")
    model.save_pretrained(tmp_path / "plain")
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    with tools.patch(model, family, **tools.DEEP):
        expected = tools.forward(model, inputs).logits
        model.save_pretrained(tmp_path / "patched")
        assert all(torch.equal(weights.pop(name), x) for name, x in model.state_dict().items())
        assert not weights
        assert torch.equal(tools.forward(model, inputs).logits, expected)
    files = [
        {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted((tmp_path / name).iterdir())}
        for name in ("plain", "patched")
    ]
    assert files[0] == files[1]
    loaded = type(model).from_pretrained(tmp_path / "patched")
    assert not hasattr(loaded.model, "_illava_handle")
    with tools.patch(loaded.eval(), family, **tools.DEEP) as handle:
        tools.forward(loaded, inputs)
        assert handle.report.reduction > 0.5


def continued(model, inputs, cache, steps=3):
    """The logits of a few more tokens."""
    seen, found = inputs["input_ids"].shape, []
    token = inputs["input_ids"][:, -1:]
    for i in range(1, steps + 1):
        call = {
            "input_ids": token,
            "attention_mask": torch.cat([inputs["attention_mask"], token.new_ones(seen[0], i)], dim=1),
            "past_key_values": cache,
            "position_ids": torch.full((seen[0], 1), seen[1] + i),
        }
        if "mm_token_type_ids" in inputs:
            call["mm_token_type_ids"] = torch.zeros_like(token)
        found.append(tools.forward(model, call).logits)
        token = found[-1].argmax(dim=-1)
    return torch.cat(found, dim=1)


@pytest.mark.claim(
    "Copies", "deepcopy and pickle of a cache that a patched model has filled", "works",
    "decoding on from the copy gives the same bits, and leaves the original as it was")  # fmt: skip
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@tools.each_family
def test_a_cache(family, how):
    model, inputs = tools.build(family), tools.prompt_of(family, "batch")
    with tools.patch(model, family, **tools.DEEP):
        cache = tools.forward(model, inputs, use_cache=True).past_key_values
        before = tools.held(cache)
        twin = copy.deepcopy(cache) if how == "deepcopy" else pickle.loads(pickle.dumps(cache))
        from_twin = continued(model, inputs, twin)
        assert tools.held(cache) == before
        assert torch.equal(continued(model, inputs, cache), from_twin)
        assert tools.held(cache) == tools.held(twin)
