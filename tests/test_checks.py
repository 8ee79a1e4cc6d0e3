"""Every place that is checked, in every family, and that a refusal leaves a model as it was."""

import os
import subprocess
import sys
import types

import pytest
import torch
import transformers

import illava
import tiny
from illava import checks
from illava.families import family_of

PLAN = dict(vit_layers=(0, 1), llm_layers=(0, 2), reduction=0.7)
PROMPT = [5, tiny.A, 7]


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def shared(request):
    return tiny.build(request.param)


@pytest.fixture
def model(shared):
    """A model that a test leaves as it found it, which is checked."""
    before = trace(shared)
    yield shared
    illava.unpatch(shared)
    assert trace(shared) == before


@pytest.fixture
def own(request, shared):
    """A model that a test may break."""
    return tiny.build(shared.config.model_type)


def trace(model):
    """Everything a patch touches: `__dict__` keys, hooks, and which config a module holds."""
    return {
        name: (
            sorted(module.__dict__),
            {key: list(value) for key, value in module.__dict__.items() if "hooks" in key and value},
            id(getattr(module, "config", None)),
        )
        for name, module in model.named_modules()
    }


def forward(model, *parts, **extra):
    with torch.no_grad():
        return model(**tiny.prompt(list(parts)), **extra).logits


def positions_like(ids, planes=3):
    return torch.arange(ids.shape[1]).expand(planes, len(ids), -1)


# ---------------------------------------------------------------- what is not a model


LLAMA = transformers.LlamaConfig(
    vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
    num_key_value_heads=1,
)  # fmt: skip


@pytest.mark.parametrize("call", [illava.patch, illava.unpatch])
@pytest.mark.parametrize("thing", ["Qwen/Qwen2.5-VL-3B-Instruct", None, 3, torch.nn.Linear])
def test_things_that_are_not_modules(thing, call):
    with pytest.raises(illava.UnsupportedModelError, match=f"{type(thing).__name__} is not a model; pass"):
        call(thing)


def test_unsupported_models_hear_which_are_supported():
    model = transformers.LlamaForCausalLM(LLAMA)
    before = trace(model)
    with pytest.raises(illava.UnsupportedModelError) as caught:
        illava.patch(model)
    for word in ("LlamaForCausalLM", "'llama'", *illava.supported_models()):
        assert word in str(caught.value)
    assert isinstance(caught.value, TypeError)
    assert trace(model) == before


@pytest.mark.parametrize("inner", ["language_model", "visual"])
def test_parts_of_a_supported_model_are_not_models(model, inner):
    """The decoder or the encoder alone has no pictures to merge."""
    with pytest.raises((illava.UnsupportedModelError, illava.SeamError)):
        illava.patch(getattr(model.model, inner))


def test_every_supported_model_has_its_file():
    assert illava.supported_models() == tuple(sorted(illava.supported_models()))
    assert set(tiny.FAMILIES) <= set(illava.supported_models())
    for model_type in illava.supported_models():
        family = family_of(model_type, "")
        assert all(map(callable, (family.find_seams, family.layout, family.visual_input)))


# ---------------------------------------------------------------- what a plan cannot be for a model


@pytest.mark.parametrize(
    "settings",
    [
        dict(vit_layers=(4,)),
        dict(llm_layers=(0, 40)),
        dict(vit_layers=(1, 1)),
        dict(llm_layers=(-1,)),
        dict(vit_layers=(True,)),
        dict(vit_layers=True),
        dict(reduction=1),
        dict(reduction=0.5, vit_tokens_removed=1),
        dict(plan=illava.Plan.paper()),
    ],
    ids=str,
)
@pytest.mark.parametrize("patched_before", [False, True])
def test_a_plan_that_cannot_be_changes_nothing(model, settings, patched_before):
    """A model that is patched already keeps its patch."""
    handle = illava.patch(model, **PLAN) if patched_before else None
    before = trace(model)
    with pytest.raises(illava.PlanError):
        illava.patch(model, **settings)
    assert trace(model) == before
    if handle is not None:
        assert handle.active
        forward(model, *PROMPT)
        assert handle.report.reduction == pytest.approx(0.7, abs=0.05)


