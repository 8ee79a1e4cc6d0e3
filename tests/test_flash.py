"""Flash attention's path through Hugging Face, with a stand-in for the flash-attn package.

The kernels need a GPU; what illava hands them does not. The stand-in computes what flash-attn's own
functions document (bottom-right aligned causal masks, packed spans) in plain torch, so that masks,
padding and positions that illava prepares for flash attention are checked on the CPU.
"""

import pytest
import torch
from transformers import modeling_flash_attention_utils as hf

import illava
import tiny

PLAN = dict(vit_layers=(0, 1), llm_layers=(0, 2), reduction=0.7, merge="recycle", recycled=0.3)


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    """`[B, L, H, D]`; with `causal`, the last query sees the last key."""
    keys, values = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) * softmax_scale
    if causal:
        visible = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        scores = scores.masked_fill(~visible, float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1).nan_to_num(), values)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
):
    assert int((cu_seqlens_q.diff()).max()) <= max_seqlen_q
    spans = zip(
        cu_seqlens_q.tolist(),
        cu_seqlens_q.tolist()[1:],
        cu_seqlens_k.tolist(),
        cu_seqlens_k.tolist()[1:],
        strict=False,
    )
    parts = [
        flash_attn_func(q[None, a:b], k[None, c:d], v[None, c:d], 0.0, softmax_scale, causal)[0]
        for a, b, c, d in spans
    ]
    return torch.cat(parts)


@pytest.fixture
def flash(monkeypatch):
    functions = (flash_attn_func, flash_attn_varlen_func)
    if tiny.V5:
        functions += (None,)
    monkeypatch.setattr(hf, "_lazy_imports", lambda *_, **__: (*functions, hf._pad_input, hf._unpad_input))
    process = hf.lazy_import_flash_attention(
        "flash_attention_2", **({} if tiny.V5 else {"force_import": True})
    )
    assert process
    yield
    monkeypatch.undo()
    for name in (
        "_flash_fn",
        "_flash_varlen_fn",
        "_pad_fn",
        "_unpad_fn",
        "_process_flash_kwargs_fn",
        "_loaded_implementation",
    ):
        if hasattr(hf, name):
            setattr(hf, name, None)


def build(family):
    """A model that attends with SDPA, and its twin that attends with flash attention."""
    models = tiny.build(family), tiny.build(family)
    for config in (models[1].config, models[1].config.text_config, models[1].config.vision_config):
        config._attn_implementation = "flash_attention_2"
    models[1].model.language_model._attn_implementation = "flash_attention_2"
    return models


@pytest.mark.parametrize("name", tiny.PROMPTS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_flash_attention_answers_as_sdpa_does(family, name, flash):
    sdpa, flashed = build(family)
    inputs = tiny.prompt(*tiny.PROMPTS[name])
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        plain = [m(**inputs).logits[real] for m in (sdpa, flashed)]
    torch.testing.assert_close(*plain, atol=1e-4, rtol=1e-4)
    answers = []
    for model in (sdpa, flashed):
        with illava.patch(model, **PLAN), torch.no_grad():
            out = model(**inputs)
            ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
            answers.append(
                (out.logits[real], ids, [layer.keys.shape[2] for layer in out.past_key_values.layers])
            )
    torch.testing.assert_close(answers[0][0], answers[1][0], atol=1e-4, rtol=1e-4)
    assert torch.equal(answers[0][1], answers[1][1])
    assert answers[0][2] == answers[1][2]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_flash_attention_without_a_mask(family, flash):
    """With no mask the causal alignment is the kernel's own, and the gaps that merges leave in the
    positions must not be taken for packed sequences."""
    sdpa, flashed = build(family)
    inputs = tiny.prompt([5, tiny.A, 7, tiny.C, 3])
    del inputs["attention_mask"]
    logits = []
    for model in (sdpa, flashed):
        with illava.patch(model, **PLAN), torch.no_grad():
            logits.append(model(**inputs).logits)
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)
