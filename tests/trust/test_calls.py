"""Ways to hand a prompt to `generate`, and services built on it."""

import functools

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

import illava
import tiny
import zoo
from contract import tools
from contract.recorder import options
from contract.test_features import encode, needs_v5
from trust.plain import each_family, inputs_of, patched, plain_of

KIND = "one picture"


def claimed(name, promise="works", how="the same tokens as running all anew, without a cache"):
    return pytest.mark.claim("Calls", name, promise, how)


def without(inputs, *names):
    return {name: x for name, x in inputs.items() if name not in names}


def embedded(model, inputs):
    with torch.no_grad():
        return model.get_input_embeddings()(inputs["input_ids"])


def agrees(family, inputs, kind=KIND, **settings):
    """Whether the patched model answers these inputs as the plain definition does, having merged."""
    with patched(family) as handle:
        found = tools.generate(tools.build(family), inputs, do_sample=False, **settings)
        assert handle.report.reduction > 0.6
    expected = plain_of(family, kind).answer(inputs_of(family, kind), do_sample=False)
    return torch.equal(found[:, -6:], expected[:, -6:])


@claimed("no attention_mask")
@each_family
def test_no_mask(family):
    assert agrees(family, without(inputs_of(family, KIND), "attention_mask"))


@claimed("token ids as the first argument, a GenerationConfig")
@each_family
def test_positional(family):
    model, inputs = tools.build(family), inputs_of(family, KIND)
    config = GenerationConfig(max_new_tokens=6, do_sample=False)
    with patched(family):
        found = model.generate(inputs["input_ids"], config, **without(inputs, "input_ids"))
    assert torch.equal(found, plain_of(family, KIND).answer(inputs, do_sample=False))


@claimed("inputs_embeds with the pixels")
@each_family
def test_embeds_with_pixels(family):
    """Placeholders are found by their embedding; where Hugging Face cannot do that, nor can illava."""
    model, inputs = tools.build(family), inputs_of(family, KIND)
    given = without(inputs, "input_ids") | {"inputs_embeds": embedded(model, inputs)}
    plain = tools.generate(model, inputs, do_sample=False)[:, -6:]
    if not torch.equal(tools.generate(model, given, do_sample=False), plain):
        pytest.skip("without illava, too, this model does not find its pictures in inputs_embeds")
    assert agrees(family, given)


@claimed(
    "inputs_embeds that hold the pictures already", how="nothing says where they are: bit by bit unpatched"
)
@each_family
def test_embeds_with_pictures_inside(family):
    model, inputs = tools.build(family), inputs_of(family, KIND)
    caught = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: caught.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    tools.forward(model, inputs)
    hook.remove()
    given = {"inputs_embeds": caught[0], "attention_mask": inputs["attention_mask"]}
    expected = tools.generate(model, given, do_sample=False)
    with patched(family) as handle:
        found = tools.generate(model, given, do_sample=False)
        assert handle.report is None
    assert torch.equal(found, expected)


@claimed(
    "inputs_embeds that hold a patched model's features",
    "refused",
    "UnsupportedInputError says what to pass instead",
)
@each_family
def test_embeds_with_merged_features(family):
    model, inputs = tools.build(family), inputs_of(family, KIND)
    embeds = embedded(model, inputs)
    with patched(family):
        embeds[0, tools.visual_places(model, inputs)[:2]] = float("-inf")  # as merged away by the encoder
        given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
        with pytest.raises(illava.UnsupportedInputError, match="pass the features as mm_encoder_outputs"):
            tools.generate(model, given, do_sample=False)


@needs_v5
@claimed("features computed before (mm_encoder_outputs)")
@each_family
def test_features_first(family):
    model, inputs = tools.build(family), inputs_of(family, KIND)
    with patched(family):
        encoded, rest = encode(model, inputs)
        found = tools.generate(model, rest | {"mm_encoder_outputs": encoded}, do_sample=False)
    assert torch.equal(found, plain_of(family, KIND).answer(inputs, do_sample=False))


@needs_v5
@claimed("features computed before, used for several prompts and beams")
@each_family
def test_features_for_several_answers(family):
    """The same features twice: nothing is left in them by the first use."""
    model, inputs = tools.build(family), inputs_of(family, KIND)
    settings = dict(do_sample=False, num_beams=3)
    with patched(family):
        encoded, rest = encode(model, inputs)
        given = rest | {"mm_encoder_outputs": encoded}
        found = [tools.generate(model, dict(given), **settings) for _ in range(2)]
    expected = plain_of(family, KIND).answer(inputs, **settings)
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], expected)


@functools.cache
def chunked(family, kind, chunk):
    """The answer where only the first chunk's tokens ask about the pictures, and the rest comes after."""
    model, inputs = tools.build(family), inputs_of(family, kind)
    with patched(family) as handle:
        plan = handle.plan
    ids = inputs["input_ids"]
    first = {name: x[:, :chunk] if x.shape == ids.shape else x for name, x in inputs.items()}
    run = zoo.reference(family).reader(model, first, *tools.removed_by(plan), **options(plan))
    rest, answer = ids[0, chunk:].tolist(), []
    for _ in range(6):
        answer.append(run([*rest, *answer])[-1].argmax().item())
    return answer