def test_plan_and_settings_at_once(model):
    with pytest.raises(
        TypeError, match=r"plan= or single settings, not both \(got plan and members, score\)"
    ):
        illava.patch(model, plan=illava.Plan(), members=3, score="lse")


@pytest.mark.parametrize("name", ["keep", "merge_size", "depth"])
def test_a_setting_that_does_not_exist(model, name):
    with pytest.raises(TypeError, match=name):
        illava.patch(model, **{name: 1})


# ---------------------------------------------------------------- another tool's code

PLACES = {
    "vision encoder": lambda m: m.model.visual,
    "language model": lambda m: m.model.language_model,
    "encoder block 3": lambda m: m.model.visual.blocks[3],
    "decoder layer 0": lambda m: m.model.language_model.layers[0],
    "attention of encoder block 1": lambda m: m.model.visual.blocks[1].attn,
    "attention of decoder layer 2": lambda m: m.model.language_model.layers[2].self_attn,
}


@pytest.mark.parametrize("place", PLACES)
def test_another_tools_forward_on_an_instance(model, place):
    module = PLACES[place](model)
    module.forward = types.MethodType(lambda self, *a, **k: None, module)
    before = trace(model)
    try:
        with pytest.raises(
            illava.AlreadyPatchedError, match=rf"the {place} \(\w+\) runs code of 'test_checks'"
        ):
            illava.patch(model)
        assert trace(model) == before
    finally:
        del module.forward
    illava.patch(model).remove()


@pytest.mark.parametrize("place", PLACES)
def test_another_tools_forward_on_a_class(model, place, monkeypatch):
    before = trace(model)
    name = place.rstrip("0123456789")  # the first of its class is found
    with monkeypatch.context() as patching:
        patching.setattr(type(PLACES[place](model)), "forward", lambda self, *a, **k: None)
        with pytest.raises(illava.AlreadyPatchedError, match=rf"the {name}0? ?\(\w+\) runs code of 'test_ch"):
            illava.patch(model)
    assert trace(model) == before
    illava.patch(model).remove()


def test_a_subclass_of_a_models_own_code_is_not_another_tool(own):
    """Someone's own block class with its own forward is that class's own code."""

    class Block(type(own.model.visual.blocks[0])):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    own.model.visual.blocks[0].__class__ = Block
    with illava.patch(own, **PLAN) as handle:
        forward(own, *PROMPT)
        assert handle.report.reduction > 0.6


# ---------------------------------------------------------------- parts that are missing

SEAMS = {
    "visual": "model",
    "visual.blocks": "model.visual",
    "visual.merger": "model.visual",
    "language_model.layers": "model.language_model",
    "attn": "model.visual.blocks.0",
    "norm2": "model.visual.blocks.0",
    "mlp": "model.visual.blocks.0",
    "self_attn": "model.language_model.layers.0",
}


@pytest.mark.parametrize("path", SEAMS)
def test_a_missing_part_is_named_with_the_version(own, path):
    delattr(own.get_submodule(SEAMS[path]), path.split(".")[-1])
    before = trace(own)
    with pytest.raises(illava.SeamError) as caught:
        illava.patch(own)
    for word in (repr(path), transformers.__version__, "illava needs it", "version of transformers"):
        assert word in str(caught.value)
    assert trace(own) == before


def test_a_missing_decoder_is_named(own):
    del own.model.language_model
    with pytest.raises(illava.SeamError, match="language_model"):
        illava.patch(own)


# ---------------------------------------------------------------- attention


