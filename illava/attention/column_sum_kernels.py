"""Attention received, in Triton: one streaming pass over q, k and the log-sum-exp of each query.

    S_avg[j] = 1/(H n_j) sum_h sum_{i sees j} exp(scale q_i.k_j - L_i)

`column_sums.py` launches these kernels and says what is computed where, and what it costs. This file needs
Triton at import, so nothing imports it before a kernel is to run. Strides of q and k come divided by
`ALIGN` and are multiplied by it here, which tells the compiler how far it may widen loads.
"""

# mypy: ignore-errors
# (Triton's language, not Python's: arguments are pointers, blocks and compile-time constants.)

from __future__ import annotations

import math

import triton
import triton.language as tl

from illava.kernels import interpreted

NEVER = tl.constexpr(2**31 - 1)
LOG2_E = tl.constexpr(math.log2(math.e))
# Specialising on any of these (or on their alignment) would compile anew for other picture sizes.
SIZES = [
    *("q_positions", "k_positions", "asked"),
    *("n_queries", "n_keys", "longest", "key_heads", "group", "head_splits", "row_splits", "splits"),
    *("stride_qb", "stride_qh", "stride_qi", "stride_kb", "stride_kh", "stride_ki"),
    *("stride_lb", "stride_lh", "stride_qpb", "stride_kpb", "stride_ab", "stride_pb", "stride_ps"),
    *("stride_ob", "stride_oh", "stride_os"),
]


# Block sizes to choose from: of what a program owns, of what it streams; then warps and stages. Products of
# fp32 take three times the registers.
HALF = [(64, 64, 4, 3), (128, 64, 4, 2), (64, 128, 4, 2), (128, 64, 8, 3), (128, 128, 8, 2)]
FULL = [(64, 64, 4, 2), (32, 64, 4, 2), (32, 32, 4, 2)]


def _suited(configs: list[triton.Config], arguments: dict, **_) -> list[triton.Config]:
    return configs[len(HALF) :] if arguments["q"].element_size() == 4 else configs[: len(HALF)]


def _tuned(kernel):
    """Chooses block sizes by the clock; the interpreter has none."""
    if interpreted():
        return triton.heuristics({"BLOCK_OWN": lambda _: 64, "BLOCK_OTHER": lambda _: 64})(kernel)
    configs = [
        triton.Config({"BLOCK_OWN": own, "BLOCK_OTHER": other}, num_warps=warps, num_stages=stages)
        for own, other, warps, stages in HALF + FULL
    ]
    key = ["D", "POSITIONS", "LONG"]  # and types, which Triton adds
    return triton.autotune(configs, key, prune_configs_by={"early_config_prune": _suited})(kernel)


@triton.jit
def _load_part(x, offsets, inside, stride_d, FROM: tl.constexpr, WIDTH: tl.constexpr,
               D: tl.constexpr, WIDEN: tl.constexpr):  # fmt: skip
    """Channels `FROM` to `FROM + WIDTH` of some vectors, `[n, WIDTH]`, zero beyond `D`."""
    d = FROM + tl.arange(0, WIDTH)
    pointers = x + offsets[:, None] + d[None, :] * stride_d
    if FROM + WIDTH <= D:
        part = tl.load(pointers, mask=inside[:, None], other=0.0)
    else:
        part = tl.load(pointers, mask=inside[:, None] & (d < D)[None, :], other=0.0)
    return part.to(tl.float32) if WIDEN else part


@triton.jit
def _load(x, offsets, inside, stride_d, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
          WIDEN: tl.constexpr):  # fmt: skip
    """Vectors in two parts: the largest power of two that fits in `D`, and the rest (if any)."""
    first = _load_part(x, offsets, inside, stride_d, 0, D1, D, WIDEN)
    second = first
    if D2 > 0:
        second = _load_part(x, offsets, inside, stride_d, D1, D2, D, WIDEN)
    return first, second


@triton.jit
def _products(a1, a2, b1, b2, D2: tl.constexpr):
    """`[n, D] x [m, D]` to `[n, m]` in fp32. Three products of tf32 keep the digits of fp32 inputs."""
    PRECISION: tl.constexpr = "tf32x3" if a1.dtype == tl.float32 else "ieee"
    x = tl.dot(a1, tl.trans(b1), input_precision=PRECISION)
    if D2 > 0:
        x = tl.dot(a2, tl.trans(b2), x, input_precision=PRECISION)
    return x


