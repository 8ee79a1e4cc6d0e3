"""Statistics of attention: the streamed forms and every kernel against the definition."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from illava.attention import (
    Spans,
    definition,
    streaming,
    varlen_attention,
    varlen_attention_received,
    varlen_log_sum_exp,
)

D = 8
SCALE = D**-0.5
CLOSE = dict(atol=1e-6, rtol=1e-5)


def random(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def ranks(x):
    return x.argsort().argsort().float()


def rank_correlation(x, y):
    return torch.corrcoef(torch.stack([ranks(x), ranks(y)]))[0, 1].item()


# ---------------------------------------------------------------- the definition itself


def test_attention_received_by_hand():
    """Two heads, two queries, three keys, one of them hidden from the first query."""
    q = torch.tensor([[1.0], [0.0]]).view(1, 1, 2, 1).repeat(1, 2, 1, 1)
    k = torch.log(torch.tensor([1.0, 2.0, 5.0])).view(1, 1, 3, 1)
    visible = torch.tensor([[[True, True, False], [True, True, True]]])
    # Query 0 spreads 1:2 over two keys, query 1 evenly over three.
    expected = torch.tensor([[(1 / 3 + 1 / 3) / 2, (2 / 3 + 1 / 3) / 2, 1 / 3]])
    received = definition.attention_received(q, k, scale=1.0, visible=visible)
    torch.testing.assert_close(received, expected)
    lse = definition.log_sum_exp(q, k, scale=1.0, visible=visible)
    torch.testing.assert_close(lse, torch.tensor([3.0, 3.0]).log().expand(1, 2, 2))


def test_attention_received_sums_to_one_where_everyone_sees_everyone():
    """N queries hand out 1 each, spread over N keys, divided by N."""
    q, k = random(2, 4, 9, D), random(2, 2, 9, D, seed=1)
    torch.testing.assert_close(definition.attention_received(q, k, scale=SCALE).sum(1), torch.ones(2))


def test_who_sees_nothing_gives_nothing():
    q, k = random(1, 2, 3, D), random(1, 2, 4, D, seed=1)
    visible = torch.ones(1, 3, 4, dtype=torch.bool)
    visible[0, 1], visible[0, :, 2] = False, False
    probabilities = definition.attention_probabilities(q, k, scale=SCALE, visible=visible)
    assert (probabilities[:, :, 1] == 0).all()
    assert definition.attention_received(q, k, scale=SCALE, visible=visible)[0, 2] == 0


# ---------------------------------------------------------------- streamed, against the definition


def causal(batch, length):
    return torch.arange(length).expand(batch, -1)


def padded_left(lengths, width):
    step = torch.arange(width)[None] - (width - torch.tensor(lengths)[:, None])
    return step.clamp(min=-1)


# Name: query heads, key heads, query positions, key positions (None: everyone sees everyone).
SETTINGS = {
    "all see all": (4, 4, None, None),
    "grouped heads": (4, 2, None, None),
    "one key head": (4, 1, None, None),
    "causal": (4, 2, causal(3, 40), causal(3, 40)),
    "causal with a past": (4, 2, causal(3, 40)[:, 25:], causal(3, 40)),
    "gaps": (2, 1, causal(3, 40) * 3 + 1, causal(3, 40) * 3 + 1),
    "padding": (4, 2, padded_left([40, 17, 1], 40), padded_left([40, 17, 1], 40)),
    "few queries count": (2, 2, causal(3, 40).masked_fill(causal(3, 40) % 7 != 3, -1), causal(3, 40)),
    "last query": (4, 2, torch.full((3, 1), 39), padded_left([40, 17, 9], 40)),
    "keys nobody sees": (2, 2, causal(3, 20), causal(3, 40)),
    "nobody counts": (2, 2, torch.full((3, 6), -1), causal(3, 40)),
}


def setting(name):
    heads, key_heads, q_positions, k_positions = SETTINGS[name]
    queries = 40 if q_positions is None else q_positions.shape[1]
    q, k = random(3, heads, queries, D, scale=2), random(3, key_heads, 40, D, seed=1, scale=2)
    visible = None
    if q_positions is not None:
        rows, own, other = q_positions.tolist(), q_positions, k_positions
        visible = torch.zeros(3, queries, 40, dtype=torch.bool)
        for b in range(len(rows)):
            for i in range(queries):
                for j in range(40):
                    visible[b, i, j] = 0 <= other[b, j] <= own[b, i]
    positions = dict(q_positions=q_positions, k_positions=k_positions)
    return q, k, visible, positions


@pytest.mark.parametrize("block", [1, 3 * 4 * 40 * 17, None])
@pytest.mark.parametrize("with_lse", [True, False])
@pytest.mark.parametrize("name", SETTINGS)
def test_streamed_attention_received(name, with_lse, block, monkeypatch):
    q, k, visible, positions = setting(name)
    expected = definition.attention_received(q, k, scale=SCALE, visible=visible)
    lse = definition.log_sum_exp(q, k, scale=SCALE, visible=visible) if with_lse else None
    if block:
        monkeypatch.setattr(streaming, "BLOCK_ELEMENTS_CPU", block)
    actual = streaming.attention_received(q, k, scale=SCALE, lse=lse, **positions)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, **CLOSE)
    if name == "nobody counts":
        assert (actual == 0).all()


@pytest.mark.parametrize("block", [1, 3 * 4 * 40 * 17, None])
@pytest.mark.parametrize("name", SETTINGS)
def test_streamed_log_sum_exp(name, block, monkeypatch):
    q, k, visible, positions = setting(name)
    if block:
        monkeypatch.setattr(streaming, "BLOCK_ELEMENTS_CPU", block)
    actual = streaming.log_sum_exp(q, k, scale=SCALE, **positions)
    expected = definition.log_sum_exp(q, k, scale=SCALE, visible=visible)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_with_lse_the_keys_asked_for_are_enough():
    q, k = random(2, 4, 30, D), random(2, 2, 30, D, seed=1)
    lse = definition.log_sum_exp(q, k, scale=SCALE)
    whole = definition.attention_received(q, k, scale=SCALE)
    some = streaming.attention_received(q, k[:, :, 5:9], scale=SCALE, lse=lse)
    torch.testing.assert_close(some, whole[:, 5:9], **CLOSE)


def test_inputs_are_left_as_they_were():
    """Scores are overwritten block by block; the caller's tensors are not."""
    q, k, visible, positions = setting("padding")
    lse = definition.log_sum_exp(q, k, scale=1.0, visible=visible)
    before = q.clone(), k.clone(), lse.clone()
    streaming.attention_received(q, k, scale=1.0, lse=lse, **positions)
    assert all(map(torch.equal, before, (q, k, lse)))