@pytest.mark.parametrize("implementation", ["flex_attention", "paged|sdpa", "sdpa_paged", "custom"])
@pytest.mark.parametrize("name", ["vision encoder", "language model"])
def test_attention_that_has_masks_of_its_own(model, name, implementation, monkeypatch):
    before = trace(model)
    with monkeypatch.context() as patching:
        patching.setattr(PLACES[name](model).config, "_attn_implementation_internal", implementation)
        with pytest.raises(
            illava.SeamError, match=rf"the {name} attends with '.*'; load|whose masks"
        ) as caught:
            illava.patch(model)
        assert repr(implementation) in str(caught.value)
        assert "attn_implementation='sdpa'" in str(caught.value)
    assert trace(model) == before
    illava.patch(model).remove()


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flash_attention_2", "flash_attention_3"])
def test_attention_that_is_served(model, implementation, monkeypatch):
    with monkeypatch.context() as patching:
        for name in ("vision encoder", "language model"):
            patching.setattr(PLACES[name](model).config, "_attn_implementation_internal", implementation)
        illava.patch(model, **PLAN).remove()


@pytest.mark.parametrize("kinds", [["sliding_attention"] * 4, ["full_attention", "chunked_attention"] * 2])
def test_layers_with_a_window_of_their_own(own, kinds):
    own.model.language_model.config.layer_types = kinds
    before = trace(own)
    with pytest.raises(illava.SeamError, match=f"has {kinds[1]} layers.*use_sliding_window=False"):
        illava.patch(own)
    assert trace(own) == before


# ---------------------------------------------------------------- wrappers


def test_unwrapping(own):
    assert checks.unwrap(own) is own
    assert checks.unwrap(torch.nn.DataParallel(own)) is own
    assert checks.unwrap(torch.compile(own)) is own
    assert checks.unwrap(torch.nn.DataParallel(torch.compile(own))) is own


def test_unpatching_what_is_not_patched_does_nothing(model):
    before = trace(model)
    illava.unpatch(model)
    illava.unpatch(model.model)
    assert trace(model) == before
    handle = illava.patch(model, **PLAN)
    assert repr(handle).startswith(f"<illava.Handle on {type(model.model).__name__}: encoder blocks [0, 1]")
    handle.remove()
    handle.remove()
    assert f"removed from {type(model.model).__name__}" in repr(handle)


def test_unpatching_through_any_door(own):
    before = trace(own)
    for door in (own, own.model, torch.nn.DataParallel(own)):
        handle = illava.patch(own, **PLAN)
        illava.unpatch(door)
        assert not handle.active
        assert trace(own) == before
        illava.unpatch(door)


# ---------------------------------------------------------------- calls that cannot be served


@pytest.fixture
def patched(model):
    with illava.patch(model, **PLAN):
        yield model


def static(model):
    config = model.config.get_text_config()
    return transformers.StaticCache(config=config, max_cache_len=64)


def mask_4d(length):
    return torch.zeros(1, 1, length, length).masked_fill(~torch.ones(length, length).tril().bool(), -1e9)


def unserved_calls(model):
    """Name: (inputs, error). Each would be served without a picture or without a patch."""
    inputs = tiny.prompt(PROMPT)
    ids = inputs["input_ids"]
    positions = positions_like(ids)
    packed = torch.cat([torch.arange(20), torch.arange(ids.shape[1] - 20)]).expand(4, 1, -1)
    unmasked = {k: v for k, v in inputs.items() if k != "attention_mask"}
    return {
        "static cache": (inputs | dict(past_key_values=static(model)), illava.CacheError),
        "4-D mask": (
            inputs | dict(attention_mask=mask_4d(ids.shape[1]), position_ids=positions),
            illava.UnsupportedInputError,
        ),
        "a dictionary of masks": (
            inputs | dict(attention_mask={"full_attention": None}, position_ids=positions),
            illava.UnsupportedInputError,
        ),
        "packed": (unmasked | dict(position_ids=packed), illava.UnsupportedInputError),
    }


