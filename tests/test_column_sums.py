"""The Triton kernel for attention received, against its definition in fp64.

Without a GPU the kernel runs in Triton's interpreter; under `-m gpu` the same tests run compiled, on CUDA.
"""

import math
import warnings
from importlib.util import find_spec

import pytest
import torch

from illava import kernels
from illava.attention import (
    Spans,
    column_sum_backend,
    column_sums,
    definition,
    streaming,
    varlen_attention_received,
    varlen_log_sum_exp,
)
from on_triton import MATRIX_UNITS, assert_wide_copies, device_limits, measure, ptx

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


# ---------------------------------------------------------------- where the kernel runs


def packed(q, k, lengths, *, given=None, **settings):
    """S_avg of packed spans; `given` is L in fp64, or `None` to have the kernel compute it."""
    spans = Spans.from_lengths(lengths, q.device)
    backend = settings.setdefault("backend", "triton")
    if given is None:
        given = varlen_log_sum_exp(q, k, spans, scale=settings["scale"], backend=backend)
    return varlen_attention_received(q, k, given.float(), spans, **settings)


def packed_unread(q, k, bounds, *, longest, scale, unit):
    """The same where the host knows no lengths, only a bound; spans may be empty."""
    spans = Spans.from_cu_seqlens(bounds, longest)
    lse = varlen_log_sum_exp(q, k, spans, scale=scale, backend="triton")
    return varlen_attention_received(q, k, lse, spans, scale=scale, unit=unit, backend="triton")


def packed_log_sum_exp(q, k, lengths, *, scale):
    spans = Spans.from_lengths(lengths, q.device)
    return varlen_log_sum_exp(q, k, spans, scale=scale, backend="triton")


def dense(q, k, **settings):
    return streaming.attention_received(q, k, **{"backend": "triton", **settings})


def dense_log_sum_exp(q, k, **settings):
    return streaming.log_sum_exp(q, k, backend="triton", **settings)


def views(q, k, lse, q_positions, k_positions, **settings):
    """The same on contiguous tensors, and on views of larger ones with other strides."""

    def strided(x, *order):
        """Laid out in `order`, every other channel and token of a larger tensor."""
        back = [order.index(d) for d in range(x.ndim)]
        wide = torch.full([2 * x.shape[d] + 3 for d in order], 7.0, dtype=torch.float64).to(x)
        place = tuple(slice(1, 1 + 2 * x.shape[d], 2) for d in order)
        wide[place] = x.permute(order)
        return wide[place].permute(back)

    plain = dense(q, k, lse=lse, q_positions=q_positions, k_positions=k_positions, **settings)
    other = dense(
        strided(q, 0, 2, 1, 3),
        strided(k, 2, 0, 3, 1),
        lse=strided(lse, 0, 2, 1),
        q_positions=q_positions[:1].expand(len(q), -1),
        k_positions=strided(k_positions, 1, 0),
        **settings,
    )
    return plain, other


# ---------------------------------------------------------------- what it must yield


