"""A patch that removes nothing, and a patch that was removed, change nothing: not one bit."""

import copy

import pytest
import torch
from transformers import TextStreamer

import illava
import tiny

GENERATION = {
    "greedy": dict(do_sample=False),
    "sampling": dict(do_sample=True, temperature=1.5),
    "beams": dict(do_sample=False, num_beams=3),
    "several answers": dict(do_sample=True, num_return_sequences=3),
    "beams, several answers": dict(do_sample=False, num_beams=3, num_return_sequences=2),
}


def forward(model, inputs, **extra):
    with torch.no_grad():
        return model(**inputs, **extra)


def generate(model, inputs, **extra):
    torch.manual_seed(7)
    return model.generate(**inputs, max_new_tokens=6, **extra)


def trace(model):
    """Everything a patch could leave behind: types, `__dict__` keys, hooks, configs, forwards."""
    seen = {}
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        seen[name] = (
            type(module),
            sorted(module.__dict__),
            {key: list(value.values()) for key, value in module.__dict__.items() if "hooks" in key and value},
            type(config),
            id(config),
            config.to_dict() if config is not None else None,
            module.forward.__func__,
        )
    return seen


class Silent(TextStreamer):
    def __init__(self):
        self.ids = []

    def put(self, value):
        self.ids += value.flatten().tolist()

    def end(self):
        pass


