"""Caches: returned, reused, cropped, copied, offloaded; and those that cannot hold merged sequences."""

import copy

import pytest
import torch
from transformers import DynamicCache, QuantizedCache, cache_utils

import illava
import zoo
from contract import tools
from trust.plain import each_family, inputs_of, patched, plain_of

KIND = "one picture"
KEPT = dict(do_sample=False, return_dict_in_generate=True)


def claimed(name, promise="works", how="the same tokens as running all anew, without a cache"):
    return pytest.mark.claim("Caches", name, promise, how)


def first_turn(family, tokens=6):
    """Inputs, the ids of prompt and answer, and the cache; the model must be patched."""
    inputs = inputs_of(family, KIND)
    out = tools.generate(tools.build(family), inputs, tokens=tokens, **KEPT)
    return inputs, out.sequences, out.past_key_values


def whole(inputs, ids, **more):
    """A conversation as users pass it on: all of its ids, and a cache that knows most of them."""
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in inputs:
        text["mm_token_type_ids"] = torch.zeros_like(ids)
    return text | more


def words(family, count, seed=3):
    return tools.prompt(family, [count], seeds=[seed])["input_ids"]


def continues(family, inputs, ids, cache, **settings):
    """Whether the answer to `ids` from this cache is what running all anew gives."""
    found = tools.generate(
        tools.build(family), whole(inputs, ids, past_key_values=cache), do_sample=False, **settings
    )
    return torch.equal(found, plain_of(family, KIND).answer(whole(inputs, ids), do_sample=False, **settings))


def skip_unless_repeatable(cache):
    if not all(hasattr(layer, "batch_repeat_interleave") for layer in cache.layers):
        pytest.skip("without illava, too, the state of linear attention cannot be repeated for more rows")


@claimed("a returned cache, for the next turn")
@each_family
def test_next_turn(family):
    with patched(family):
        inputs, ids, cache = first_turn(family)
        ids = torch.cat([ids, words(family, 5)], dim=1)
        assert continues(family, inputs, ids, cache)


@claimed("a returned cache, for beams and several answers")
@each_family
def test_beams_from_a_cache(family):
    """Hugging Face repeats the cache for the beams."""
    with patched(family):
        inputs, ids, cache = first_turn(family)
        skip_unless_repeatable(cache)
        cache.batch_repeat_interleave(3)
        ids = torch.cat([ids, words(family, 5)], dim=1)
        assert continues(family, inputs, ids, cache, num_beams=3, num_return_sequences=3)


@claimed("cropped (cache.crop)")
@each_family
def test_cropped(family):
    """The answer is taken back and another asked for."""
    if family.startswith("minicpmv4"):
        pytest.skip("without illava, too: linear attention cannot forget")
    with patched(family):
        inputs, ids, cache = first_turn(family)
        known = ids.shape[1] - 1
        cache.crop(-4)
        assert cache.get_seq_length() == known - 4
        ids = torch.cat([ids[:, : known - 4], words(family, 3)], dim=1)
        assert continues(family, inputs, ids, cache)


@claimed("cropped into a picture", how="each layer keeps those of its survivors that stood before the cut")
@each_family
def test_cropped_into_a_picture(family):
    if family.startswith("minicpmv4"):
        pytest.skip("without illava, too: linear attention cannot forget")
    with patched(family):
        inputs, ids, cache = first_turn(family)
        places = tools.visual_places(tools.build(family), inputs)
        cut = int(places[len(places) // 2])
        before = [(layer.positions, layer.keys) for layer in cache.layers]
        cache.crop(cut - cache.get_seq_length())
    assert cache.get_seq_length() == cut
    for layer, (positions, keys) in zip(cache.layers, before, strict=True):
        stay = positions[0] < cut
        assert 0 < int(stay.sum()) < len(stay)
        assert torch.equal(layer.positions, positions[:, stay])
        assert torch.equal(layer.keys, keys[:, :, stay])


@claimed("copied (copy.deepcopy): two answers from one beginning")
@each_family
def test_copied(family):
    with patched(family):
        inputs, ids, cache = first_turn(family)
        for seed in (3, 4):
            branch = torch.cat([ids, words(family, 5, seed)], dim=1)
            assert continues(family, inputs, branch, copy.deepcopy(cache))
        assert cache.get_seq_length() == ids.shape[1] - 1


@claimed("repeated and selected by rows (batch_repeat_interleave, batch_select_indices)")
@each_family
def test_rows(family):
    with patched(family):
        inputs, ids, cache = first_turn(family)
        skip_unless_repeatable(cache)
        cache.batch_repeat_interleave(3)
        cache.batch_select_indices(torch.tensor([0, 2]))
        branches = torch.cat([words(family, 5, seed) for seed in (3, 4)])
        ids = torch.cat([ids.expand(2, -1), branches], dim=1)
        assert continues(family, inputs, ids, cache)


@claimed("emptied (cache.reset) and used again", how="bit by bit what a new cache gives")
@each_family
def test_emptied(family):
    with patched(family):
        inputs, ids, cache = first_turn(family)
        cache.reset()
        if cache.get_seq_length():
            pytest.skip("without illava, too: 4.57 cannot empty its dynamic cache")
        found = tools.generate(tools.build(family), inputs | {"past_key_values": cache}, do_sample=False)
    assert torch.equal(found, ids)


@claimed("made by the caller (past_key_values=DynamicCache())")
@pytest.mark.parametrize("configured", [False, True])
@each_family
def test_made_by_the_caller(family, configured):
    model, inputs = tools.build(family), inputs_of(family, KIND)
    config = model.config.get_text_config()
    if not configured and family.startswith("minicpmv4"):
        pytest.skip("without illava, too: linear attention needs a cache made for it")
    cache = DynamicCache(config=config) if configured else DynamicCache()
    with patched(family):
        found = tools.generate(model, inputs | {"past_key_values": cache}, do_sample=False)
    assert torch.equal(found, plain_of(family, KIND).answer(inputs, do_sample=False))
    assert cache.get_seq_length() == found.shape[1] - 1


@claimed("a prefix of text, cached once for many pictures")
@each_family
def test_prefix(family):
    model, inputs = tools.build(family), inputs_of(family, KIND)
    prefix = int(tools.visual_places(model, inputs)[0]) - 2

    def answer():
        if hasattr(model.model, "rope_deltas"):
            model.model.rope_deltas = None  # else Hugging Face places the prefix by the call before it
        cache = DynamicCache(config=model.config.get_text_config())
        start = {"input_ids": inputs["input_ids"][:, :prefix], "past_key_values": cache, "use_cache": True}
        tools.forward(model, start)
        return tools.greedy(model, inputs | {"past_key_values": cache})[:2]

    try:
        logits = answer()[1]
    except (RuntimeError, ValueError, IndexError) as error:
        pytest.skip(f"without illava, too, this version fails: {str(error)[:80]}")
    if not torch.allclose(logits, tools.greedy(model, inputs)[1], atol=1e-4):  # equal tokens may be luck
        pytest.skip("without illava, too, this version misplaces the pictures behind a cached prefix")
    with patched(family) as handle:
        found = answer()[0]
        assert handle.report.reduction > 0.6
    expected = plain_of(family, KIND).answer(inputs, do_sample=False)
    assert torch.equal(found, expected[:, inputs["input_ids"].shape[1] :])


class Stream:
    """Stands in for a CUDA stream, so that offloading runs where there is none."""

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        return None

    def wait_stream(self, other):
        return None


@claimed("offloaded", how="the same tokens as running all anew, with a stand-in for CUDA streams")
@pytest.mark.parametrize("beams", [1, 3])
@each_family
def test_offloaded(family, beams, monkeypatch):
    moved = []
    offload = cache_utils.Cache.offload
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)  # before torch 2.7
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device=None: Stream())
    monkeypatch.setattr(
        cache_utils.Cache, "offload", lambda c, i, *a: (moved.append(i), offload(c, i, *a))[1]
    )
    inputs, settings = inputs_of(family, "beams"), dict(do_sample=False, num_beams=beams)
    with patched(family):
        found = tools.generate(tools.build(family), inputs, cache_implementation="offloaded", **settings)
    assert len(set(moved)) > 1
    assert torch.equal(found, plain_of(family, "beams").answer(inputs, **settings))


