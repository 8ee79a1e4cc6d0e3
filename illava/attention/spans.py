"""Packed spans: tokens of many windows, frames and pictures laid end to end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from illava.transfer import on

# Spans share a padded table while padding adds at most this share of the longest span.
PADDING_SHARE = 0.25


class Spans:
    """Where the spans of packed tokens begin and end.

    Kernels take the boundaries where they are; only what packs spans into tables asks for their lengths,
    and waits for the device if the host does not know them.

    Args:
        cu_seqlens: `[S + 1]` int32 boundaries; spans may be empty.
        lengths: tokens per span, if the host knows them.
        longest: the most tokens a span can have; needed if their lengths are not known.

    Attributes:
        cu_seqlens, longest: as given.
        count: S.
    """

    def __init__(
        self, cu_seqlens: Tensor, lengths: tuple[int, ...] | None = None, longest: int | None = None
    ) -> None:
        self.cu_seqlens, self._lengths = cu_seqlens, lengths
        self.count = len(cu_seqlens) - 1
        self.longest = max(self.lengths, default=0) if longest is None else longest
        self._tables: dict[bool, list[tuple[Tensor, Tensor | None]]] = {}

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], device: torch.device | str) -> Spans:
        real = tuple(n for n in lengths if n > 0)
        bounds = torch.tensor([*accumulate(real, initial=0)], dtype=torch.int32)
        return cls(on(torch.device(device), bounds), real)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, longest: int | None = None) -> Spans:
        """Without `longest`, reads the boundaries from the device, as HF's own loop over spans does."""
        if longest is None:
            return cls.from_lengths(cu_seqlens.diff().tolist(), cu_seqlens.device)
        return cls(cu_seqlens.to(torch.int32), None, longest)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens per span, those that have none left out."""
        if self._lengths is None:
            self._lengths = tuple(n for n in self.cu_seqlens.diff().tolist() if n > 0)
        return self._lengths

    @property
    def tokens(self) -> int | None:
        """Of all spans, if the host knows."""
        return None if self._lengths is None else sum(self._lengths)

    def tables(self, padded: bool = True) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Spans of like length gathered into padded tables; with `padded=False`, of the same length.

        Yields:
            `index` `[s, l]`, the packed place of each token (padding points at a real token), and
            `real` `[s, l]` bool, or `None` when nothing is padded.
        """
        if padded not in self._tables:
            self._tables[padded] = list(self._build_tables(PADDING_SHARE if padded else 0.0))
        yield from self._tables[padded]

    def _build_tables(self, share: float) -> Iterator[tuple[Tensor, Tensor | None]]:
        device = self.cu_seqlens.device
        starts = [*accumulate(self.lengths, initial=0)][:-1]
        spans = sorted(zip(self.lengths, starts, strict=True), reverse=True)
        while spans:
            longest = spans[0][0]
            shortest = longest * (1 - share)
            size = next((i for i, (n, _) in enumerate(spans) if n < shortest), len(spans))
            table, spans = spans[:size], spans[size:]
            length = on(device, [n for n, _ in table])[:, None]
            start = on(device, [s for _, s in table])[:, None]
            step = torch.arange(longest, device=device)[None]
            index = start + torch.minimum(step, length - 1)  # [s, l]
            yield index, None if table[-1][0] == longest else step < length
