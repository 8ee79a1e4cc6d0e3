"""Bad input gets the value, the reason and the remedy, and leaves nothing half patched."""

import os
import subprocess
import sys
import types

import pytest
import tiny
import torch
import transformers

import illava

PLAN = dict(vit_layers=(0, 1), llm_layers=(0, 2), reduction=0.7)
PROMPT = [5, tiny.A, 7]


@pytest.fixture
def model():
    return tiny.build("qwen2_5_vl")


@pytest.fixture
def patched(model):
    with illava.patch(model, **PLAN):
        yield model


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(vit_layers=(0, 9)), r"vit_layers=\(0, 9\): this model has 4 vit layers.*\[9\].*up to 3"),
        (dict(llm_layers=(4,)), r"llm_layers=\(4,\).*\[4\] are out of range"),
        (dict(llm_layers=(1, 1)), "names a layer twice"),
        (dict(vit_layers=(-1,)), r"\[-1\] are not layer numbers"),
        (dict(vit_layers=3), r"give a tuple, vit_layers=\(3,\)"),
        (dict(reduction=1.0), r"reduction=1.0 is outside \[0, 1\)"),
        (dict(reduction=-0.1), r"reduction=-0.1 is outside"),
        (dict(reduction=float("nan")), "outside"),
        (dict(vit_keep_ratio=0.0), "would leave a picture without a token"),
        (dict(reduction=0.5, llm_keep_ratio=0.9), "two budgets at once: reduction=0.5, llm_keep_ratio=0.9"),
        (dict(vit_keep_ratio=0.9, llm_tokens_removed=3), "two budgets at once"),
        (dict(llm_layers=(1,), vit_keep_ratio=0.9), "give llm_keep_ratio, or llm_layers=()"),
        (dict(vit_tokens_removed=-1), "not a whole number of at least 0"),
        (dict(members=0), "members=0"),
        (dict(score="entropy"), "choose one of 'attention', 'lse'"),
    ],
)
def test_plans_that_cannot_be(model, settings, message):
    before = hooks(model)
    with pytest.raises(illava.PlanError, match=message):
        illava.patch(model, **settings)
    assert hooks(model) == before
    assert issubclass(illava.PlanError, ValueError)


def test_settings_that_do_not_exist(model):
    with pytest.raises(TypeError, match="keep"):
        illava.patch(model, keep=0.3)
    with pytest.raises(TypeError, match="plan= or single settings"):
        illava.patch(model, plan=illava.Plan(), reduction=0.3)
    with pytest.raises(AttributeError, match="nothing"):
        illava.nothing  # noqa: B018


def test_models_that_are_not_supported():
    config = transformers.Qwen2Config(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1,
    )  # fmt: skip
    with pytest.raises(
        illava.UnsupportedModelError, match=r"Qwen2ForCausalLM.*'qwen2'.*qwen2_5_vl, qwen2_vl"
    ):
        illava.patch(transformers.Qwen2ForCausalLM(config))
    with pytest.raises(illava.UnsupportedModelError, match="str is not a model"):
        illava.patch("Qwen/Qwen2.5-VL-3B-Instruct")
    with pytest.raises(illava.UnsupportedModelError, match="Linear"):
        illava.patch(torch.nn.Linear(2, 2))
    assert illava.supported_models() == ("qwen2_5_vl", "qwen2_vl")


def test_another_tool_on_the_instance(model):
    layer = model.model.language_model.layers[2]
    layer.forward = types.MethodType(lambda self, *a, **k: None, layer)
    before = hooks(model)
    with pytest.raises(illava.AlreadyPatchedError, match="decoder layer 2.*test_errors.*Undo the other"):
        illava.patch(model)
    assert hooks(model) == before


def test_another_tool_on_the_class(model, monkeypatch):
    monkeypatch.setattr(type(model.model.visual.blocks[0].attn), "forward", lambda self, *a, **k: None)
    with pytest.raises(illava.AlreadyPatchedError, match="attention of encoder block 0.*test_errors"):
        illava.patch(model)


def test_a_missing_seam(model):
    del model.model.visual.merger
    with pytest.raises(illava.SeamError, match=f"visual.merger.*{transformers.__version__}"):
        illava.patch(model)


def test_attention_that_cannot_be_served(model):
    model.model.language_model.config._attn_implementation = "flex_attention"
    with pytest.raises(illava.SeamError, match="'flex_attention'.*attn_implementation='sdpa'"):
        illava.patch(model)


def test_sliding_windows_in_the_language_model(model):
    model.model.language_model.config.layer_types[1] = "sliding_attention"
    with pytest.raises(illava.SeamError, match="sliding_attention.*use_sliding_window=False"):
        illava.patch(model)


def test_a_static_cache(patched):
    with pytest.raises(illava.CacheError, match="StaticCache.*StaticLayer.*default DynamicCache"):
        patched.generate(
            **tiny.prompt(PROMPT), max_new_tokens=2, cache_implementation="static", do_sample=False
        )
    # Without pictures nothing merges, and any cache will do.
    patched.generate(**tiny.prompt([6]), max_new_tokens=2, do_sample=False)
    # And the failure has left nothing behind.
    assert patched(**tiny.prompt(PROMPT)).logits.isfinite().all()