def in_chunks(family, kind):
    """What `generate` gives in two chunks, the first ending behind the last picture, and what it should."""
    model, inputs = tools.build(family), inputs_of(family, kind)
    chunk = int(tools.visual_places(model, inputs).max()) + 3
    assert chunk + 1 < inputs["input_ids"].shape[1]
    split = {"prefill_chunk_size": chunk}
    at_once, unpatched = (tools.greedy(model, inputs, **how)[1] for how in ({}, split))
    if not torch.allclose(at_once, unpatched, atol=1e-4):
        pytest.skip("without illava, too, this version misplaces what comes after the first chunk")
    with patched(family):
        found = tools.greedy(model, inputs, **split)[0]
    return found[0].tolist(), chunked(family, kind, chunk)


@needs_v5
@claimed("prefill_chunk_size", how="the first chunk, with the picture, merges as a prompt of its own")
@each_family
def test_chunks(family):
    """A chunk knows nothing of the next: text that comes there asks about no picture."""
    if family.startswith("minicpmv4"):
        pytest.skip("a large picture is several here, see the next line")
    found, expected = in_chunks(family, KIND)
    assert found == expected


@claimed(
    "prefill_chunk_size with several pictures in a chunk", "refused",
    "transformers cuts their features as one: where one ends and the next begins is lost",
)  # fmt: skip
@each_family
def test_chunks_with_several_pictures(family):
    model, inputs = tools.build(family), inputs_of(family, "several pictures")
    with (
        patched(family) as handle,
        pytest.raises(illava.UnsupportedInputError, match="Leave out prefill_chunk_size"),
    ):
        tools.generate(model, inputs, do_sample=False, prefill_chunk_size=inputs["input_ids"].shape[1] - 1)
    assert handle.report is None  # before anything ran


@claimed("generate_batch (continuous batching), text alone", how="what the unpatched model gives")
@each_family
def test_continuous_batching(family):
    """It takes token ids alone: pictures cannot reach it, so nothing is merged."""
    model = tools.build(family)
    ids = [tools.prompt(family, [n], seeds=[n])["input_ids"][0].tolist() for n in (5, 9)]
    config = GenerationConfig(max_new_tokens=3, do_sample=False)

    def answers():
        try:
            out = model.generate_batch(ids, generation_config=config)
        finally:
            model.set_attn_implementation("sdpa")
        return [out[name].generated_tokens for name in sorted(out)]

    try:
        expected = answers()
    except Exception as error:  # its thread dies of many things
        pytest.skip(f"without illava, too: {type(error).__name__}: {str(error)[:80]}")
    if not expected:
        pytest.skip("without illava, too: continuous batching of this version needs a GPU")
    with patched(family) as handle:
        assert answers() == expected
        assert handle.report is None


@pytest.mark.slow
@claimed("a compiled forward (torch.compile) under generate")
@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl"])
def test_compiled(family, monkeypatch):
    model = tools.build(family)
    with patched(family):
        monkeypatch.setattr(model, "forward", torch.compile(model.forward, backend="eager"), raising=False)
        found = tools.generate(model, inputs_of(family, KIND), do_sample=False, tokens=3)
    expected = plain_of(family, KIND).answer(inputs_of(family, KIND), do_sample=False, tokens=3)
    assert torch.equal(found, expected)


@claimed("another patched model called from within a block or a layer", how="both answer as they do alone")
def test_a_call_within_a_call():
    outer, inner = tiny.build("qwen2_5_vl"), tiny.build("qwen2_vl", seed=1)
    asked = tiny.prompt([5, tiny.A, 7]), tiny.prompt([3, tiny.C, 4])
    plan = dict(vit_layers=(1,), llm_layers=(0, 2), reduction=0.7)
    with illava.patch(outer, **plan), illava.patch(inner, **plan), torch.no_grad():
        alone = outer(**asked[0]).logits, inner(**asked[1]).logits
        found = []

        def ask(module, args, kwargs):
            found.append(inner(**asked[1]).logits)

        places = outer.model.language_model.layers[1], outer.model.visual.blocks[1]
        hooks = [place.register_forward_pre_hook(ask, with_kwargs=True) for place in places]
        assert torch.equal(outer(**asked[0]).logits, alone[0])
        assert len(found) == 2
        assert all(torch.equal(x, alone[1]) for x in found)
        for hook in hooks:
            hook.remove()


@claimed(
    "Ctrl-C in the first decoder layer, then removal",
    "refused",
    "the unpatched model does not take the cache for its own",
)
def test_no_cache_waits_for_what_did_not_come():
    model, cache, inputs = tiny.build("qwen2_5_vl"), DynamicCache(), tiny.prompt([5, tiny.A, 7])

    def interrupt(module, args):
        raise KeyboardInterrupt

    handle = illava.patch(model, vit_layers=(), llm_layers=(0,), reduction=0.7)
    hook = model.model.language_model.layers[0].self_attn.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**inputs, past_key_values=cache, use_cache=True)
    hook.remove()
    handle.remove()
    with pytest.raises(illava.CacheError, match="an unpatched model cannot continue it"):
        model(**inputs, past_key_values=cache, use_cache=True)