CALLS = ["static cache", "4-D mask", "a dictionary of masks", "packed"]


@pytest.mark.parametrize("name", CALLS)
def test_a_refused_call_leaves_the_next_one_as_it_would_be(patched, name):
    wanted = forward(patched, *PROMPT)
    inputs, error = unserved_calls(patched)[name]
    with pytest.raises(error), torch.no_grad():
        patched(**inputs)
    assert torch.equal(forward(patched, *PROMPT), wanted)


@pytest.mark.parametrize("name", CALLS)
def test_what_merging_cannot_serve_runs_where_nothing_merges(model, name):
    """The same calls on pictures from which the plan removes nothing are none of illava's business."""
    inputs, _ = unserved_calls(model)[name]
    with torch.no_grad():
        wanted = model(**inputs).logits
        inputs, _ = unserved_calls(model)[name]
        with illava.patch(model, vit_tokens_removed=0, llm_tokens_removed=0):
            assert torch.equal(model(**inputs).logits, wanted)


def test_a_static_cache_serves_text(own):
    """`generate` keeps a static cache on the model, so this takes a model of its own."""
    text = tiny.prompt([6])
    with illava.patch(own, **PLAN):
        static_ids = own.generate(**text, max_new_tokens=3, do_sample=False, cache_implementation="static")
        assert torch.equal(static_ids, own.generate(**text, max_new_tokens=3, do_sample=False))


def test_a_static_cache_in_generate(own):
    with (
        illava.patch(own, **PLAN),
        pytest.raises(illava.CacheError, match=r"StaticCache .*leave out cache_implementation"),
    ):
        own.generate(**tiny.prompt(PROMPT), max_new_tokens=2, cache_implementation="static")


def test_a_4d_mask_after_a_merge_is_refused_in_decoding_as_well(patched):
    with torch.no_grad():
        cache = patched(**tiny.prompt(PROMPT), use_cache=True).past_key_values
        past = cache.get_seq_length()
        with pytest.raises(illava.UnsupportedInputError, match="2-D mask"):
            patched(
                input_ids=torch.tensor([[5]]),
                attention_mask=torch.zeros(1, 1, 1, past + 1),
                position_ids=torch.full((3, 1, 1), past),
                past_key_values=cache,
            )


def test_position_ids_of_a_padded_batch_are_not_packed_sequences(patched):
    """A row's text positions that restart under a mask, or in several rows, are padding."""
    inputs = tiny.prompt(PROMPT, [3, tiny.C, 4])
    ids = inputs["input_ids"]
    text = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    positions = torch.cat([text[None], positions_like(ids)])
    with torch.no_grad():
        assert patched(**inputs, position_ids=positions).logits.isfinite().all()


def test_checkpointing_is_refused_in_training_alone(own):
    with illava.patch(own, **PLAN):
        own.gradient_checkpointing_enable()
        own.eval()
        assert forward(own, *PROMPT).isfinite().all()
        own.train()
        with pytest.raises(illava.UnsupportedInputError, match="gradient_checkpointing_disable"):
            own(**tiny.prompt(PROMPT))
        own(**tiny.prompt([6])).logits.sum().backward()  # without a picture nothing merges


@pytest.mark.parametrize("layers", [dict(llm_layers=()), dict(vit_layers=())], ids=str)
def test_checkpointing_is_refused_by_the_stage_that_merges(own, layers):
    with illava.patch(own, **PLAN | layers):
        own.train()
        own.gradient_checkpointing_enable()
        with pytest.raises(illava.UnsupportedInputError, match="gradient_checkpointing_disable"):
            own(**tiny.prompt(PROMPT))
        own.gradient_checkpointing_disable()
        own(**tiny.prompt(PROMPT)).logits.sum().backward()


