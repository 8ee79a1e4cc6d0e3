"""Attention received on a GPU: a Triton kernel for S_avg, when it is used, and what it must cost.

    S_avg[j] = 1/(H n_j) sum_h sum_{i sees j} exp(scale q_i k_j - L_i)

**Which grid.** A program owns a tile of keys, holds their vectors and streams past them the queries
that see any of them, so a key's sum never leaves its program: no atomics, the same bits every time.
Tiles alone leave a GPU idle (16,384 keys are 128 to 256 tiles), so programs also split the key heads,
then the queries; each writes its sums, `[splits, keys]` in fp32, and a second small kernel adds them in
a fixed order, divides by the n_j it counts from the positions and averages over merge units. Spans
share one grid of (tile of the longest span, span); programs beyond a shorter span's end do nothing.
A tile's keys are read once for all query heads that share them. Before the pass a program finds, by
position, the queries that see any of its keys, and from where on they see all of them and need no mask.

**What it costs.** Nothing of size Q x L is stored. Keys are read once; queries and L once per tile of
keys, from the second-level cache where it holds them. A visible pair costs 2 D operations and one
exponential per query head, as attention's own first product does; `Shapes` counts, `floor_seconds`
turns counts into time. Without L a first kernel computes it, at as many operations again.

Block sizes are tuned at the first call (some seconds) for a head size, a type, a kind of mask, and short
or long spans; never per length. A process keeps them; another may choose others, and round otherwise.
Notation for tensor shapes: B rows, N packed tokens, S spans, H query heads, K key heads, Q queries, L keys,
J keys asked for, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from illava.attention.spans import Spans
from illava.kernels import DTYPES, OPTIONS, Kernels, asked_for, interpreted, processors

KERNELS = Kernels("attention received")
LARGEST_HEAD = 256
# Programs wanted per multiprocessor, and the fewest queries or keys worth a program of their own.
PROGRAMS_PER_PROCESSOR = 4
LEAST_QUERIES, LEAST_KEYS = 256, 512
NOMINAL_TILE = 128  # of the tiles that are tuned, when counting programs
SHORT = 128  # spans up to here (windows) are tuned apart


def column_sum_backend(
    device: torch.device | str, dtype: torch.dtype = torch.bfloat16, head_size: int = 128
) -> str:
    """What computes attention received there: `"triton"`, or `"torch"` for plain torch in blocks.

    Triton on CUDA, where it is installed and did not fail before, for fp16, bf16 and fp32 and heads of
    at most 256 channels; torch everywhere else.
    """
    return KERNELS.backend(device, dtype) if head_size <= LARGEST_HEAD else "torch"


def chosen_backend(backend: str | None, q: Tensor, k: Tensor) -> str:
    """The backend asked for, or else the one for these tensors."""
    here = column_sum_backend(q.device, q.dtype, q.shape[-1]) if q.dtype == k.dtype else "torch"
    return asked_for(backend, here)


# ---------------------------------------------------------------- cost


@dataclass(frozen=True)
class Shapes:
    """What one column-sum pass is asked for.

    Attributes:
        queries, keys: tokens of each that are read, over all rows or spans.
        pairs: pairs of a query and a key that it sees.
        heads, key_heads, head_size: of the attention layer.
        element_bytes: size of an element of q and k.
        unit: consecutive keys averaged into one number.
        computes_lse: whether L comes from a first pass, not from the attention kernel.
    """

    queries: int
    keys: int
    pairs: int
    heads: int
    key_heads: int
    head_size: int
    element_bytes: int = 2
    unit: int = 1
    computes_lse: bool = False

    @classmethod
    def packed(cls, lengths: Sequence[int], heads: int, head_size: int, **more: Any) -> Shapes:
        """Of spans whose tokens all see each other."""
        tokens = sum(lengths)
        return cls(tokens, tokens, sum(n * n for n in lengths), heads, heads, head_size, **more)

    @property
    def bytes(self) -> int:
        """Memory traffic that cannot be avoided: q, k and L in, one fp32 per unit out, each once."""
        vectors = self.queries * self.heads + self.keys * self.key_heads
        return vectors * self.head_size * self.element_bytes + 4 * (
            self.queries * self.heads + self.keys // self.unit
        )

    @property
    def flops(self) -> int:
        """Of the products of q and k."""
        return 2 * self.exponentials * self.head_size

    @property
    def exponentials(self) -> int:
        return self.pairs * self.heads * (2 if self.computes_lse else 1)


def floor_seconds(shapes: Shapes, bandwidth: float, flops: float, exponentials: float = math.inf) -> float:
    """The least time a GPU needs: its slowest part at full speed, the others hidden behind it.

    Args:
        shapes: the work.
        bandwidth: of its memory, bytes per second.
        flops: of its matrix units in the type of q and k, operations per second.
        exponentials: exponentials per second; without it their cost is left out. NVIDIA's
            multiprocessors do 16 per clock, which binds before the products do up to D = 128 or so
            on an H100.
    """
    return max(shapes.bytes / bandwidth, shapes.flops / flops, shapes.exponentials / exponentials)


# ---------------------------------------------------------------- launching


def column_sums(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    lse: Tensor | None = None,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    asked: slice | Tensor | None = None,
    spans: Spans | None = None,
    unit: int = 1,
) -> Tensor:
    """S_avg by the kernel, of a dense batch or, with `spans`, of packed tokens. Any strides, no gradient.

    Args:
        q: `[B, H, Q, D]`, the queries that count; fp16, bf16 or fp32.
        k: `[B, K, L, D]`, `K` dividing `H`, of the same type.
        scale: factor on the scores.
        lse: `[B, H, Q]` log-sum-exp of each query over all the keys it sees; `None` to compute it.
        q_positions, k_positions: `[B, Q]` and `[B, L]`; a query sees a key whose position is not
            after its own, negative ones are padding. `None` when every query sees every key.
        asked: the keys asked for, if not all: a range of the L, or a table `[B, J]` of their places,
            negative for padding.
        spans: of the tokens of the only row, B = 1, that attend to each other; without positions.
        unit: consecutive keys (of those asked for) averaged into one number.

    Returns:
        `[B, J / unit]` in fp32. Padding and a key that no query sees receive 0.

    Raises:
        ValueError: for types, head sizes or shapes that the kernel does not take.
    """
    group, *parts = _check(q, k, spans)
    batch, heads, queries, _ = q.shape
    if q_positions is None or k_positions is None:
        q_positions = k_positions = None
    if lse is None:
        lse = log_sum_exp(q, k, scale=scale, q_positions=q_positions, k_positions=k_positions, spans=spans)
    if isinstance(asked, slice):
        k = k[:, :, asked]
        k_positions = None if k_positions is None else k_positions[:, asked]
        asked = None
    keys = k.shape[2] if asked is None else asked.shape[1]
    if unit < 1 or keys % unit:
        raise ValueError(f"{keys} keys are no whole number of units of {unit}")
    if not (batch and queries and keys):
        return q.new_zeros((batch, keys // unit), dtype=torch.float32)
    from illava.attention import column_sum_kernels as kernels

    if q_positions is not None:  # padding gives nothing
        lse = lse.masked_fill((q_positions < 0)[:, None], math.inf)
    blocks, longest = (batch, keys) if spans is None else (spans.count, spans.longest)
    tiles = max(blocks, batch * _ceil(keys, NOMINAL_TILE))
    most = (queries if spans is None else longest) // LEAST_QUERIES
    heads_apart, queries_apart = _splits(tiles, heads // group, most, q.device)
    partial = q.new_empty((heads_apart * queries_apart, batch, keys), dtype=torch.float32)
    out = q.new_empty((batch, keys // unit), dtype=torch.float32)
    align = _alignment(q, k)
    places = *_strides(q_positions), *_strides(k_positions), *_strides(asked)
    sums = *partial.stride()[:2], *out.stride()[:1]
    ordered, chosen = q_positions is not None, asked is not None
    with KERNELS.launching, torch.cuda.device_of(q):
        kernels.column_sums[lambda meta: (blocks * _ceil(longest, meta["BLOCK_OWN"]), len(partial))](
            q, k, lse, q_positions, k_positions, asked, spans and spans.cu_seqlens, partial,
            *_vector_strides(q, align), *_vector_strides(k, align), *lse.stride(), *places, *sums[:2],
            queries, keys, longest, heads // group, group, heads_apart, queries_apart, float(scale),
            *parts, spans is not None, ordered, chosen, longest > SHORT,
            align, interpreted(), **OPTIONS,
        )  # fmt: skip
        width = 1 << (unit - 1).bit_length()
        units = max(1, 64 // width)
        kernels.finish[(_ceil(keys // unit, units), batch)](
            partial, q_positions, k_positions, asked, out, *places, *sums, queries, keys, len(partial),
            ordered, chosen, unit, width, units, 128, **OPTIONS,
        )  # fmt: skip
    return out


def log_sum_exp(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    spans: Spans | None = None,
) -> Tensor:
    """L_i of each query by the kernel; arguments as above. Returns `[B, H, Q]` in fp32."""
    group, *parts = _check(q, k, spans)
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    if q_positions is None or k_positions is None:
        q_positions = k_positions = None
    if not (batch and queries and keys):
        return q.new_full((batch, heads, queries), -math.inf, dtype=torch.float32)
    from illava.attention import column_sum_kernels as kernels

    blocks, longest = (batch, queries) if spans is None else (spans.count, spans.longest)
    tiles = heads * max(blocks, batch * _ceil(queries, NOMINAL_TILE))
    most = (keys if spans is None else longest) // LEAST_KEYS
    _, apart = _splits(tiles, 1, most, q.device)
    partial = q.new_empty((apart, batch, heads, queries), dtype=torch.float32)
    align = _alignment(q, k)
    with KERNELS.launching, torch.cuda.device_of(q):
        kernels.log_sum_exp[lambda meta: (blocks * _ceil(longest, meta["BLOCK_OWN"]), heads, apart)](
            q, k, q_positions, k_positions, spans and spans.cu_seqlens, partial,
            *_vector_strides(q, align), *_vector_strides(k, align),
            *_strides(q_positions), *_strides(k_positions), *partial.stride()[:3],
            queries, keys, longest, group, apart, float(scale),
            *parts, spans is not None, q_positions is not None, longest > SHORT,
            align, interpreted(), **OPTIONS,
        )  # fmt: skip
    return partial[0] if apart == 1 else partial.logsumexp(dim=0)


def _check(q: Tensor, k: Tensor, spans: Spans | None) -> tuple[int, int, int, int]:
    """Query heads per key head, D, and the two powers of two that D is read in."""
    (batch, heads, _, size), (others, key_heads, _, key_size) = q.shape, k.shape
    if q.dtype not in DTYPES or k.dtype != q.dtype:
        raise ValueError(f"the kernel takes q and k of one type, fp16, bf16 or fp32: {q.dtype}, {k.dtype}")
    if size > LARGEST_HEAD or size != key_size:
        raise ValueError(f"the kernel takes heads of one size up to {LARGEST_HEAD}: {size}, {key_size}")
    if heads % key_heads or batch != others:
        raise ValueError(f"{heads} query heads and {key_heads} key heads, {batch} rows and {others}")
    wrong = batch != 1 or q.shape[2] != k.shape[2]
    if spans is not None and (wrong or spans.tokens not in (None, q.shape[2])):
        raise ValueError(f"spans of {spans.tokens} tokens, q {list(q.shape)}, k {list(k.shape)}")
    first = max(16, 1 << (size.bit_length() - 1))
    rest = max(0, size - first)
    return heads // key_heads, size, first, max(16, 1 << (rest - 1).bit_length()) if rest else 0


def _splits(tiles: int, key_heads: int, most: int, device: torch.device) -> tuple[int, int]:
    """Into how many programs a tile's heads, and its queries or keys (`most` at most), are split."""
    wanted = _ceil(PROGRAMS_PER_PROCESSOR * processors(device), tiles)
    heads = _ceil(key_heads, _ceil(key_heads, min(key_heads, wanted)))  # none is left empty
    return heads, max(1, min(_ceil(wanted, heads), most))


def _alignment(q: Tensor, k: Tensor) -> int:
    """What all strides between vectors of q and k share, up to a load of 16 bytes."""
    most = 16 // q.element_size()
    return math.gcd(most, *(x.stride(d) for x in (q, k) for d in range(3) if x.shape[d] > 1))


def _vector_strides(x: Tensor, align: int) -> tuple[int, ...]:
    """Between rows, heads and tokens in units of `align`, and between channels."""
    *between, last = x.stride()
    return *(s // align for s in between), last


def _strides(x: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if x is None else x.stride()


def _ceil(n: int, step: int) -> int:
    return -(-n // step)