def turns(model, first, second, cached):
    """Two turns of one conversation; the second brings a new picture."""
    out = model.generate(**first, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    follow = torch.cat([out.sequences, second["input_ids"]], dim=1)
    if not cached:
        both = {k: torch.cat([first[k], second[k]]) for k in ("pixel_values", "image_grid_thw")}
        inputs = {"input_ids": follow, "attention_mask": torch.ones_like(follow), **both}
        if tiny.V5:
            inputs["mm_token_type_ids"] = (follow == tiny.IMAGE).int()
        return forward(model, inputs).logits
    # With the cache, only what is new goes in, at the positions the first turn left off.
    past = out.past_key_values
    known = past.get_seq_length()
    new = follow[:, known:]
    delta = model.model.rope_deltas
    grids = {"image_grid_thw": second["image_grid_thw"]}
    if tiny.V5:
        grids["mm_token_type_ids"] = (new == tiny.IMAGE).int()
    positions, _ = model.model.get_rope_index(new, **grids)
    return forward(
        model,
        {
            "input_ids": new,
            "attention_mask": torch.ones_like(follow),
            "position_ids": positions + known + delta[:, None],
            "past_key_values": past,
            "pixel_values": second["pixel_values"],
            **grids,
        },
    ).logits


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def model(request):
    return tiny.build(request.param)


# Two ways to remove nothing: no merge at all, and merges that find nothing to remove in any picture here.
NOTHING = {
    "reduction 0": dict(reduction=0),
    "every merge idle": dict(
        vit_tokens_removed=0, llm_tokens_removed=0, vit_layers=(0, 1), llm_layers=(0, 2)
    ),
}


@pytest.fixture(params=[*NOTHING, "removed", "removed after an exception"])
def change(request, model):
    """Puts the model into a state that must not differ from unpatched, when called."""
    handles = []

    def enter():
        if request.param in NOTHING:
            handles.append(illava.patch(model, **NOTHING[request.param]))
            return
        with illava.patch(model, reduction=0.8, vit_layers=(0, 1), llm_layers=(0, 2)):
            if "exception" in request.param:
                fail_inside(model)

    yield enter
    for handle in handles:
        handle.remove()


def fail_inside(model):
    def fail(*_):
        raise KeyError("failure of the test's own")

    hook = model.model.language_model.layers[3].register_forward_hook(fail)
    with pytest.raises(KeyError, match="test's own"):
        forward(model, tiny.prompt(*tiny.PROMPTS["one picture"]))
    hook.remove()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", tiny.PROMPTS)
def test_logits(model, name, side, change):
    inputs = tiny.prompt(*tiny.PROMPTS[name], side=side)
    expected = forward(model, inputs, output_hidden_states=True)
    change()
    actual = forward(model, inputs, output_hidden_states=True)
    assert torch.equal(expected.logits, actual.logits)
    assert all(map(torch.equal, expected.hidden_states, actual.hidden_states))


@pytest.mark.parametrize("how", GENERATION)
@pytest.mark.parametrize("name", ["pictures and video", "batch"])
def test_generated_ids(model, name, how, change):
    inputs = tiny.prompt(*tiny.PROMPTS[name])
    expected = generate(model, inputs, **GENERATION[how])
    change()
    assert torch.equal(expected, generate(model, inputs, **GENERATION[how]))


def test_streaming(model, change):
    inputs = tiny.prompt(*tiny.PROMPTS["one picture"])
    expected, actual = Silent(), Silent()
    generate(model, inputs, do_sample=False, streamer=expected)
    change()
    generate(model, inputs, do_sample=False, streamer=actual)
    assert expected.ids == actual.ids
    assert len(actual.ids) > 6


@pytest.mark.parametrize("cached", [True, False])
def test_second_turn(model, cached, change):
    first, second = tiny.prompt([4, tiny.A, 5]), tiny.prompt([3, tiny.C, 4], seeds=[5])
    expected = turns(model, first, second, cached)
    change()
    assert torch.equal(expected, turns(model, first, second, cached))


def test_labels_and_gradients(model, change):
    inputs = tiny.prompt(*tiny.PROMPTS["several pictures"])

    def step():
        model.zero_grad()
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    loss, gradients = step()
    change()
    same_loss, same_gradients = step()
    assert torch.equal(loss, same_loss)
    assert all(map(torch.equal, gradients, same_gradients))
    model.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_types_and_attention(family, attention, dtype):
    model = tiny.build(family, attention=attention, dtype=dtype)
    inputs = tiny.prompt(*tiny.PROMPTS["batch"], dtype=dtype)
    expected = forward(model, inputs).logits
    with illava.patch(model, **NOTHING["every merge idle"]):
        assert torch.equal(expected, forward(model, inputs).logits)
    with illava.patch(model, reduction=0.8) as handle:
        merged = forward(model, inputs).logits
        assert merged.dtype == dtype
        assert merged.shape == expected.shape
        assert merged.isfinite().all()
        assert handle.report.reduction > 0.7
    assert torch.equal(expected, forward(model, inputs).logits)


def test_text_only_on_a_merging_patch(model):
    """A call without pictures runs as before even while the patch would merge."""
    inputs = tiny.prompt(*tiny.PROMPTS["text only"])
    expected = generate(model, inputs, do_sample=False)
    with illava.patch(model, reduction=0.8) as handle:
        assert torch.equal(expected, generate(model, inputs, do_sample=False))
        assert handle.report is None


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("raises", [False, True])
def test_no_trace(family, raises):
    model = tiny.build(family)
    forward(model, tiny.prompt(*tiny.PROMPTS["one picture"]))
    before = trace(model)
    handle = illava.patch(model, reduction=0.8, vit_layers=(0, 1), llm_layers=(0, 2))
    assert trace(model) != before
    if raises:
        fail_inside(model)
        assert handle.active
    else:
        generate(model, tiny.prompt(*tiny.PROMPTS["batch"]), do_sample=False)
    handle.remove()
    assert not handle.active
    assert trace(model) == before


def test_a_failed_patch_leaves_no_trace(monkeypatch):
    model = tiny.build("qwen2_5_vl")
    before = trace(model)
    monkeypatch.setattr(illava.Handle, "_hook_layer", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        illava.patch(model, reduction=0.5)
    assert trace(model) == before


def test_reduction_0_runs_nothing_of_illavas():
    """So it costs nothing: no hook, no view of a config, on any module."""
    model = tiny.build("qwen2_5_vl")
    before = trace(model)
    with illava.patch(model, reduction=0):
        now = trace(model)
        assert [name for name in before if now[name] != before[name]] == ["model"]
        assert set(now["model"][1]) - set(before["model"][1]) == {"_illava_handle"}
        assert now["model"][2:] == before["model"][2:]


def test_other_models_are_untouched():
    one, other = tiny.build("qwen2_5_vl"), tiny.build("qwen2_5_vl")
    inputs = tiny.prompt(*tiny.PROMPTS["one picture"])
    expected, before = forward(other, inputs).logits, trace(other)
    with illava.patch(one, reduction=0.8):
        assert torch.equal(expected, forward(other, inputs).logits)
        assert trace(other) == before
        assert not torch.equal(expected, forward(one, inputs).logits)


def test_copying_needs_removal():
    model = tiny.build("qwen2_vl")
    with illava.patch(model), pytest.raises(illava.AlreadyPatchedError, match="remove"):
        copy.deepcopy(model)
    copy.deepcopy(model)