def random(*shape, seed=0, scale=1.0, dtype=FP32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def visible_pairs(q_positions, k_positions):
    keys = k_positions[:, None, :]
    return (keys >= 0) & (keys <= q_positions[:, :, None])


def in_type(q, k, scale, visible=None):
    """S_avg computed plainly in the type of q and k: products, probabilities; sums in fp32.

    In fp32 as exp(s - L) with L rounded to fp32, as an attention kernel gives it.
    """
    scores = q @ definition.repeat_heads(k, q.shape[1]).transpose(-1, -2) * scale
    if visible is None:
        visible = torch.ones(len(q), *scores.shape[2:], dtype=torch.bool)
    scores = scores.masked_fill(~visible[:, None], -math.inf)
    if q.dtype == FP32:
        given = (scores - exact_level(q, k, scale, visible).float()[..., None]).exp()
    else:
        given = scores.softmax(dim=-1)
    received = given.nan_to_num().float().mean(dim=1).sum(dim=1)
    return received / visible.sum(dim=1).clamp(min=1)


def exactly(q, k, scale, visible=None):
    return definition.attention_received(q.double(), k.double(), scale=scale, visible=visible)


def exact_level(q, k, scale, visible=None):
    return definition.log_sum_exp(q.double(), k.double(), scale=scale, visible=visible)


def assert_as_good(actual, exact, plain):
    """An error of at most twice that of the plain computation, or of rounding the result to fp32."""
    assert actual.dtype == FP32
    assert actual.shape == exact.shape
    assert actual.isfinite().all()
    error, usual = ((x.double() - exact).norm().item() for x in (actual, plain))
    rounding = torch.finfo(FP32).eps * exact.norm().item()
    assert error <= 2 * max(usual, rounding), f"{error:.2e}, plainly {usual:.2e}"


def heads_first(x):
    return x.transpose(0, 1)[None]  # [N, H, D] to [1, H, N, D]


def span_by_span(function, q, k, lengths, scale):
    """`[N]` of a function of dense batches."""
    parts = zip(q.split(lengths), k.split(lengths), strict=True)
    return torch.cat([function(heads_first(a), heads_first(b), scale)[0] for a, b in parts])


# ---------------------------------------------------------------- packed spans

AWKWARD = [1, 15, 16, 17, 63, 64, 65, 200]


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("size", [64, 72, 80, 96, 128, 256])
def test_head_sizes_and_types(run, size, dtype):
    lengths, scale = [5, 70], size**-0.5
    q, k = (random(75, 2, size, seed=s, scale=1.5, dtype=dtype) for s in (0, 1))
    exact = span_by_span(exactly, q, k, lengths, scale)
    assert_as_good(
        run(packed, q, k, lengths, scale=scale), exact, span_by_span(in_type, q, k, lengths, scale)
    )


@pytest.mark.parametrize(("unit", "dtype"), [(1, FP32), (7, FP32), (3, BF16)])
def test_spans_of_awkward_lengths(run, unit, dtype):
    scale = 0.3
    q, k = (random(441, 2, 20, seed=s, dtype=dtype) for s in (0, 1))
    exact = span_by_span(exactly, q, k, AWKWARD, scale).view(-1, unit).mean(dim=1)
    plain = span_by_span(in_type, q, k, AWKWARD, scale).view(-1, unit).mean(dim=1)
    given = span_by_span(lambda *a: exact_level(*a).transpose(1, 2), q, k, AWKWARD, scale)
    for level in (None, given):
        assert_as_good(run(packed, q, k, AWKWARD, given=level, scale=scale, unit=unit), exact, plain)
    assert_as_good(packed(q, k, AWKWARD, given=given, scale=scale, unit=unit, backend="torch"), exact, plain)


def test_log_sum_exp_of_spans(run):
    q, k = (random(441, 2, 20, seed=s) for s in (0, 1))
    exact = span_by_span(lambda *a: exact_level(*a).transpose(1, 2), q, k, AWKWARD, 0.3)
    torch.testing.assert_close(run(packed_log_sum_exp, q, k, AWKWARD, scale=0.3), exact.float())


# ---------------------------------------------------------------- dense batches


def causal(batch, length):
    return torch.arange(length).expand(batch, -1)


def holes(batch, length):
    """Not in order of position, some of them missing, every fifth slot padding."""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randperm(2 * length, generator=generator)[:length] for _ in range(batch)]
    return torch.stack(rows).masked_fill(torch.arange(length) % 5 == 2, -1)


WIDE = causal(2, 100)
# Query heads, key heads, query positions, key positions (None: everyone sees everyone).
LEFT = (WIDE - torch.tensor([[0], [70]])).clamp(min=-1)
RIGHT = WIDE.masked_fill(torch.tensor([[100], [65]]) <= WIDE, -1)
# Query heads, key heads, query positions, key positions (None: everyone sees everyone).
SETTINGS = {
    "all see all": (4, 2, None, None),
    "one head each": (1, 1, WIDE, WIDE),
    "two to a key": (2, 1, WIDE, WIDE),
    "four to a key": (8, 2, WIDE[:, 40:], WIDE),
    "seven to a key": (7, 1, WIDE[:, 80:], WIDE),
    "padded on the left": (2, 2, LEFT, LEFT),
    "padded on the right": (2, 2, RIGHT, RIGHT),
    "holes": (2, 1, holes(2, 70), holes(2, 100)),
    "few queries count": (4, 2, WIDE.masked_fill(WIDE % 9 != 3, -1), WIDE),
    "the last query": (4, 2, torch.full((2, 1), 99), WIDE.masked_fill(WIDE < 30, -1)),
    "a cache before": (2, 1, WIDE[:, 36:], WIDE),
    "a block and one query need a mask": (2, 1, (WIDE - 2).clamp(min=0), WIDE),
    "keys nobody sees": (2, 2, WIDE[:, :70], WIDE),
    "nobody counts": (2, 2, torch.full((2, 5), -1), WIDE),
    "no query": (2, 2, torch.zeros(2, 0, dtype=torch.long), WIDE),
}