def test_a_cache_filled_by_a_patched_model_is_refused_by_an_unpatched_one(model):
    with illava.patch(model, **PLAN), torch.no_grad():
        cache = model(**tiny.prompt(PROMPT), use_cache=True).past_key_values
    with pytest.raises(illava.CacheError, match="unpatched model cannot continue it"), torch.no_grad():
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)


def test_a_ready_made_mask(patched):
    inputs = tiny.prompt(PROMPT)
    length = inputs["input_ids"].shape[1]
    extra = {}
    if tiny.V5:
        extra["position_ids"] = torch.arange(length).expand(3, 1, -1)
    else:
        extra["position_ids"] = torch.arange(length).expand(3, 1, -1)
    inputs["attention_mask"] = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    with pytest.raises(illava.UnsupportedInputError, match=r"\(1, 1, .*2-D mask"):
        patched(**inputs, **extra)


def test_packed_sequences(patched):
    inputs = tiny.prompt(PROMPT)
    length = inputs["input_ids"].shape[1]
    del inputs["attention_mask"]
    packed = torch.cat([torch.arange(length - 4), torch.arange(4)]).expand(4, 1, -1)
    with pytest.raises(
        illava.UnsupportedInputError, match="position_ids restart 1 times.*one sequence per row"
    ):
        patched(**inputs, position_ids=packed)


@pytest.mark.parametrize("layers", [dict(llm_layers=()), dict(vit_layers=())])
def test_gradient_checkpointing(model, layers):
    with illava.patch(model, **{**PLAN, **layers}):
        model.train()
        model.gradient_checkpointing_enable()
        with pytest.raises(illava.UnsupportedInputError, match="gradient_checkpointing_disable"):
            model(**tiny.prompt(PROMPT))
        model.gradient_checkpointing_disable()
        assert model(**tiny.prompt(PROMPT)).logits.isfinite().all()


def test_dead_features_of_unknown_place(patched):
    inputs = tiny.prompt(PROMPT)
    with torch.no_grad():
        features = patched.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        features = torch.cat(list(getattr(features, "pooler_output", features)))
        embeds = patched.get_input_embeddings()(inputs["input_ids"])
        embeds = embeds.masked_scatter((inputs["input_ids"] == tiny.IMAGE)[..., None], features)
        with pytest.raises(illava.UnsupportedInputError, match="mm_encoder_outputs"):
            patched(inputs_embeds=embeds, position_ids=torch.arange(embeds.shape[1]).expand(3, 1, -1))


def test_features_handed_over_by_the_caller(patched):
    """Features encoded apart and passed on: what was merged away travels with them."""
    if not tiny.V5:
        pytest.skip("transformers 4.57 takes no mm_encoder_outputs")
    inputs = tiny.prompt([3, tiny.A, 4, tiny.B, 2])
    with torch.no_grad():
        wanted = patched(**inputs).logits
        encoded = patched.model.get_image_features(inputs.pop("pixel_values"), inputs["image_grid_thw"])
        assert torch.equal(patched(**inputs, mm_encoder_outputs={"image": encoded}).logits, wanted)


def test_pixels_with_embeddings(patched):
    """`inputs_embeds` in place of ids: placeholders are found by their embedding, as the model does."""
    inputs = tiny.prompt(PROMPT)
    with torch.no_grad():
        positions = torch.arange(inputs["input_ids"].shape[1]).expand(3, 1, -1)
        wanted = patched(**inputs, position_ids=positions).logits
        ids = inputs.pop("input_ids")
        inputs.pop("mm_token_type_ids", None)
        embeds = patched.get_input_embeddings()(ids)
        assert torch.equal(patched(**inputs, inputs_embeds=embeds, position_ids=positions).logits, wanted)


def test_language_model_called_by_itself(patched):
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        out = patched.model.language_model(input_ids=ids)
        with illava.patch(patched, reduction=0.0):
            assert torch.equal(
                out.last_hidden_state, patched.model.language_model(input_ids=ids).last_hidden_state
            )


def test_features_and_placeholders_that_do_not_match(patched):
    """The model's own error, not one of illava's making."""
    inputs = tiny.prompt(PROMPT)
    inputs["input_ids"][0, inputs["input_ids"][0].tolist().index(tiny.IMAGE)] = 7
    with pytest.raises(
        (ValueError, RuntimeError), match="[Ii]mage features and image tokens do not match|shape"
    ):
        patched(**inputs, position_ids=torch.arange(inputs["input_ids"].shape[1]).expand(3, 1, -1))


def test_unpatching_what_is_not_patched(model):
    illava.unpatch(model)
    handle = illava.patch(model, **PLAN)
    assert "on Qwen2_5_VLModel" in repr(handle)
    illava.unpatch(model)
    illava.unpatch(model.model)
    handle.remove()
    assert "removed from" in repr(handle)


def test_importing_is_quick_and_changes_nothing():
    code = (
        "import sys, time; t = time.perf_counter(); import illava; t = time.perf_counter() - t;"
        "print(t < 0.5, any(m.split('.')[0] in ('torch', 'transformers') for m in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(illava.__file__))},
    )  # fmt: skip
    assert done.stdout.split() == ["True", "False"]


def test_public_names():
    assert sorted(illava.__all__) == illava.__all__
    for name in illava.__all__:
        assert getattr(illava, name).__module__.startswith("illava.")
    assert set(dir(illava)) == {*illava.__all__, "__version__"}
    assert callable(illava.patch)  # not the module of that name
