"""Which kernel gives the log-sum-exp, with stand-ins for those this machine does not have.

Stand-ins take what the real functions document, by name, and compute it in plain torch.
"""

import sys
import warnings
from types import ModuleType, SimpleNamespace

import pytest
import torch

import illava
import tiny
from illava.attention import (
    BACKENDS,
    AttentionChoice,
    Choices,
    Spans,
    choose,
    varlen_attention,
    varlen_attention_received,
)

SCALE = 0.35
LENGTHS = {"windows of every length and one long": (3, 64, 1, 16, 9, 16, 16, 2, 200), "alike": (16, 16, 16)}


def packed(name):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(sum(LENGTHS[name]), 2, 8, generator=generator) for _ in range(3))
    return q, k, v, Spans.from_lengths(LENGTHS[name], "cpu")


def span_by_span(q, k, v, bounds, max_q, scale):
    """What the packed kernels document: `[N, H, D]` and `[H, N]`, in plain torch."""
    assert bounds.dtype == torch.int32
    edges = bounds.tolist()
    assert edges[0] == 0
    assert edges[-1] == len(q)
    assert max(bounds.diff().tolist()) <= max_q
    outs, levels = [], []
    for start, stop in zip(edges, edges[1:], strict=False):
        scores = q[start:stop].transpose(0, 1).float() @ k[start:stop].permute(1, 2, 0).float() * scale
        outs.append((scores.softmax(-1) @ v[start:stop].transpose(0, 1).float()).transpose(0, 1))
        levels.append(scores.logsumexp(-1))
    return torch.cat(outs).to(q.dtype), torch.cat(levels, dim=1)


def flash_attn_2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                 softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
                 deterministic=False, return_attn_probs=False, block_table=None):  # fmt: skip
    assert not causal
    out, lse = span_by_span(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale)
    return (out, lse, None) if return_attn_probs else out


def flash_attn_3(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None,
                 seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
                 v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1,
                 pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False):  # fmt: skip
    assert not causal
    out, lse = span_by_span(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale)
    return (out, lse) if return_attn_probs else out


def older_flash_attn_3(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None,
                       causal=False):  # fmt: skip
    raise AssertionError("gives no log-sum-exp")


def flash_attn_4(q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
                 min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None,
                 softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0,
                 num_splits=1, pack_gqa=None, deterministic=False, return_lse=False):  # fmt: skip
    assert not causal
    assert qv is None
    out, lse = span_by_span(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale)
    return out, lse if return_lse else None


def torch_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None):
    assert return_aux.lse
    assert max_q == max_k
    return span_by_span(query, key, value, cu_seq_q, max_q, scale)


STAND_INS = {
    "flash_attn_2": ("flash_attn", {"flash_attn_varlen_func": flash_attn_2}),
    "flash_attn_3": ("flash_attn_interface", {"flash_attn_varlen_func": flash_attn_3}),
    "old flash_attn_3": ("flash_attn_interface", {"flash_attn_varlen_func": older_flash_attn_3}),
    "flash_attn_4": ("flash_attn.cute", {"flash_attn_varlen_func": flash_attn_4}),
    "torch_varlen": (
        "torch.nn.attention.varlen",
        {"varlen_attn": torch_varlen, "AuxRequest": lambda lse=False: SimpleNamespace(lse=lse)},
    ),
    "old torch_varlen": ("torch.nn.attention.varlen", {"varlen_attn": torch_varlen}),
}


@pytest.fixture
def install(monkeypatch):
    """Makes of all these packages only the ones named importable."""

    def install(*names):
        for module, _ in STAND_INS.values():
            monkeypatch.setitem(sys.modules, module, None)  # as if it were not there
        for name in names:
            path, functions = STAND_INS[name]
            module = ModuleType(path)
            vars(module).update(functions)
            if path.startswith("flash_attn."):
                monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
            monkeypatch.setitem(sys.modules, path, module)
            if path.startswith("torch"):
                monkeypatch.setattr(torch.nn.attention, "varlen", module, raising=False)

    return install


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("backend", ["flash_attn_2", "flash_attn_3", "flash_attn_4", "torch_varlen"])
def test_packed_kernels(name, backend, install):
    install(backend)
    q, k, v, spans = packed(name)
    out, lse = varlen_attention(q, k, v, spans, scale=SCALE, backend=backend)
    expected, level = varlen_attention(q, k, v, spans, scale=SCALE, backend="blocks")
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, level, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        varlen_attention_received(q, k, lse, spans, scale=SCALE),
        varlen_attention_received(q, k, level, spans, scale=SCALE),
        atol=1e-5, rtol=1e-4,
    )  # fmt: skip


def test_torchs_dense_flash(monkeypatch):
    """It takes no mask: spans of one length go together, and no others."""
    calls = []

    def dense(query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
        calls.append(query.shape[0])
        scores = query @ key.mT * scale
        level = torch.nn.functional.pad(scores.logsumexp(-1), (0, 5))  # some kernels round its length up
        return scores.softmax(-1) @ value, level, None, None, 0, 0, None, None, None

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention", dense)
    q, k, v, spans = packed("windows of every length and one long")
    out, lse = varlen_attention(q, k, v, spans, scale=SCALE, backend="torch_flash")
    assert sorted(calls) == [1, 1, 1, 1, 1, 1, 3]
    expected, level = varlen_attention(q, k, v, spans, scale=SCALE, backend="blocks")
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, level, atol=1e-5, rtol=1e-5)