# Refused -------------------------------------------------------------------------------------------


class Rounded(cache_utils.QuantizedLayer):
    """A quantised layer that needs no other library: keys and values to two digits."""

    def _quantize(self, tensor, axis):
        return (tensor * 100).round()

    def _dequantize(self, tensor):
        return tensor / 100


class RoundedCache(QuantizedCache):
    def __init__(self, layers):
        cache_utils.Cache.__init__(self, layers=[Rounded() for _ in range(layers)])


def caches(model):
    """Settings of `generate` that make a cache whose layers cannot hold different lengths."""
    return {
        "static": dict(cache_implementation="static"),
        "quantised": dict(past_key_values=RoundedCache(len(tools.layers(model)))),
    }


# Of how we know.
STAND_IN = {
    "static": "",
    "quantised": " (with a stand-in that rounds keys and values, for want of a library)",
}
REFUSED = [
    pytest.param(
        name,
        marks=claimed(
            f"{name}, with pictures",
            "refused",
            f"CacheError names the cache, why, and two ways out{stand_in}",
        ),
    )
    for name, stand_in in STAND_IN.items()
]


@pytest.mark.parametrize("name", REFUSED)
@each_family
def test_refused(family, name):
    model, inputs = tools.build(family), inputs_of(family, KIND)
    if family.startswith("minicpmv4") and name == "quantised":
        pytest.skip("without illava, too: linear attention cannot be quantised")
    tools.generate(model, inputs, do_sample=False, **caches(model)[name])  # the unpatched model can
    with patched(family), pytest.raises(illava.CacheError) as error:
        tools.generate(model, inputs, do_sample=False, **caches(model)[name])
    for part in (
        "Static" if name == "static" else "Rounded",
        "different lengths",
        "DynamicCache",
        "llm_layers=()",
    ):
        assert part in str(error.value)
    with patched(family):  # and the next call is right
        found = tools.generate(model, inputs, do_sample=False)
    assert torch.equal(found, plain_of(family, KIND).answer(inputs, do_sample=False))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=claimed(f"{name}, text alone", how=f"bit by bit what the unpatched model gives{stand_in}"),
        )
        for name, stand_in in STAND_IN.items()
    ],
)
@each_family
def test_text_in_any_cache(family, name):
    model, inputs = tools.build(family), inputs_of(family, "text only")
    if family.startswith("minicpmv4") and name == "quantised":
        pytest.skip("without illava, too: linear attention cannot be quantised")
    expected = tools.generate(model, inputs, do_sample=False, **caches(model)[name])
    with patched(family):
        found = tools.generate(model, inputs, do_sample=False, **caches(model)[name])
    assert torch.equal(found, expected)


@claimed("sliding-window layers", "refused", "patch() names the layers and the setting that turns them off")
@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl", "llava_onevision"])
def test_sliding(family):
    model = zoo.FAMILIES[family].build()
    config = model.config.get_text_config()
    config.layer_types = ["full_attention", "sliding_attention"] * (len(tools.layers(model)) // 2)
    with pytest.raises(illava.SeamError, match=r"sliding_attention layers.*use_sliding_window=False"):
        tools.patch(model, family, **tools.DEEP)