def test_the_encoders_own_dead_features_are_refused_where_nothing_says_what_they_are(patched):
    """Features of the patched encoder put into `inputs_embeds` by hand, without ids."""
    inputs = tiny.prompt(PROMPT)
    ids = inputs["input_ids"]
    with torch.no_grad():
        features = patched.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        features = torch.cat(list(getattr(features, "pooler_output", features)))
        assert features.isneginf().all(1).any()
        embeds = patched.get_input_embeddings()(ids).masked_scatter((ids == tiny.IMAGE)[..., None], features)
        with pytest.raises(illava.UnsupportedInputError, match="mm_encoder_outputs"):
            patched(inputs_embeds=embeds, position_ids=positions_like(ids))


def test_dead_features_without_ids_are_refused_and_live_ones_are_not(patched):
    embeds = torch.randn(1, 9, 32)
    positions = torch.arange(9).expand(3, 1, -1)
    with torch.no_grad():
        patched(inputs_embeds=embeds, position_ids=positions)
        embeds[0, 4] = float("-inf")
        with pytest.raises(
            illava.UnsupportedInputError, match="inputs_embeds holds.*or patch with vit_layers"
        ):
            patched(inputs_embeds=embeds, position_ids=positions)


def test_a_prompt_without_any_text(patched):
    """Placeholders alone, nothing around them: ranked by all queries."""
    inputs = tiny.prompt(PROMPT)
    ids = inputs["input_ids"][inputs["input_ids"] == tiny.IMAGE][None]
    inputs |= dict(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions_like(ids))
    if tiny.V5:
        inputs["mm_token_type_ids"] = torch.ones_like(ids)
    with torch.no_grad():
        assert patched(**inputs).logits.isfinite().all()


# ---------------------------------------------------------------- a merged cache in other hands


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_merged_cache_outlives_its_patch_only_patched(model, tokens):
    new = torch.tensor([[5, 6, 7][:tokens]])
    with torch.no_grad():
        with illava.patch(model, **PLAN):
            cache = model(**tiny.prompt(PROMPT), use_cache=True).past_key_values
        past = cache.get_seq_length()
        positions = torch.arange(past, past + tokens).expand(3, 1, -1)
        with pytest.raises(illava.CacheError, match=f"holds {past} tokens.*Patch the model again"):
            model(input_ids=new, past_key_values=cache, position_ids=positions)
        assert cache.get_seq_length() == past
        with illava.patch(model, **PLAN):
            assert model(input_ids=new, past_key_values=cache, position_ids=positions).logits.isfinite().all()
        assert cache.get_seq_length() == past + tokens


# ---------------------------------------------------------------- the errors themselves


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("PlanError", ValueError),
        ("UnsupportedModelError", TypeError),
        ("SeamError", RuntimeError),
        ("AlreadyPatchedError", RuntimeError),
        ("UnsupportedInputError", ValueError),
        ("CacheError", RuntimeError),
    ],
)
def test_errors_are_illavas_and_pythons(name, base):
    error = getattr(illava, name)
    assert issubclass(error, illava.IllavaError)
    assert issubclass(error, base)


def test_public_names_are_those_that_can_be_looked_up():
    from illava import _HOME

    assert set(illava.__all__) == set(_HOME)
    assert not {n for n in illava.__all__ if n.startswith("_")}
    with pytest.raises(AttributeError, match="module 'illava' has no attribute 'nothing'"):
        illava.nothing  # noqa: B018
    with pytest.raises(ImportError):
        from illava import nothing  # noqa: F401


def test_importing_loads_neither_torch_nor_transformers_and_is_quick():
    code = (
        "import sys, time; start = time.perf_counter(); import illava; took = time.perf_counter() - start;"
        "print(took < 0.5, *({'torch', 'transformers', 'rich'} & set(sys.modules)))"
    )
    root = os.path.dirname(os.path.dirname(illava.__file__))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": root},
    )  # fmt: skip
    assert done.stdout.split() == ["True"]