def setting(name, dtype=FP32, size=20):
    heads, key_heads, q_positions, k_positions = SETTINGS[name]
    queries = 100 if q_positions is None else q_positions.shape[1]
    q = random(2, heads, queries, size, scale=1.5, dtype=dtype)
    k = random(2, key_heads, 100, size, seed=1, scale=1.5, dtype=dtype)
    visible = None if q_positions is None else visible_pairs(q_positions, k_positions)
    return q, k, visible, dict(q_positions=q_positions, k_positions=k_positions)


@pytest.mark.parametrize("name", SETTINGS)
def test_dense_batches(run, name):
    q, k, visible, positions = setting(name)
    exact, plain = exactly(q, k, 0.3, visible), in_type(q, k, 0.3, visible)
    level = exact_level(q, k, 0.3, visible).float()
    if visible is not None:  # what a kernel that knows nothing of padding might give
        level = torch.where((positions["q_positions"] < 0)[:, None], 1.0, level)
    computed, given = (run(dense, q, k, scale=0.3, lse=lse, **positions) for lse in (None, level))
    for actual in (computed, given):
        assert_as_good(actual, exact, plain)
        if visible is not None:
            assert (actual[~visible.any(dim=1)] == 0).all()
    if name == "keys nobody sees":
        assert (given[:, 70:] == 0).all()
    if name in ("nobody counts", "no query"):
        assert (given == 0).all()


@pytest.mark.parametrize("name", ["padded on the left", "seven to a key", "nobody counts", "no query"])
def test_dense_log_sum_exp(run, name):
    q, k, visible, positions = setting(name)
    exact = exact_level(q, k, 0.3, visible).float()
    torch.testing.assert_close(run(dense_log_sum_exp, q, k, scale=0.3, **positions), exact)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_dense_batches_in_half_precision(run, dtype):
    q, k, visible, positions = setting("padded on the left", dtype, size=72)
    exact, plain = exactly(q, k, 0.2, visible), in_type(q, k, 0.2, visible)
    assert_as_good(run(dense, q, k, scale=0.2, **positions), exact, plain)


TABLE = torch.tensor([[99, 3, -1, 64, 63, 99], [-1, -1, 0, 1, 70, 98]])


@pytest.mark.parametrize("unit", [1, 2])
@pytest.mark.parametrize("asked", [slice(21, 91), slice(-30, None), TABLE], ids=["middle", "end", "table"])
@pytest.mark.parametrize("name", ["padded on the left", "all see all"])
def test_only_the_keys_asked_for(run, name, asked, unit):
    q, k, visible, positions = setting(name)

    def pick(x):
        if isinstance(asked, torch.Tensor):
            x = x.gather(1, asked.clamp(min=0)).masked_fill(asked < 0, 0)
        else:
            x = x[:, asked]
        return x.unflatten(1, (-1, unit)).mean(dim=2)

    exact, plain = pick(exactly(q, k, 0.3, visible)), pick(in_type(q, k, 0.3, visible))
    level = exact_level(q, k, 0.3, visible).float()
    settings = dict(scale=0.3, asked=asked, unit=unit, **positions)
    assert_as_good(run(dense, q, k, **settings), exact, plain)
    assert_as_good(dense(q, k, **settings, backend="torch"), exact, plain)
    assert_as_good(dense(q, k, **settings, lse=level, backend="torch"), exact, plain)