@triton.jit
def _given_by(
    q, lse, q_positions, k1, k2, at, first, last,
    stride_qi, stride_qd, stride_li, stride_qp, scale,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, MASKED: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What a tile of keys receives from the block of queries that begins with `first`: `[keys]`."""
    step = tl.arange(0, BLOCK)
    inside, start, step = step < last - first, first.to(tl.int64), step.to(tl.int64)
    q1, q2 = _load(q + start * stride_qi, step * stride_qi, inside, stride_qd, D, D1, D2, WIDEN)
    # Who does not count has L = +inf and gives nothing.
    level = tl.load(lse + start * stride_li + step * stride_li, mask=inside, other=float("inf"))
    # [keys, queries]. As exp2, which is one instruction where exp takes care of subnormal results; the
    # difference comes first, or large scores would lose digits to the factor.
    given = tl.exp2((_products(k1, k2, q1, q2, D2) * scale - level[None, :]) * LOG2_E)
    if MASKED:
        own = tl.load(q_positions + start * stride_qp + step * stride_qp, mask=inside, other=-1)
        given = tl.where(own.to(tl.int32)[None, :] >= at[:, None], given, 0.0)
    return tl.sum(given, axis=1)


@_tuned
@triton.jit(do_not_specialize=SIZES)
def column_sums(
    q, k, lse, q_positions, k_positions, asked, cu_seqlens, partial,
    stride_qb, stride_qh, stride_qi, stride_qd, stride_kb, stride_kh, stride_ki, stride_kd,
    stride_lb, stride_lh, stride_li, stride_qpb, stride_qp, stride_kpb, stride_kp,
    stride_ab, stride_aj, stride_ps, stride_pb,
    n_queries, n_keys, longest, key_heads, group, head_splits, row_splits, scale,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    PACKED: tl.constexpr, POSITIONS: tl.constexpr, ASKED: tl.constexpr, LONG: tl.constexpr,
    ALIGN: tl.constexpr, WIDEN: tl.constexpr, BLOCK_OWN: tl.constexpr, BLOCK_OTHER: tl.constexpr,
):  # fmt: skip
    """One tile of keys, some of the key heads, some of the queries: `partial[split, b, j]`.

    L is +inf for queries that do not count; what the others see is found here.
    """
    stride_qb, stride_kb = stride_qb.to(tl.int64) * ALIGN, stride_kb.to(tl.int64) * ALIGN
    stride_qh, stride_kh = stride_qh.to(tl.int64) * ALIGN, stride_kh.to(tl.int64) * ALIGN
    stride_qi, stride_ki = stride_qi.to(tl.int64) * ALIGN, stride_ki.to(tl.int64) * ALIGN
    tiles = tl.cdiv(longest, BLOCK_OWN)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    first_key = (tl.program_id(0) % tiles) * BLOCK_OWN
    split = tl.program_id(1)
    if PACKED:
        start = tl.load(cu_seqlens + b).to(tl.int64)
        n_queries = (tl.load(cu_seqlens + b + 1) - start).to(tl.int32)
        n_keys = n_queries
        q += start * stride_qi
        k += start * stride_ki
        lse += start * stride_li
        partial += start
    else:
        q += b * stride_qb
        k += b * stride_kb
        lse += b * stride_lb
        partial += b * stride_pb

    j = first_key + tl.arange(0, BLOCK_OWN)
    inside = j < n_keys
    place = j.to(tl.int64)
    if ASKED:
        place = tl.load(asked + b * stride_ab + place * stride_aj, mask=inside, other=-1).to(tl.int64)
    real = inside & (place >= 0)

    # Queries that see any of these keys lie in [low, high); from `clear` on each sees all of them.
    low, high, clear = 0, tl.where(first_key < n_keys, n_queries, 0), 0
    at = j
    if POSITIONS:
        at = tl.load(k_positions + b * stride_kpb + place * stride_kp, mask=real, other=-1).to(tl.int32)
        earliest, latest = tl.min(tl.where(at < 0, NEVER, at), axis=0), tl.max(at, axis=0)
        q_positions += b * stride_qpb
        lows = tl.full([BLOCK_OWN], NEVER, tl.int32)
        highs = tl.zeros([BLOCK_OWN], tl.int32)
        clears = tl.zeros([BLOCK_OWN], tl.int32)
        for first in range(0, n_queries, BLOCK_OWN):
            i = first + tl.arange(0, BLOCK_OWN)
            own = tl.load(q_positions + i.to(tl.int64) * stride_qp, mask=i < n_queries, other=-1)
            lows = tl.minimum(lows, tl.where(own >= earliest, i, NEVER))
            highs = tl.maximum(highs, tl.where(own >= earliest, i + 1, 0))
            clears = tl.maximum(clears, tl.where((own >= 0) & (own < latest), i + 1, 0))
        high = tl.max(highs, axis=0)
        low = tl.minimum(tl.min(lows, axis=0), high)
        clear = tl.max(clears, axis=0)

    # This program's share of the queries, [low, high), and of those the ones that need a mask.
    share = tl.cdiv(tl.cdiv(high - low, row_splits), BLOCK_OTHER) * BLOCK_OTHER
    low += (split // head_splits) * share
    queries = tl.maximum(tl.minimum(share, high - low), 0)
    masked = tl.cdiv(tl.minimum(tl.maximum(clear - low, 0), queries), BLOCK_OTHER) * BLOCK_OTHER
    head_share = tl.cdiv(key_heads, head_splits)
    from_head = (split % head_splits) * head_share
    k += from_head * stride_kh
    q += from_head * group * stride_qh
    lse += (from_head * group).to(tl.int64) * stride_lh

    received = tl.zeros([BLOCK_OWN], tl.float32)
    for _ in range(from_head, tl.minimum(from_head + head_share, key_heads)):
        k1, k2 = _load(k, place * stride_ki, real, stride_kd, D, D1, D2, WIDEN)
        for _ in range(0, group):
            # These loops count from a constant: from a bound found above, Triton does not pipeline them.
            if POSITIONS:
                for step in range(0, masked, BLOCK_OTHER):
                    received += _given_by(
                        q, lse, q_positions, k1, k2, at, low + step, low + queries,
                        stride_qi, stride_qd, stride_li, stride_qp, scale,
                        D, D1, D2, True, WIDEN, BLOCK_OTHER,
                    )  # fmt: skip
            for step in range(0, queries - masked, BLOCK_OTHER):
                received += _given_by(
                    q, lse, q_positions, k1, k2, at, low + masked + step, low + queries,
                    stride_qi, stride_qd, stride_li, stride_qp, scale,
                    D, D1, D2, False, WIDEN, BLOCK_OTHER,
                )  # fmt: skip
            q += stride_qh
            lse += stride_lh
        k += stride_kh
    if not POSITIONS:  # all n queries see the key; otherwise `finish` counts them
        received /= tl.maximum(n_queries, 1).to(tl.float32)
    received /= (key_heads * group).to(tl.float32)
    tl.store(partial + split.to(tl.int64) * stride_ps + j, received, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def finish(
    partial, q_positions, k_positions, asked, out, stride_qpb, stride_qp, stride_kpb, stride_kp,
    stride_ab, stride_aj, stride_ps, stride_pb, stride_ob, n_queries, n_keys, splits,
    POSITIONS: tl.constexpr, ASKED: tl.constexpr, UNIT: tl.constexpr, PADDED_UNIT: tl.constexpr,
    BLOCK_UNITS: tl.constexpr, BLOCK_QUERIES: tl.constexpr,
):  # fmt: skip
    """Sum the splits in their order, divide by the queries that see the key, average over units."""
    b = tl.program_id(1).to(tl.int64)
    x = tl.arange(0, BLOCK_UNITS * PADDED_UNIT)
    j = (tl.program_id(0) * BLOCK_UNITS + x // PADDED_UNIT) * UNIT + x % PADDED_UNIT
    inside = (x % PADDED_UNIT < UNIT) & (j < n_keys)
    total = tl.zeros([BLOCK_UNITS * PADDED_UNIT], tl.float32)
    partial += b * stride_pb
    for _ in range(0, splits):
        total += tl.load(partial + j, mask=inside, other=0.0)
        partial += stride_ps
    place = j.to(tl.int64)
    if ASKED:
        place = tl.load(asked + b * stride_ab + place * stride_aj, mask=inside, other=-1).to(tl.int64)
        total = tl.where(place >= 0, total, 0.0)
    if POSITIONS:
        real = inside & (place >= 0)
        at = tl.load(k_positions + b * stride_kpb + place * stride_kp, mask=real, other=-1)
        q_positions += b * stride_qpb
        count = tl.zeros([BLOCK_UNITS * PADDED_UNIT], tl.int32)
        for first in range(0, n_queries, BLOCK_QUERIES):
            i = first + tl.arange(0, BLOCK_QUERIES)
            own = tl.load(q_positions + i.to(tl.int64) * stride_qp, mask=i < n_queries, other=-1)
            count += tl.sum((own[None, :] >= at[:, None]).to(tl.int32), axis=1)
        total = tl.where((at >= 0) & (count > 0), total / tl.maximum(count, 1).to(tl.float32), 0.0)
    means = tl.sum(tl.reshape(total, [BLOCK_UNITS, PADDED_UNIT]), axis=1) / UNIT
    u = tl.program_id(0) * BLOCK_UNITS + tl.arange(0, BLOCK_UNITS)
    tl.store(out + b * stride_ob + u, means, mask=u * UNIT < n_keys)


@_tuned
@triton.jit(do_not_specialize=SIZES)
def log_sum_exp(
    q, k, q_positions, k_positions, cu_seqlens, out,
    stride_qb, stride_qh, stride_qi, stride_qd, stride_kb, stride_kh, stride_ki, stride_kd,
    stride_qpb, stride_qp, stride_kpb, stride_kp, stride_os, stride_ob, stride_oh,
    n_queries, n_keys, longest, group, splits, scale,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    PACKED: tl.constexpr, POSITIONS: tl.constexpr, LONG: tl.constexpr,
    ALIGN: tl.constexpr, WIDEN: tl.constexpr, BLOCK_OWN: tl.constexpr, BLOCK_OTHER: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head, over some of the keys: their own log-sum-exp."""
    stride_qb, stride_kb = stride_qb.to(tl.int64) * ALIGN, stride_kb.to(tl.int64) * ALIGN
    stride_qh, stride_kh = stride_qh.to(tl.int64) * ALIGN, stride_kh.to(tl.int64) * ALIGN
    stride_qi, stride_ki = stride_qi.to(tl.int64) * ALIGN, stride_ki.to(tl.int64) * ALIGN
    tiles = tl.cdiv(longest, BLOCK_OWN)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    head = tl.program_id(1)
    split = tl.program_id(2)
    q += head * stride_qh
    k += head // group * stride_kh
    out += head.to(tl.int64) * stride_oh + split.to(tl.int64) * stride_os
    if PACKED:
        start = tl.load(cu_seqlens + b).to(tl.int64)
        n_queries = (tl.load(cu_seqlens + b + 1) - start).to(tl.int32)
        n_keys = n_queries
        q += start * stride_qi
        k += start * stride_ki
        out += start
    else:
        q += b * stride_qb
        k += b * stride_kb
        out += b * stride_ob
    i = (tl.program_id(0) % tiles) * BLOCK_OWN + tl.arange(0, BLOCK_OWN)
    inside = i < n_queries
    q1, q2 = _load(q, i.to(tl.int64) * stride_qi, inside, stride_qd, D, D1, D2, WIDEN)

    # This program's share of the keys.
    share = tl.cdiv(tl.cdiv(n_keys, splits), BLOCK_OTHER) * BLOCK_OTHER
    first_key = split * share
    keys = tl.maximum(tl.minimum(share, n_keys - first_key), 0)
    own = i
    if POSITIONS:
        own = tl.load(q_positions + b * stride_qpb + i.to(tl.int64) * stride_qp, mask=inside, other=-1)
        own = own.to(tl.int32)
        k_positions += b * stride_kpb
    highest = tl.full([BLOCK_OWN], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_OWN], tl.float32)
    for step in range(0, keys, BLOCK_OTHER):
        x = tl.arange(0, BLOCK_OTHER)
        real, begin, x = x < keys - step, (first_key + step).to(tl.int64), x.to(tl.int64)
        k1, k2 = _load(k + begin * stride_ki, x * stride_ki, real, stride_kd, D, D1, D2, WIDEN)
        scores = _products(q1, q2, k1, k2, D2) * scale  # [queries, keys]
        if POSITIONS:
            at = tl.load(k_positions + begin * stride_kp + x * stride_kp, mask=real, other=-1).to(tl.int32)
            at = tl.where(at < 0, NEVER, at)
            scores = tl.where(own[:, None] >= at[None, :], scores, float("-inf"))
        else:
            scores += tl.where(real, 0.0, float("-inf"))[None, :]
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        terms = tl.exp2((scores - finite[:, None]) * LOG2_E)
        total = total * tl.exp2((highest - finite) * LOG2_E) + tl.sum(terms, axis=1)
        highest = higher
    level = highest + tl.log(tl.where(total > 0, total, 1.0))
    tl.store(out + i, level, mask=inside)