def test_torchs_own_functions_still_take_what_they_are_given():
    """The stand-ins' arguments are those of the real functions in this torch."""
    import inspect

    dense = torch.ops.aten._scaled_dot_product_flash_attention.default._schema
    assert [a.name for a in dense.arguments] == [
        "query", "key", "value", "dropout_p", "is_causal", "return_debug_mask", "scale",
    ]  # fmt: skip
    assert dense.returns[1].name == "logsumexp"
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="torch before 2.10")
    parameters = inspect.signature(varlen.varlen_attn).parameters
    assert list(parameters)[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"scale", "return_aux"} <= parameters.keys()
    assert varlen.AuxRequest(lse=True).lse is True


CPU, CUDA, META = torch.device("cpu"), torch.device("cuda"), torch.device("meta")
HALF, FULL = torch.bfloat16, torch.float32
ALL = ("flash_attn_2", "flash_attn_3", "torch_varlen")


@pytest.mark.parametrize(
    ("implementation", "device", "dtype", "installed", "backend", "note"),
    [
        ("flash_attention_2", CUDA, HALF, ALL, "flash_attn_2", ""),
        ("flash_attention_2", CUDA, torch.float16, ALL, "flash_attn_2", ""),
        ("flash_attention_2", CUDA, HALF, ("torch_varlen",), "torch_varlen", "install flash-attn 2"),
        ("flash_attention_2", CUDA, FULL, ALL, "blocks", "does not run in float32; load the model"),
        ("flash_attention_2", CPU, FULL, ALL, "torch_cpu", "does not run in float32"),
        ("flash_attention_3", CUDA, HALF, ALL, "flash_attn_3", ""),
        ("flash_attention_3", CUDA, HALF, ("old flash_attn_3",), "torch_flash", "no return_attn_probs="),
        ("flash_attention_4", CUDA, HALF, ("flash_attn_4",), "flash_attn_4", ""),
        ("flash_attention_4", CUDA, HALF, ALL, "torch_varlen", "install a newer flash-attn-4"),
        ("flash_attention_2", CUDA, HALF, ("flash_attn_4",), "torch_flash", "cannot be imported"),
        ("sdpa", CUDA, HALF, ALL, "torch_varlen", ""),
        ("sdpa", CUDA, torch.float16, ALL, "torch_varlen", ""),
        ("sdpa", CUDA, HALF, ("old torch_varlen",), "torch_flash", ""),
        ("sdpa", CUDA, HALF, (), "torch_flash", ""),
        ("sdpa", CUDA, FULL, ALL, "blocks", "slower. Load the model in bfloat16"),
        ("sdpa", CPU, FULL, ALL, "torch_cpu", ""),
        ("sdpa", CPU, HALF, (), "torch_cpu", ""),
        ("sdpa", META, FULL, ALL, "blocks", ""),
        ("eager", CUDA, HALF, ALL, "blocks", ""),
        ("eager", CPU, FULL, ALL, "blocks", ""),
    ],
)
def test_choice_of_kernel(implementation, device, dtype, installed, backend, note, install):
    install(*installed)
    choice = choose(implementation, device, dtype)
    assert choice.kernel == backend
    assert backend in BACKENDS
    assert bool(choice.note) == bool(note)
    assert note in choice.note


def test_a_torch_without_the_cpu_kernel_streams(monkeypatch):
    monkeypatch.setattr(torch.ops, "aten", SimpleNamespace())
    assert choose("sdpa", CPU, FULL).kernel == "blocks"


def test_one_warning_for_each_fallback(install):
    install("torch_varlen")
    choices = Choices()
    with pytest.warns(RuntimeWarning, match="flash_attention_3 come from torch_varlen.*install") as seen:
        choices("flash_attention_3", CUDA, HALF)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choices("flash_attention_3", CUDA, HALF) is choices.last
        choices("sdpa", CUDA, HALF)
        choices("flash_attention_3", CUDA, HALF)


# ---------------------------------------------------------------- in the handle

PLAN = dict(vit_layers=(0, 1), llm_layers=(0, 2), reduction=0.7)


def test_the_handle_shows_what_was_chosen_when_the_model_was_patched():
    model = tiny.build("qwen2_5_vl")
    with illava.patch(model, **PLAN) as handle:
        assert handle.attention == AttentionChoice("sdpa", "cpu", torch.float32, "torch_cpu")
        assert handle.attention.column_sums == "torch"
        assert "sdpa, statistics by torch_cpu and torch" in repr(handle)
        model.set_attn_implementation("eager")
        model(**tiny.prompt([5, tiny.A, 7]))
        assert handle.attention.kernel == handle.report.backend == "blocks"


def test_nothing_is_chosen_where_the_encoder_merges_nothing():
    model = tiny.build("qwen2_5_vl")
    for plan in (dict(reduction=0), dict(vit_layers=(), reduction=0.5)):
        with illava.patch(model, **plan) as handle:
            assert handle.attention is None
            assert "statistics" not in repr(handle)