def test_work_is_split_and_put_together_again(run):
    """One tile of keys and many queries, then few queries and many keys: several programs each."""
    q, k = random(1, 2, 1100, 16), random(1, 2, 40, 16, seed=1)
    positions = dict(q_positions=causal(1, 1100) % 97, k_positions=causal(1, 40) * 3)
    visible = visible_pairs(**positions)
    exact, plain = exactly(q, k, 0.3, visible), in_type(q, k, 0.3, visible)
    first = run(dense, q, k, scale=0.3, **positions)
    assert_as_good(first, exact, plain)
    assert torch.equal(first, run(dense, q, k, scale=0.3, **positions)), "the same bits every time"

    q, k = random(1, 1, 3, 16), random(1, 1, 1100, 16, seed=1)
    positions = dict(q_positions=torch.tensor([[1099, 3, -1]]), k_positions=causal(1, 1100))
    exact = exact_level(q, k, 0.3, visible_pairs(**positions)).float()
    torch.testing.assert_close(run(dense_log_sum_exp, q, k, scale=0.3, **positions), exact)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_large_scores(run, dtype):
    q, k = random(1, 2, 80, 64, scale=12, dtype=dtype), random(1, 1, 80, 64, seed=1, scale=12, dtype=dtype)
    assert 3e3 < (q @ k.transpose(-1, -2)).abs().max() < 1e4
    positions = dict(q_positions=causal(1, 80), k_positions=causal(1, 80))
    visible = visible_pairs(**positions)
    level = exact_level(q, k, 1.0, visible).float()
    for lse in (None, level):
        actual = run(dense, q, k, scale=1.0, lse=lse, **positions)
        assert_as_good(actual, exactly(q, k, 1.0, visible), in_type(q, k, 1.0, visible))


def test_views_are_read_where_they_lie(run):
    q, k, visible, positions = setting("padded on the left", size=24)
    positions["q_positions"] = causal(2, 100)
    visible = visible_pairs(**positions)
    level = exact_level(q, k, 0.3, visible).float()
    plain, other = run(views, q, k, level, **positions, scale=0.3)
    assert torch.equal(plain, other)
    assert_as_good(plain, exactly(q, k, 0.3, visible), in_type(q, k, 0.3, visible))


# ---------------------------------------------------------------- refusals, choice, cost


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=random(1, 2, 8, 16).double()), "fp16, bf16 or fp32"),
        (dict(k=random(1, 2, 8, 16, dtype=BF16)), "one type"),
        (dict(q=random(1, 2, 8, 272), k=random(1, 2, 8, 272)), "up to 256"),
        (dict(q=random(1, 3, 8, 16)), "3 query heads and 2 key heads"),
        (dict(unit=3), "no whole number of units of 3"),
        (dict(spans=Spans.from_lengths([5, 2], "cpu")), "spans of 7 tokens"),
    ],
)
def test_what_the_kernel_refuses(change, message):
    call = dict(q=random(1, 2, 8, 16), k=random(1, 2, 8, 16), lse=random(1, 2, 8), scale=1.0) | change
    with pytest.raises(ValueError, match=message):
        column_sums.column_sums(**call)


def test_spans_whose_lengths_the_host_does_not_know(run):
    q, k = random(92, 2, 16), random(92, 2, 16, seed=1)
    bounds = torch.tensor([0, 64, 64, 88, 88, 88, 92], dtype=torch.int32)
    found = run(packed_unread, q, k, bounds, longest=70, scale=0.3, unit=4)
    wanted = run(packed, q, k, (64, 24, 4), scale=0.3, unit=4, backend="torch")
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def test_a_backend_nobody_knows():
    with pytest.raises(ValueError, match='"triton" or "torch", not \'cuda\''):
        dense(random(1, 1, 2, 8), random(1, 1, 2, 8), scale=1.0, backend="cuda")


def test_choice(monkeypatch):
    installed = "triton" if find_spec("triton") else "torch"
    assert column_sum_backend("cpu") == column_sum_backend(torch.device("meta")) == "torch"
    assert column_sum_backend("cuda:1") == column_sum_backend(torch.device("cuda"), FP32, 256) == installed
    assert column_sum_backend("cuda", torch.float64) == column_sum_backend("cuda", head_size=288) == "torch"
    monkeypatch.setattr(kernels, "has_triton", lambda: False)
    assert column_sum_backend("cuda") == "torch"