def test_no_query_at_all():
    q, k = random(2, 4, 0, D), random(2, 2, 5, D)
    positions = dict(q_positions=causal(2, 0), k_positions=causal(2, 5))
    received = streaming.attention_received(q, k, scale=SCALE, **positions)
    assert torch.equal(received, torch.zeros(2, 5))
    assert streaming.log_sum_exp(q, k, scale=SCALE, **positions).shape == (2, 4, 0)


# ---------------------------------------------------------------- the trap


def test_log_sum_exp_is_not_attention_received():
    """A flash kernel's L belongs to the query: on random q, k it ranks keys no better than chance."""
    n = 1500
    q, k = random(1, 4, n, D), random(1, 4, n, D, seed=1)
    lse = streaming.log_sum_exp(q, k, scale=SCALE)
    received = streaming.attention_received(q, k, scale=SCALE, lse=lse)
    assert abs(rank_correlation(lse.mean(1)[0], received[0])) < 0.1  # 1 / sqrt(n) = 0.026


def test_log_sum_exp_under_a_causal_mask_ranks_by_position():
    n = 1500
    q, k = random(1, 4, n, D), random(1, 4, n, D, seed=1)
    positions = dict(q_positions=causal(1, n), k_positions=causal(1, n))
    lse = streaming.log_sum_exp(q, k, scale=SCALE, **positions).mean(1)[0]
    assert rank_correlation(lse, torch.arange(n)) > 0.8
    received = streaming.attention_received(q, k, scale=SCALE, **positions)[0]
    assert abs(rank_correlation(lse, received)) > 0.5, "by position as well: sums over fewer, earlier queries"


