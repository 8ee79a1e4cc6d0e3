"""The wrappers people really hold: bare model, PEFT, torch.compile, accelerate, AutoModel folders."""

import pytest
import torch

import illava
import tiny

PLAN = dict(vit_layers=(0, 1), llm_layers=(0, 2), reduction=0.7, merge="recycle", recycled=0.3)
INPUTS = ("one picture", "batch")


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def expected(request):
    """What the plain patched model answers, and the family."""
    model = tiny.build(request.param)
    with illava.patch(model, **PLAN):
        return request.param, {name: logits(model, tiny.prompt(*tiny.PROMPTS[name])) for name in INPUTS}


def check(model, wanted, call=logits):
    for name in INPUTS:
        torch.testing.assert_close(
            call(model, tiny.prompt(*tiny.PROMPTS[name])), wanted[name], atol=1e-5, rtol=1e-5
        )


def test_bare_model(expected):
    family, wanted = expected
    whole = tiny.build(family)
    with illava.patch(whole.model, **PLAN) as handle:
        check(whole.model, wanted, lambda m, i: whole.lm_head(m(**i).last_hidden_state))
        assert handle.report.reduction > 0.6
        check(whole, wanted)  # it is the same instance
        illava.unpatch(whole)
        assert not handle.active


def test_peft(expected):
    from peft import LoraConfig, get_peft_model

    family, wanted = expected
    model = get_peft_model(tiny.build(family), LoraConfig(r=2, target_modules=["q_proj", "v_proj", "qkv"]))
    with illava.patch(model, **PLAN):
        check(model, wanted)  # a fresh adapter adds zero
        inputs = tiny.prompt(*tiny.PROMPTS["one picture"])
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert out.shape[1] == inputs["input_ids"].shape[1] + 3
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        gradients = [p.grad for n, p in model.named_parameters() if p.requires_grad and "lora_B" in n]
        assert all(g is not None and g.isfinite().all() for g in gradients)
        assert any(g.abs().sum() > 0 for g in gradients)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "when"),
    [
        ("torch.compile(model)", "compiled first"),
        ("model.compile()", "compiled first"),
        ("torch.compile(model)", "patched first"),
    ],
)
def test_compile(how, when):
    """Under torch.compile the patched model answers the same, and removal is seen as well."""
    model, inputs = tiny.build("qwen2_5_vl", layers=3), tiny.prompt([5, tiny.A, 7])
    plan = {**PLAN, "llm_layers": (0,)}
    plain = logits(model, inputs)
    with illava.patch(model, **plan):
        wanted = logits(model, inputs)

    def compiled():
        if how == "model.compile()":
            model.compile(backend="eager")
            return model
        return torch.compile(model, backend="eager")

    subject = compiled() if when == "compiled first" else None
    if subject is not None:
        torch.testing.assert_close(logits(subject, inputs), plain, atol=1e-5, rtol=1e-5)
    handle = illava.patch(model if subject is None else subject, **plan)
    subject = compiled() if subject is None else subject
    torch.testing.assert_close(logits(subject, inputs), wanted, atol=1e-5, rtol=1e-5)
    assert handle.report.reduction > 0.5
    handle.remove()
    for _ in range(2):
        torch.testing.assert_close(logits(subject, inputs), plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("order", ["offloaded first", "patched first"])
def test_accelerate_offload(expected, order, tmp_path):
    """Weights on disk, brought in block by block through accelerate's hooks."""
    from accelerate import disk_offload

    family, wanted = expected
    model = tiny.build(family)
    if order == "offloaded first":
        disk_offload(model, offload_dir=str(tmp_path), execution_device=torch.device("cpu"))
        handle = illava.patch(model, **PLAN)
    else:
        handle = illava.patch(model, **PLAN)
        disk_offload(model, offload_dir=str(tmp_path), execution_device=torch.device("cpu"))
    check(model, wanted)
    handle.remove()
    check_plain = logits(model, tiny.prompt(*tiny.PROMPTS["one picture"]))
    torch.testing.assert_close(
        check_plain, logits(tiny.build(family), tiny.prompt(*tiny.PROMPTS["one picture"]))
    )


def test_accelerate_device_map(expected, tmp_path):
    """A checkpoint loaded with a device_map that leaves some layers on disk."""
    family, wanted = expected
    model = tiny.build(family)
    model.save_pretrained(tmp_path / "model")
    layers = [f"model.language_model.layers.{i}" for i in range(4)]
    names = ["model.visual", "model.language_model.embed_tokens", "model.language_model.norm",
             "model.language_model.rotary_emb", "lm_head"]  # fmt: skip
    device_map = {
        **dict.fromkeys(names, "cpu"),
        **dict.fromkeys(layers, "cpu"),
        layers[1]: "disk",
        layers[3]: "disk",
    }
    spread = type(model).from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=str(tmp_path / "disk")
    )
    assert spread.hf_device_map[layers[1]] == "disk"
    with illava.patch(spread, **PLAN):
        check(spread.eval(), wanted)


def test_data_parallel_wrapper(expected):
    family, wanted = expected
    model = tiny.build(family)
    with illava.patch(torch.nn.DataParallel(model), **PLAN) as handle:
        check(model, wanted)
        assert handle.active


def test_attention_changed_after_patching(expected):
    """The attention implementation is read when it runs: switching it needs no new patch."""
    family, wanted = expected
    model = tiny.build(family)
    with illava.patch(model, **PLAN):
        model.set_attn_implementation("eager")
        check(model, wanted)


def test_a_generate_that_another_tool_replaced(expected):
    """A plain callable on the instance, as some tools leave it, not a method."""
    model = tiny.build(expected[0])
    inputs = tiny.prompt(*tiny.PROMPTS["one picture"])
    how = dict(max_new_tokens=3, do_sample=False)
    with illava.patch(model, **PLAN):
        plain = model.generate(**inputs, **how)
    own = model.generate
    model.generate = lambda *args, **kwargs: own(*args, **kwargs)
    with illava.patch(model, **PLAN):
        assert torch.equal(model.generate(**inputs, **how), plain)
