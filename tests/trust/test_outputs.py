"""What a call gives besides tokens, at the caller's length: scores, hidden states, attention, a stream."""

import threading

import pytest
import torch
from transformers import TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

import illava
import zoo
from contract import tools
from trust.plain import each_family, inputs_of, patched, plain_of

ASKED = dict(do_sample=False, return_dict_in_generate=True)


def claimed(name, how):
    return pytest.mark.claim("Outputs", name, "works", how)


def alive_of(family, kind):
    """For each decoder layer, and behind the last, which positions are alive, as the reference finds them."""
    model, inputs = tools.build(family), inputs_of(family, kind)
    with patched(family) as handle:
        plan = handle.plan
    options = dict(recycled=tools.DEEP["recycled"], members=tools.DEEP["members"])
    return torch.tensor(
        zoo.reference(family).forward(model, inputs, *tools.removed_by(plan), **options).alive
    )


def build(family, attention="sdpa"):
    """A model and its patch: attention weights exist only with eager attention."""
    model = tools.build(family, attention)
    return model, tools.patch(model, family, **tools.DEEP)


@claimed("scores and logits of every step", "those of a run that computes all anew for each token")
@each_family
def test_scores(family):
    settings = ASKED | dict(output_scores=True, output_logits=True, repetition_penalty=1.2)
    inputs = inputs_of(family, "beams")
    with patched(family):
        out = tools.generate(tools.build(family), inputs, **settings)
    expected = plain_of(family, "beams").answer(inputs, **settings)
    assert torch.equal(out.sequences, expected.sequences)
    for name in ("scores", "logits"):
        found, wanted = torch.stack(getattr(out, name)), torch.stack(getattr(expected, name))
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@claimed(
    "scores of beams (compute_transition_scores)", "those of a run that computes all anew for each token"
)
@each_family
def test_transition_scores(family):
    settings = ASKED | dict(num_beams=3, output_scores=True)
    model, inputs = tools.build(family), inputs_of(family, "beams")
    with patched(family):
        out = tools.generate(model, inputs, **settings)
        found = model.compute_transition_scores(out.sequences, out.scores, out.beam_indices)
    expected = plain_of(family, "beams").answer(inputs, **settings)
    assert torch.equal(out.beam_indices, expected.beam_indices)
    torch.testing.assert_close(out.sequences_scores, expected.sequences_scores, atol=1e-4, rtol=1e-4)
    wanted = model.compute_transition_scores(expected.sequences, expected.scores, expected.beam_indices)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@claimed(
    "hidden states of every step", "every layer's at the caller's length, zero exactly where nothing lives"
)
@each_family
def test_hidden_states(family):
    kind = tools.mixed(family)
    model, inputs = tools.build(family), inputs_of(family, kind)
    length = inputs["input_ids"].shape[1]
    with patched(family):
        out = tools.generate(model, inputs, tokens=3, output_hidden_states=True, output_logits=True, **ASKED)
        lengths = [[x.shape[1] for x in states] for states in out.hidden_states]
        assert lengths == [[n] * (len(tools.layers(model)) + 1) for n in (length, 1, 1)]
        for layer, (states, alive) in enumerate(
            zip(out.hidden_states[0], alive_of(family, kind), strict=True)
        ):
            assert torch.equal(states[0].any(dim=-1), alive), layer
        for step, logits in zip(out.hidden_states, out.logits, strict=True):
            torch.testing.assert_close(model.lm_head(step[-1][:, -1]), logits, atol=1e-5, rtol=1e-5)


@claimed(
    "attention weights of every step",
    "at the caller's length: zero for tokens merged away, each living row sums to one",
)
@each_family
def test_attentions(family):
    kind = tools.mixed(family)
    model, handle = build(family, "eager")
    inputs, alive = inputs_of(family, kind), alive_of(family, kind)
    length = inputs["input_ids"].shape[1]
    with handle:
        out = tools.generate(model, inputs, tokens=3, output_attentions=True, **ASKED)
    heads = model.config.get_text_config().num_attention_heads
    attending = [i for i, layer in enumerate(tools.layers(model)) if hasattr(layer, "self_attn")]
    by_layer = list(zip(*out.attentions, strict=True))
    assert len(by_layer) == len(attending)  # what attends linearly has no weights, and no entry
    for layer, (prefill, *later) in zip(attending, by_layer, strict=True):
        own = alive[layer]
        assert prefill.shape == (1, heads, length, length)
        torch.testing.assert_close(prefill.sum(-1), own.float().expand(1, heads, -1))
        assert not prefill[..., ~own].any()
        for step, weights in enumerate(later, start=1):
            assert weights.shape == (1, heads, 1, length + step)
            torch.testing.assert_close(weights.sum(-1), torch.ones(1, heads, 1))
            seen = torch.cat([own, torch.ones(step, dtype=torch.bool)])
            assert torch.equal(weights[0].amin(dim=(0, 1)) > 0, seen)


