"""Which units are most alike: the best match of each at an even place among those at odd places.

**What it costs.** 2 * E * O * g * d operations a segment. Plain torch does them in float32 whatever the
features' type, in blocks of a bounded size. On CUDA one Triton kernel does: a program owns a tile of even
places, streams past it the features of the odd ones where they lie, and keeps a maximum and its place, so
that nothing of size E x O is ever stored, nor a copy of features gathered, widened or normalised. Products
are of features as they are, on the matrix units of their type, their sums in float32, and norms come
after: as exact as float32 throughout, at the speed of fp16 and bf16. The first of equals wins, on both.

There is one shape of tile for a type and a size: a first call compiles, and tunes nothing while a user waits.
Notation for tensor shapes as in `bipartite`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from illava.groups import BLOCK_ELEMENTS
from illava.kernels import OPTIONS, Kernels, asked_for, interpreted, processors
from illava.transfer import on

KERNELS = Kernels("likeness")
TAKES_IN = 2.0  # the rank of a unit that others go into, before any penalty: above all cosines
SMALLEST_NORM = 1e-12  # as in `torch.nn.functional.normalize`
# Tiles of even and odd places and of channels; then warps and stages. Products of fp32 take three times the
# registers.
HALF, HALF_SMALL, FULL = (128, 128, 64, 8, 3), (64, 64, 64, 4, 3), (64, 64, 32, 4, 3)
PROGRAMS_PER_PROCESSOR = 2


def likeness_backend(device: torch.device, dtype: torch.dtype) -> str:
    """What computes likeness there: `"triton"`, or `"torch"`.

    Triton on CUDA where it is installed and did not fail before, for fp16, bf16 and fp32, from compute
    capability 8.0 (Ampere) on: older matrix units do not suit the kernel.
    """
    chosen = KERNELS.backend(device, dtype)
    if chosen == "triton" and torch.cuda.get_device_capability(device) < (8, 0):
        return "torch"
    return chosen


def matches(
    x: Tensor,
    index: Tensor,
    counts: Sequence[int],
    penalty: float = 0.0,
    grid: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The best match of each unit at an even place, among those at odd places.

    Args:
        x: `[U, d]`.
        index: `[S, N]` where each segment's units stand among all `U` units.
        counts: units per segment.
        penalty: how much less alike two are that are no `neighbours`.
        grid: `[U, 3]` frame, row and column of each unit; `None` for no penalty.
        backend: `"triton"` or `"torch"`; `None` for Triton where it runs.

    Returns:
        `[S, N]` cosines with it in fp32, the penalty taken off, and its places in the rows; at odd places
        `-TAKES_IN - penalty` and the place itself. What is not finite is like nothing: -1.
    """
    width = index.shape[1]
    place = torch.arange(width, device=index.device)
    likeness = torch.full(index.shape, -TAKES_IN - penalty, device=index.device)
    match = place.expand(index.shape).clone()
    if width == 1:
        return likeness, match
    found = None
    if asked_for(backend, likeness_backend(x.device, x.dtype)) == "triton":
        found = KERNELS.run_or_warn(
            lambda: _by_kernel(x, index, counts, penalty, grid), x.device, required=backend is not None
        )
    best, which = found or _in_blocks(x, index, counts, penalty, grid)
    likeness[:, ::2], match[:, ::2] = best, 1 + 2 * which
    return likeness, match


def neighbours(grid: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """`[S, e, O]` bool, whether each of `one` stands beside each of `other`: on one of the eight places
    around it, or on the same place of the frame before or after.

    Args:
        grid: `[U, 3]` frame, row and column.
        one, other: `[S, e]` and `[S, O]` among all U.
    """
    frame, row, column = ((along[one][:, :, None] - along[other][:, None]).abs() for along in grid.unbind(1))
    return frame + torch.maximum(row, column) <= 1


def _in_blocks(
    x: Tensor, index: Tensor, counts: Sequence[int], penalty: float, grid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The best of each even place, and which of the odd ones it is, `[S, E]` each, in plain torch."""
    evens, odds = index[:, ::2], index[:, 1::2]
    real = 1 + 2 * torch.arange(odds.shape[1], device=index.device) < on(index.device, counts)[:, None]
    odd = normalize(x[odds].float(), dim=-1).mT  # [S, d, O]
    step = max(1, BLOCK_ELEMENTS // odds.numel())
    found = []
    for even in evens.split(step, dim=1):
        # What is not finite is like nothing.
        alike = normalize(x[even].float(), dim=-1) @ odd  # [S, e, O]
        alike = alike.nan_to_num(nan=-1.0, posinf=-1.0, neginf=-1.0)
        if grid is not None:
            alike = alike - penalty * ~neighbours(grid, even, odds)
        found.append(alike.masked_fill(~real[:, None], -1.5 - penalty).max(dim=2))
    return torch.cat([b.values for b in found], dim=1), torch.cat([b.indices for b in found], dim=1)


def _by_kernel(
    x: Tensor, index: Tensor, counts: Sequence[int], penalty: float, grid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same by the kernel."""
    from illava import matching_kernel

    (segments, width), size = index.shape, x.shape[1]
    evens, odds = (width + 1) // 2, width // 2
    if x.dtype == torch.float32:
        tile_even, tile_odd, channels, warps, stages = FULL
    else:
        tile_even, tile_odd, channels, warps, stages = HALF if evens > HALF_SMALL[0] else HALF_SMALL
    x, index = x.detach().contiguous(), index.contiguous()
    norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)  # [U]
    tiles = segments * -(-evens // tile_even)
    splits = max(1, min(PROGRAMS_PER_PROCESSOR * processors(x.device) // tiles, -(-odds // tile_odd)))
    best = x.new_empty((splits, segments, evens), dtype=torch.float32)
    match = torch.empty_like(best, dtype=torch.int32)
    with KERNELS.launching, torch.cuda.device_of(x):
        matching_kernel.best_match[(tiles, splits)](
            x, norms.clamp(min=SMALLEST_NORM).reciprocal(), index, on(x.device, counts),
            None if grid is None else grid.to(torch.int32).contiguous(), best, match,
            index.stride(0), evens, width, splits, float(penalty),
            size, grid is not None, interpreted(), tile_even, tile_odd, channels,
            num_warps=warps, num_stages=stages, **OPTIONS,
        )  # fmt: skip
    top = best.max(dim=0)  # the first of equals, as within a split
    return top.values, match.long().gather(0, top.indices[None])[0]