def test_a_kernel_that_fails_says_so_once(monkeypatch):
    """As if these CPU tensors were on a GPU where nothing compiles."""

    def fail(*args, **more):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(column_sums.KERNELS, "failed", set())
    monkeypatch.setattr(kernels, "has_triton", lambda: True)
    monkeypatch.setattr(
        column_sums, "chosen_backend", lambda asked, q, k: asked or column_sum_backend("cuda", q.dtype)
    )
    for name in ("column_sums", "log_sum_exp"):
        monkeypatch.setattr(column_sums, name, fail)
    real = column_sums.KERNELS.run_or_warn
    monkeypatch.setattr(
        column_sums.KERNELS,
        "run_or_warn",
        lambda kernel, _, required: real(kernel, torch.device("cuda"), required),
    )
    q, k = random(1, 2, 8, 16), random(1, 2, 8, 16, seed=1)
    with pytest.raises(RuntimeError, match="no compiler"):
        dense(q, k, scale=1.0)
    assert column_sum_backend("cuda") == "triton", "a kernel that was asked for tells its caller"
    with pytest.warns(RuntimeWarning, match="does not run on cuda .RuntimeError: no compiler.; plain torch"):
        received = streaming.attention_received(q, k, scale=1.0)
    torch.testing.assert_close(received, exactly(q, k, 1.0).float())
    assert column_sum_backend("cuda") == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        streaming.attention_received(q, k, scale=1.0)


def test_cost_by_hand():
    shapes = column_sums.Shapes.packed([2, 3], heads=4, head_size=8, unit=5)
    assert (shapes.pairs, shapes.exponentials) == (13, 52)
    assert shapes.flops == 2 * 8 * 52
    assert shapes.bytes == 2 * (5 + 5) * 4 * 8 + 4 * 5 * 4 + 4
    assert column_sums.floor_seconds(shapes, bandwidth=1.0, flops=1e9) == shapes.bytes
    assert column_sums.floor_seconds(shapes, bandwidth=1e9, flops=1.0) == shapes.flops
    assert column_sums.floor_seconds(shapes, bandwidth=1e9, flops=1e9, exponentials=1.0) == 52
    grouped = column_sums.Shapes(10, 20, 155, heads=4, key_heads=2, head_size=8, computes_lse=True)
    assert grouped.exponentials == 2 * 4 * 155
    assert grouped.bytes == 2 * 8 * (10 * 4 + 20 * 2) + 4 * (10 * 4 + 20)


# ---------------------------------------------------------------- compiled, for GPUs


def compile_for(capability, kernel, size, *, packed, unit=4):
    """PTX of a kernel for bf16, with the strides and alignment of an ordinary model."""
    from illava.attention import column_sum_kernels

    function = getattr(column_sum_kernels, kernel)
    function = function if kernel == "finish" else function.fn
    first = 1 << (size.bit_length() - 1)
    rest = max(16, 1 << (size - first - 1).bit_length()) if size > first else 0
    fixed = dict(D=size, D1=first, D2=rest, PACKED=packed, POSITIONS=not packed, ASKED=False, LONG=True)
    fixed |= dict(ALIGN=8, WIDEN=False, BLOCK_OWN=64, BLOCK_OTHER=64)
    fixed |= dict(UNIT=unit, PADDED_UNIT=unit, BLOCK_UNITS=16, BLOCK_QUERIES=128)
    fixed |= dict(asked=None) | (
        dict(q_positions=None, k_positions=None) if packed else dict(cu_seqlens=None)
    )
    fixed |= dict.fromkeys(["stride_qd", "stride_kd", "stride_li", "stride_qp", "stride_kp", "stride_aj"], 1)
    types = dict(q="*bf16", k="*bf16", lse="*fp32", partial="*fp32", out="*fp32", scale="fp32")
    types |= dict(q_positions="*i64", k_positions="*i64", cu_seqlens="*i32")
    return ptx(function, capability, types, fixed, num_warps=4, num_stages=3, **kernels.OPTIONS)


@pytest.mark.parametrize(("capability", "matrix_units"), MATRIX_UNITS.items())
@pytest.mark.parametrize(
    ("kernel", "size", "packed"),
    [("column_sums", 72, True), ("column_sums", 128, False), ("log_sum_exp", 80, False)],
)
def test_compiles_to_a_pipeline_of_wide_copies(
    kernel, size, packed, capability, matrix_units, tmp_path, monkeypatch
):
    """Queries (or keys) are copied ahead of use, 16 bytes at a time: easily lost in a small change."""
    pytest.importorskip("triton", minversion="3.4")  # older ones tune only where there is a GPU
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = compile_for(capability, kernel, size, packed=packed)
    assert matrix_units in compiled
    assert_wide_copies(compiled, *["0x4"] * (capability == 100))  # Triton 3.6 copies levels, too, there
    if kernel == "column_sums":
        assert compile_for(capability, "finish", size, packed=packed)


