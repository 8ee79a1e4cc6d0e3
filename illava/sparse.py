"""Small sparse matrices on the CPU, as torch's own tensors.

torch's product of two of them warns that part of it is in beta; what is needed here is short.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sparse(rows: Tensor, columns: Tensor, values: Tensor, shape: Sequence[int]) -> Tensor:
    """A coalesced matrix; entries of one place add up."""
    places = torch.stack([rows, columns])
    return torch.sparse_coo_tensor(places, values, tuple(shape), check_invariants=True).coalesce()


def entries(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns and values of a coalesced matrix, row by row."""
    rows, columns = x.indices()
    return rows, columns, x.values()


def one_each(columns: Tensor, number: int) -> Tensor:
    """`[len(columns), number]`, a single 1 in each row, in fp64."""
    rows = torch.arange(len(columns))
    return sparse(rows, columns, torch.ones(len(columns)).double(), (len(columns), number))


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b`: each entry of `a` brings along the row of `b` it points at."""
    row, middle, weight = entries(a)
    rows, columns, values = entries(b)
    bounds = torch.searchsorted(rows, torch.arange(b.shape[0] + 1))
    start, count = bounds[:-1][middle], bounds.diff()[middle]
    which = torch.arange(len(row)).repeat_interleave(count)
    place = start[which] + torch.arange(len(which)) - (count.cumsum(0) - count)[which]
    return sparse(row[which], columns[place], weight[which] * values[place], (a.shape[0], b.shape[1]))


def diagonal(parts: Sequence[Tensor]) -> Tensor:
    """Matrices down the diagonal of one."""
    found, height, width = [], 0, 0
    for part in parts:
        rows, columns, values = entries(part)
        found.append((rows + height, columns + width, values))
        height, width = height + part.shape[0], width + part.shape[1]
    rows, columns, values = (torch.cat(x) for x in zip(*found, strict=True))
    return sparse(rows, columns, values, (height, width))


def take(x: Tensor, rows: Tensor, columns: Tensor | None = None) -> Tensor:
    """These rows, and of all columns these, both ascending; what stands elsewhere is left out."""
    row, column, values = entries(x)
    inside = torch.isin(row, rows)
    if columns is not None:
        inside &= torch.isin(column, columns)
    row, column, values = torch.searchsorted(rows, row[inside]), column[inside], values[inside]
    width = x.shape[1]
    if columns is not None:
        column, width = torch.searchsorted(columns, column), len(columns)
    return sparse(row, column, values, (len(rows), width))


def row_counts(x: Tensor) -> Tensor:
    """Entries of each row."""
    return torch.bincount(entries(x)[0], minlength=x.shape[0])


def reaches(x: Tensor, marked: Tensor) -> Tensor:
    """`[rows]` bool, which rows have an entry in a marked column."""
    row, column, _ = entries(x)
    return torch.bincount(row[marked[column]], minlength=x.shape[0]) > 0