@claimed("attention weights and hidden states asked for in the config", "what the argument gives")
@pytest.mark.parametrize("name", ["attentions", "hidden_states"])
@each_family
def test_asked_for_in_the_config(family, name, monkeypatch):
    model, handle = build(family, "eager")
    inputs = inputs_of(family, "one picture")
    with handle:
        expected = getattr(tools.forward(model, inputs, **{f"output_{name}": True}), name)
        for config in (model.config, model.config.get_text_config()):
            monkeypatch.setattr(config, f"output_{name}", True, raising=False)
        found = getattr(tools.forward(model, inputs), name)
    if found is None:
        pytest.skip(f"without illava, too, the model gives no {name} for what its config says")
    assert all(map(torch.equal, found, expected))


@claimed("attention weights asked of SDPA, which has none to give", "as many as without illava: none")
@each_family
def test_attentions_of_sdpa(family):
    model, inputs = tools.build(family), inputs_of(family, "one picture")
    expected = tools.forward(model, inputs, output_attentions=True).attentions
    with patched(family):
        found = tools.forward(model, inputs, output_attentions=True)
        assert torch.equal(found.logits, tools.forward(model, inputs).logits)
    assert [x is None for x in found.attentions or ()] == [x is None for x in expected or ()]


@claimed("image_hidden_states", "the features of the survivors, zero where the encoder merged a token away")
@each_family
def test_image_hidden_states(family):
    model, inputs = tools.build(family), inputs_of(family, "one picture")
    if not hasattr(tools.forward(model, inputs), "image_hidden_states"):
        pytest.skip("the model's output has no such field")
    with patched(family) as handle:
        features = tools.forward(model, inputs).image_hidden_states
        (picture,) = handle.report.pictures
    rows = features if isinstance(features, torch.Tensor) else torch.cat(list(features))
    rows = rows.flatten(0, -2)
    assert rows.isfinite().all()
    assert 0 < int((~rows.any(dim=-1)).sum()) == picture.tokens - picture.entered_tokens


@pytest.mark.claim(
    "Outputs", "output_router_logits", "refused", "the load-balancing loss would count tokens that are gone"
)
def test_router_logits():
    family = "qwen3_vl_moe"
    model, inputs = tools.build(family), inputs_of(family, "one picture")
    tools.forward(model, inputs, output_router_logits=True)
    with patched(family):
        with pytest.raises(illava.UnsupportedInputError, match="router_logits.*remove the patch"):
            tools.forward(model, inputs, output_router_logits=True)
        text = inputs_of(family, "text only")
        assert tools.forward(model, text, output_router_logits=True).aux_loss > 0


@claimed("attention weights of a padded batch", "each row's are those it has alone")
@each_family
def test_attentions_of_a_batch(family):
    model, handle = build(family, "eager")
    inputs = inputs_of(family, "batch")
    with handle:
        together = tools.forward(model, inputs, output_attentions=True).attentions
        for number, row in enumerate(zoo.FAMILIES[family].KINDS["batch"]):
            real = inputs["attention_mask"][number].bool()
            alone = tools.forward(model, tools.prompt(family, row, seeds=[number]), output_attentions=True)
            for found, expected in zip(together, alone.attentions, strict=True):
                if expected is not None:
                    found = found[number][:, real][:, :, real]
                    torch.testing.assert_close(found, expected[0], atol=1e-5, rtol=1e-5)


class Kept(BaseStreamer):
    """What a streamer was given, piece by piece."""

    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        self.pieces.append(value.flatten().tolist())

    def end(self):
        self.ended = True


@claimed("streamers", "the prompt, then one token at a time, the same as without a stream")
@each_family
def test_streamer(family):
    inputs, kept = inputs_of(family, "one picture"), Kept()
    with patched(family):
        tools.generate(tools.build(family), inputs, do_sample=False, streamer=kept)
    expected = plain_of(family, "one picture").answer(inputs, do_sample=False)[0].tolist()
    assert kept.pieces[0] == inputs["input_ids"][0].tolist()
    assert kept.pieces[1:] == [[token] for token in expected[len(kept.pieces[0]) :]]
    assert kept.ended


@claimed("streamers that another thread reads", "the text of the same tokens")
@each_family
def test_streaming_to_another_thread(family):
    model, inputs = tools.build(family), inputs_of(family, "one picture")
    tokenizer = zoo.FAMILIES[family].processor().tokenizer
    stream = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    with patched(family):
        settings = dict(max_new_tokens=6, do_sample=False, streamer=stream)
        thread = threading.Thread(target=model.generate, kwargs=inputs | settings)
        thread.start()
        text = "".join(stream)
        thread.join()
    # What the streamer makes of these tokens: behind a line's end it begins anew, where `decode` does not.
    expected = TextIteratorStreamer(tokenizer)
    prompt = inputs["input_ids"].shape[1]
    for token in plain_of(family, "one picture").answer(inputs, do_sample=False)[0, prompt:].split(1):
        expected.put(token)
    expected.end()
    assert text == "".join(expected)
    assert text