# ---------------------------------------------------------------- at real sizes, on a GPU


def floors(shapes):
    bandwidth, flops, exponentials = device_limits()
    return {
        "": column_sums.floor_seconds(shapes, bandwidth, flops, exponentials),
        "without exponentials": column_sums.floor_seconds(shapes, bandwidth, flops),
    }


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[16384], [4096] * 4, [64] * 256, [16200, 120, 64]], ids=str)
def test_real_spans(lengths):
    tokens, heads, size = sum(lengths), 16, 80
    torch.manual_seed(0)
    q, k = torch.randn(2, tokens, heads, size, dtype=BF16, device="cuda").unbind()
    spans, scale = Spans.from_lengths(lengths, "cuda"), size**-0.5
    lse = varlen_log_sum_exp(q, k, spans, scale=scale, backend="torch")
    expected = varlen_attention_received(q, k, lse, spans, scale=scale, backend="torch")
    shapes = column_sums.Shapes.packed(lengths, heads, size)
    actual = measure(
        lambda: varlen_attention_received(q, k, lse, spans, scale=scale, backend="triton"),
        floors(shapes),
        2**25,
    )
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4 / max(lengths))
    units = varlen_attention_received(q, k, lse, spans, scale=scale, unit=4, backend="triton")
    torch.testing.assert_close(units, actual.view(-1, 4).mean(dim=1))
    level = varlen_log_sum_exp(q, k, spans, scale=scale, backend="triton")
    torch.testing.assert_close(level, lse, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("queries", [16384, 64, 1])
def test_real_language_model(queries, given):
    tokens, heads, key_heads, size = 16384, 28, 4, 128
    torch.manual_seed(0)
    q = torch.randn(1, heads, queries, size, dtype=BF16, device="cuda")
    k = torch.randn(1, key_heads, tokens, size, dtype=BF16, device="cuda")
    own = torch.arange(tokens - queries, tokens, device="cuda")[None]
    settings = dict(scale=size**-0.5, q_positions=own, k_positions=torch.arange(tokens, device="cuda")[None])
    lse = streaming.log_sum_exp(q, k, **settings, backend="torch")
    expected = streaming.attention_received(q, k, lse=lse, **settings, backend="torch")
    pairs = queries * (tokens - queries) + queries * (queries + 1) // 2
    shapes = column_sums.Shapes(queries, tokens, pairs, heads, key_heads, size, computes_lse=not given)
    if given:
        settings["lse"] = lse
    actual = measure(
        lambda: streaming.attention_received(q, k, **settings, backend="triton"), floors(shapes), 2**25
    )
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4 / tokens)


@pytest.mark.gpu
def test_no_compilation_per_picture_size():
    from illava.attention import column_sum_kernels

    def compiled():
        found = (
            column_sum_kernels.column_sums.fn,
            column_sum_kernels.log_sum_exp.fn,
            column_sum_kernels.finish,
        )
        return [len(x.device_caches[torch.cuda.current_device()][0]) for x in found]

    counts = []
    for tokens in (1000, 1024, 777, 336, 300):
        q, k = torch.randn(2, 1, tokens, 4, 80, dtype=BF16, device="cuda").transpose(2, 3).unbind()
        at = torch.arange(tokens, device="cuda")[None]
        places = dict(q_positions=at, k_positions=at, asked=slice(tokens // 3, None))
        dense(q, k, scale=0.1, **places)
        packed(q[0].transpose(0, 1), k[0].transpose(0, 1), [tokens], scale=0.1)
        counts.append(compiled())
    assert counts[1:] == counts[:-1]


@pytest.mark.gpu
def test_chosen_on_cuda():
    q = torch.randn(1, 2, 100, 64, dtype=BF16, device="cuda")
    assert column_sum_backend(q.device, q.dtype, 64) == "triton"
    chosen = streaming.attention_received(q, q, scale=0.1)
    assert torch.equal(chosen, streaming.attention_received(q, q, scale=0.1, backend="triton"))
