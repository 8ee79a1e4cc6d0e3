"""The most alike of two lots of units, in Triton: products, maxima and nothing stored in between.

`matching.py` launches this kernel and says what it costs. This file needs Triton at import, so nothing
imports it before the kernel is to run.
"""

# mypy: ignore-errors
# (Triton's language, not Python's: arguments are pointers, blocks and compile-time constants.)

from __future__ import annotations

import triton
import triton.language as tl

# Specialising on any of these (or on their alignment) would compile anew for other picture sizes.
SIZES = ["stride_index", "stride_out", "width", "splits"]


@triton.jit(do_not_specialize=SIZES)
def best_match(
    x, inverse_norms, index, counts, grid, cosines, places, stride_index, stride_out, width, splits,
    penalty,
    D: tl.constexpr, GRID: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_EVEN: tl.constexpr, BLOCK_ODD: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of a segment's units at even places against some of those at odd ones.

    Writes of each the best cosine, the penalty taken off, and which of the odd it is with.
    """
    tiles = tl.cdiv(tl.cdiv(width, 2), BLOCK_EVEN)
    segment = (tl.program_id(0) // tiles).to(tl.int64)
    split = tl.program_id(1)
    index += segment * stride_index
    count = tl.load(counts + segment).to(tl.int32)
    first = (tl.program_id(0) % tiles) * BLOCK_EVEN
    even = first + tl.arange(0, BLOCK_EVEN)
    # What stands beyond the end is read as row 0: loads of features without a mask are wider.
    row = tl.load(index + 2 * even, mask=2 * even < count, other=0).to(tl.int64)
    scale = tl.load(inverse_norms + row)
    channel = tl.arange(0, BLOCK_D)
    mine = x + row[:, None] * D + channel[None, :]

    # This program's share of the odd places.
    odds = tl.where(2 * first < count, count // 2, 0)
    share = tl.cdiv(tl.cdiv(odds, splits), BLOCK_ODD) * BLOCK_ODD
    begin = split * share
    number = tl.maximum(tl.minimum(share, odds - begin), 0)

    PRECISION: tl.constexpr = "tf32x3" if x.dtype.element_ty == tl.float32 else "ieee"
    best = tl.full([BLOCK_EVEN], -1.5, tl.float32) - penalty  # below all that are real
    match = tl.zeros([BLOCK_EVEN], tl.int32)
    for step in range(0, number, BLOCK_ODD):
        odd = begin + step + tl.arange(0, BLOCK_ODD)
        there = odd < odds
        other = tl.load(index + 2 * odd + 1, mask=there, other=0).to(tl.int64)
        theirs = x + other[:, None] * D + channel[None, :]
        products = tl.zeros([BLOCK_EVEN, BLOCK_ODD], tl.float32)
        for d in range(0, D, BLOCK_D):
            if D % BLOCK_D == 0:
                a, b = tl.load(mine + d), tl.load(theirs + d)
            else:
                inside = (channel < D - d)[None, :]
                a, b = tl.load(mine + d, mask=inside, other=0.0), tl.load(theirs + d, mask=inside, other=0.0)
            if WIDEN:
                a, b = a.to(tl.float32), b.to(tl.float32)
            products = tl.dot(a, tl.trans(b), products, input_precision=PRECISION)
        # Norms come after the products, in fp32: no feature is rounded.
        alike = products * scale[:, None] * tl.load(inverse_norms + other)[None, :]
        alike = tl.where(tl.abs(alike) < float("inf"), alike, -1.0)  # NaN, too, is like nothing
        if GRID:
            apart = tl.abs(tl.load(grid + 3 * row)[:, None] - tl.load(grid + 3 * other)[None, :])
            down = tl.abs(tl.load(grid + 3 * row + 1)[:, None] - tl.load(grid + 3 * other + 1)[None, :])
            aside = tl.abs(tl.load(grid + 3 * row + 2)[:, None] - tl.load(grid + 3 * other + 2)[None, :])
            alike -= tl.where(apart + tl.maximum(down, aside) <= 1, 0.0, penalty)
        alike = tl.where(there[None, :], alike, -1.5 - penalty)
        here, at = tl.max(alike, axis=1, return_indices=True)  # the first of equals
        match = tl.where(here > best, begin + step + at, match)
        best = tl.maximum(here, best)
    out = (split * (tl.num_programs(0) // tiles) + segment) * stride_out + even
    tl.store(cosines + out, best, mask=even < tl.cdiv(width, 2))
    tl.store(places + out, match, mask=even < tl.cdiv(width, 2))