# ---------------------------------------------------------------- memory


class Largest(TorchDispatchMode):
    """Elements of the largest tensor any operation made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                # An expanded view holds no more than its storage does.
                held = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.elements = max(self.elements, min(held, tensor.numel()))
        return out


N = 4096
LIMIT = 2 * streaming.BLOCK_ELEMENTS_CPU


def test_the_spy_sees_a_full_matrix():
    with Largest() as largest:
        definition.log_sum_exp(random(1, 1, 512, D), random(1, 1, 512, D), scale=SCALE)
    assert largest.elements >= 512 * 512


@pytest.mark.parametrize("positions", [{}, dict(q_positions=causal(1, N), k_positions=causal(1, N))])
@pytest.mark.parametrize("given", [True, False])
def test_no_matrix_of_n_by_n_for_attention_received(given, positions):
    q = random(1, 1, N, D)
    lse = torch.zeros(1, 1, N) if given else None
    assert LIMIT < N * N / 4
    with Largest() as largest:
        streaming.attention_received(q, q, scale=SCALE, lse=lse, **positions)
    assert largest.elements <= LIMIT
    with Largest() as largest:
        streaming.log_sum_exp(q, q, scale=SCALE, **positions)
    assert largest.elements <= LIMIT


@pytest.mark.parametrize("backend", ["torch_cpu", "blocks"])
def test_no_matrix_of_n_by_n_in_a_merging_block(backend):
    q = random(N, 1, D)
    spans = Spans.from_lengths([N - 100, 100], "cpu")
    with Largest() as largest, torch.no_grad():
        _, lse = varlen_attention(q, q, q, spans, scale=SCALE, backend=backend)
        varlen_attention_received(q, q, lse, spans, scale=SCALE)
        varlen_log_sum_exp(q, q, spans, scale=SCALE)
    assert largest.elements <= LIMIT


# ---------------------------------------------------------------- packed spans

LENGTHS = {
    "one": [33],
    "equal": [16] * 6,
    "single tokens": [1] * 5,
    "windows of every length and one long": [*range(1, 65), 700],
    "long first": [200, 3, 64, 64, 1, 50, 63, 48, 47],
    "empty ones": [5, 0, 9, 0],
}


def bounds_of(lengths):
    place, found = 0, []
    for n in lengths:
        if n:
            found.append(slice(place, place + n))
        place += n
    return found


def packed(name, heads=2, dtype=torch.float32):
    n = sum(LENGTHS[name])
    q, k, v = (random(n, heads, D, seed=s, scale=1.5).to(dtype) for s in range(3))
    return q, k, v, Spans.from_lengths(LENGTHS[name], "cpu"), bounds_of(LENGTHS[name])


def heads_first(x):
    return x.transpose(0, 1)[None]  # [N, H, D] to [1, H, N, D]


@pytest.mark.parametrize("name", LENGTHS)
def test_tables_hold_every_token_once(name):
    spans = packed(name)[3]
    seen = []
    for index, real in spans.tables():
        share = 1.0 if real is None else real.float().mean(1).min().item()
        assert share >= 1 - spans_padding()
        seen += (index.flatten() if real is None else index[real]).tolist()
        if real is not None:
            assert not real.all(), "no mask where nothing is padded"
    assert sorted(seen) == list(range(sum(LENGTHS[name])))
    assert [t[0].data_ptr() for t in spans.tables()] == [t[0].data_ptr() for t in spans.tables()]


def spans_padding():
    from illava.attention import spans

    return spans.PADDING_SHARE


def test_spans_from_boundaries():
    spans = Spans.from_cu_seqlens(torch.tensor([0, 4, 4, 9, 10], dtype=torch.int32))
    assert spans.lengths == (4, 5, 1)
    assert spans.longest == 5
    assert spans.cu_seqlens.tolist() == [0, 4, 9, 10]
    assert spans.cu_seqlens.dtype == torch.int32


@pytest.mark.parametrize("backend", ["torch_cpu", "blocks"])
@pytest.mark.parametrize("name", LENGTHS)
def test_packed_spans_are_each_span_alone(name, backend):
    q, k, v, spans, bounds = packed(name)
    out, lse = varlen_attention(q, k, v, spans, scale=SCALE, backend=backend)
    received = varlen_attention_received(q, k, lse, spans, scale=SCALE)
    own_lse = varlen_log_sum_exp(q, k, spans, scale=SCALE)
    assert lse.dtype == received.dtype == torch.float32
    for span in bounds:
        one_q, one_k, one_v = (heads_first(x[span]) for x in (q, k, v))
        expected = scaled_dot_product_attention(one_q, one_k, one_v, scale=SCALE)
        torch.testing.assert_close(heads_first(out[span]), expected, atol=1e-5, rtol=1e-5)
        level = definition.log_sum_exp(one_q, one_k, scale=SCALE)[0].T
        torch.testing.assert_close(lse[span], level, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(own_lse[span], level, atol=1e-5, rtol=1e-5)
        expected = definition.attention_received(one_q, one_k, scale=SCALE)[0]
        torch.testing.assert_close(received[span], expected, **CLOSE)


@pytest.mark.parametrize("backend", ["torch_cpu", "blocks"])
def test_packed_spans_in_small_blocks(backend, monkeypatch):
    q, k, v, spans, _ = packed("long first")
    whole = varlen_attention(q, k, v, spans, scale=SCALE, backend=backend)
    monkeypatch.setattr(streaming, "BLOCK_ELEMENTS_CPU", 1)
    parts = varlen_attention(q, k, v, spans, scale=SCALE, backend=backend)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", ["torch_cpu", "blocks"])
def test_gradients_flow_through_the_output(backend):
    q, k, v, spans, bounds = packed("long first")
    weight = random(*q.shape, seed=9)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = varlen_attention(*leaves, spans, scale=SCALE, backend=backend)
    (out * weight).sum().backward()
    plain = [x.clone().requires_grad_() for x in (q, k, v)]
    for span in bounds:
        one = scaled_dot_product_attention(*(heads_first(x[span]) for x in plain), scale=SCALE)
        (one * heads_first(weight[span])).sum().backward()
    for actual, expected in zip(leaves, plain, strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["torch_cpu", "blocks"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_errs_at_most_twice_as_much_as_plain_low_precision(dtype, backend):
    q, k, v, spans, bounds = packed("long first", dtype=dtype)
    out, lse = varlen_attention(q, k, v, spans, scale=SCALE, backend=backend)
    received = varlen_attention_received(q, k, lse, spans, scale=SCALE)
    assert out.dtype == dtype
    errors, plain_errors, received_errors, plain_received_errors = [], [], [], []
    for span in bounds:
        exact = [heads_first(x[span]).double() for x in (q, k, v)]
        low = [heads_first(x[span]) for x in (q, k, v)]
        truth = (exact[0] @ exact[1].mT * SCALE).softmax(-1)
        plain = (low[0] @ low[1].mT * SCALE).softmax(-1)
        errors.append((heads_first(out[span]) - truth @ exact[2]).flatten())
        plain_errors.append((plain @ low[2] - truth @ exact[2]).flatten())
        received_errors.append((received[span] - truth.mean((0, 1, 2))).flatten())
        plain_received_errors.append((plain.mean((0, 1, 2)) - truth.mean((0, 1, 2))).flatten())
    for mine, theirs in ((errors, plain_errors), (received_errors, plain_received_errors)):
        assert torch.cat(mine).abs().mean() <= 2 * torch.cat(theirs).abs().mean()
        assert torch.cat(mine).abs().max() <= 2 * torch.cat(theirs).abs().max()


def test_spans_whose_lengths_nobody_asks_for():
    """Boundaries and a bound are enough for a kernel; tables ask for lengths, and leave empty spans out."""
    spans = Spans.from_cu_seqlens(torch.tensor([0, 4, 4, 9, 10]), longest=6)
    assert (spans.count, spans.longest, spans.tokens) == (4, 6, None)
    assert spans.cu_seqlens.tolist() == [0, 4, 4, 9, 10]
    assert sum(len(index) for index, _ in spans.tables()) == 3
    assert (spans.lengths, spans.tokens) == ((4, 5, 1), 10)
