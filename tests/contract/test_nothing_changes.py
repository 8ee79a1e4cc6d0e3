"""A patch that removes nothing, and a patch that was removed, change nothing: not one bit."""

import functools

import pytest
import torch
from transformers import TextStreamer

from contract import tools

pytestmark = pytest.mark.capability("reversible")

GENERATION = {
    "greedy": dict(do_sample=False),
    "sampling": dict(do_sample=True, temperature=1.5),
    "beams": dict(do_sample=False, num_beams=3),
    "several answers": dict(do_sample=True, num_return_sequences=3),
    "beams, several answers": dict(do_sample=False, num_beams=3, num_return_sequences=2),
}
FAILURES = ["removed after failing in a decoder layer", "removed after failing in a block"]
STATES = [*tools.NOTHING, "removed", *FAILURES]
without_failures = pytest.mark.parametrize("change", [*tools.NOTHING, "removed"], indirect=True)


@pytest.fixture(params=STATES)
def change(request):
    """Puts a model into a state that must not differ from unpatched, when called."""
    handles = []

    def enter(model, family):
        if request.param in tools.NOTHING:
            handles.append(tools.patch(model, family, **tools.NOTHING[request.param]))
            return
        with tools.patch(model, family, **tools.DEEP):
            if "failing" in request.param:
                parts = tools.blocks(model) if "block" in request.param else tools.layers(model)
                place = tools.LAYERS[family]["vit_layers" if "block" in request.param else "llm_layers"][-1]
                dtype = next(model.parameters()).dtype
                inputs = tools.prompt_of(family, tools.mixed(family), dtype=dtype)
                tools.fail_inside(model, parts[place], inputs)

    yield enter
    for handle in handles:
        handle.remove()


@functools.cache
def logits_and_states(family, kind, side):
    """What the unpatched model gives."""
    out = tools.forward(
        tools.build(family), tools.prompt_of(family, kind, side=side), output_hidden_states=True
    )
    return out.logits, out.hidden_states


@functools.cache
def answer(family, kind, how, side="left"):
    model = tools.build(family)
    inputs = tools.beams_of(family) if kind == "beams" else tools.prompt_of(family, kind, side=side)
    return tools.generate(model, inputs, **GENERATION[how])


def equal(expected, out):
    logits, states = expected
    return (
        torch.equal(logits, out.logits)
        and len(states) == len(out.hidden_states)
        and all(map(torch.equal, states, out.hidden_states))
    )


@tools.each_kind()
def test_logits_and_hidden_states(family, kind, change):
    model, inputs = tools.build(family), tools.prompt_of(family, kind)
    expected = logits_and_states(family, kind, "left")
    change(model, family)
    assert equal(expected, tools.forward(model, inputs, output_hidden_states=True))


@pytest.mark.capability("padded batch")
@tools.each_family
def test_logits_of_a_batch_padded_on_the_right(family, change):
    model, inputs = tools.build(family), tools.prompt_of(family, "batch", side="right")
    expected = logits_and_states(family, "batch", "right")
    change(model, family)
    assert equal(expected, tools.forward(model, inputs, output_hidden_states=True))


@tools.each_kind()
def test_answers(family, kind, change):
    model, inputs = tools.build(family), tools.prompt_of(family, kind)
    expected = answer(family, kind, "greedy")
    change(model, family)
    assert torch.equal(expected, tools.generate(model, inputs, **GENERATION["greedy"]))


@pytest.mark.capability("beams")
@pytest.mark.parametrize("how", [how for how in GENERATION if how != "greedy"])
@without_failures
@tools.each_family
def test_answers_by(how, family, change):
    model, inputs = tools.build(family), tools.beams_of(family)
    expected = answer(family, "beams", how)
    change(model, family)
    assert torch.equal(expected, tools.generate(model, inputs, **GENERATION[how]))


@without_failures
@tools.each_family
def test_answers_of_a_batch_padded_on_the_right(family, change):
    """Hugging Face warns and goes on from the padding; so be it."""
    model, inputs = tools.build(family), tools.prompt_of(family, "batch", side="right")
    expected = answer(family, "batch", "greedy", "right")
    change(model, family)
    assert torch.equal(expected, tools.generate(model, inputs, **GENERATION["greedy"]))


class Silent(TextStreamer):
    def __init__(self):
        self.ids = []

    def put(self, value):
        self.ids += value.flatten().tolist()

    def end(self):
        pass


@without_failures
@tools.each_family
def test_streaming(family, change):
    model, inputs = tools.build(family), tools.prompt_of(family, "one picture")
    streamer = Silent()
    change(model, family)
    tools.generate(model, inputs, do_sample=False, streamer=streamer)
    assert streamer.ids == answer(family, "one picture", "greedy").flatten().tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@tools.each_family
def test_types_and_attention(family, attention, dtype):
    model = tools.build(family, attention, dtype)
    inputs = tools.prompt_of(family, "batch", dtype=dtype)
    out = tools.forward(model, inputs, output_hidden_states=True)
    expected = out.logits, out.hidden_states
    with tools.patch(model, family, **tools.NOTHING["every merge idle"]):
        assert equal(expected, tools.forward(model, inputs, output_hidden_states=True))
    with tools.patch(model, family, **tools.DEEP):
        assert not equal(expected, tools.forward(model, inputs, output_hidden_states=True))
    assert equal(expected, tools.forward(model, inputs, output_hidden_states=True))


@without_failures
@tools.each_family
def test_loss_and_gradients(family, change):
    model, inputs = tools.build(family), tools.prompt_of(family, tools.mixed(family))

    def step():
        model.zero_grad()
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return loss.detach(), grads

    loss, gradients = step()
    change(model, family)
    same_loss, same_gradients = step()
    assert torch.equal(loss, same_loss)
    assert gradients.keys() == same_gradients.keys()
    assert all(torch.equal(g, same_gradients[name]) for name, g in gradients.items())


@pytest.mark.capability("text only")
@tools.each_family
def test_text_on_a_merging_patch(family):
    """A call without pictures runs as before even while the patch would merge."""
    model, inputs = tools.build(family), tools.prompt_of(family, "text only")
    expected = logits_and_states(family, "text only", "left")
    ids = answer(family, "text only", "greedy")
    with tools.patch(model, family, **tools.DEEP) as handle:
        assert equal(expected, tools.forward(model, inputs, output_hidden_states=True))
        assert torch.equal(ids, tools.generate(model, inputs, do_sample=False))
        assert handle.report is None
