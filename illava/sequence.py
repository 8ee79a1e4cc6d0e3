"""What survives where: positions, masks and a cache whose layers hold different lengths.

A *slot* is a place in a layer's shortened sequence. Every slot carries the caller's position it
stands for (counted from the start of the sequence, cache included), -1 for padding; masks, queries
that count, and cropping all follow from these positions. They live in the cache layer itself, so
that beams, turns, copies and threads never mix.

Notation for tensor shapes: B rows, L tokens of the caller, n slots of a stage, K keys in a layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from illava.errors import CacheError
from illava.grids import grid_places
from illava.merge import compact


@dataclass
class Held:
    """What a `MergedLayer` holds.

    Attributes:
        positions: `[B, K]` the caller's position of each key, -1 for padding; `None` while empty.
        seen: tokens of the caller that went through, cache length as the caller knows it.
        ragged: whether any key is padding.
        history: which merges shaped it; layers of equal history hold equal positions.
    """

    positions: Tensor | None = None
    seen: int = 0
    ragged: bool = False
    history: tuple[tuple[int, int], ...] = ()


class MergedLayer(DynamicLayer):
    """A cache layer that holds fewer keys than the caller has tokens.

    To Hugging Face code it speaks of the caller's length; `held` says what it really holds. What an
    `update` makes of that is worked out when it is announced, so that the update itself, which
    torch.compile traces, only puts it in place.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.held = Held()
        self._expected: Held | None = None

    @property
    def positions(self) -> Tensor | None:
        return self.held.positions

    @property
    def seen(self) -> int:
        return self.held.seen

    @property
    def ragged(self) -> bool:
        return self.held.ragged

    @property
    def history(self) -> tuple[tuple[int, int], ...]:
        return self.held.history

    def expect(
        self, positions: Tensor | None, new_tokens: int, ragged: bool, mark: tuple[int, int] | None
    ) -> Held:
        """Announce what the next `update` brings: `[B, n]` positions for `new_tokens` of the caller.

        Returns:
            What will be held then. Positions that are not known yet (`None`) are filled in there.

        Raises:
            CacheError: another tool has changed the keys since.
        """
        known = 0 if self.positions is None else self.positions.shape[1]
        held = known if self.keys is None else self.keys.shape[-2]
        if known and known != held:
            raise CacheError(
                f"a layer of this cache holds {held} keys where illava knows of {known}: another tool has "
                "thrown out some of them (a KV-cache compressor such as kvpress?), and nobody knows which "
                "positions are left. Remove that tool, or patch with llm_layers=() and vit_layers=()"
            )
        history = self.history if mark is None else (*self.history, mark)
        self._expected = Held(None, self.seen + new_tokens, self.ragged or ragged, history)
        if positions is not None:
            self._expected.positions = self.followed_by(positions)
        return self._expected

    def followed_by(self, positions: Tensor) -> Tensor:
        """`[B, K + n]` positions of the keys held and of new ones."""
        if self.positions is None:
            return positions
        return torch.cat([self.positions, positions.to(self.positions.device)], dim=1)

    def withdraw(self) -> None:
        """Take back what was announced and did not come."""
        self._expected = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self._expected is None:
            raise CacheError(
                f"this cache holds {self.seen} tokens of which some were merged away by a patched "
                "model; an unpatched model cannot continue it. Patch the model again, or start with a "
                "new cache"
            )
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        self.held, self._expected = self._expected, None
        return keys, values

    def get_seq_length(self, *args: Any) -> int:
        return self.seen

    def get_mask_sizes(self, query: Any) -> tuple[int, int]:
        length = query if isinstance(query, int) else query.shape[0]
        return self.seen + length, 0

    def crop(self, tokens: int) -> None:
        """Forget the caller's last tokens: `-tokens` of them, or (4.57) all after the first `tokens`."""
        tokens = int(tokens)  # assisted decoding in transformers 5.17 gives a tensor
        target = max(0, self.seen + tokens) if tokens < 0 else tokens
        if self.positions is None or self.keys is None or self.values is None:
            return
        if target >= self.seen or tokens == 0:
            return
        keep = (self.positions >= 0) & (self.positions < target)
        length = int(keep.sum(dim=1).max())
        index = compact(keep, length)  # [B, length]
        self.keys = take_rows(self.keys, index[:, None].expand(-1, self.keys.shape[1], -1))
        self.values = take_rows(self.values, index[:, None].expand(-1, self.values.shape[1], -1))
        positions = self.positions.masked_fill(~keep, -1).gather(1, index)
        self.held = Held(positions, target, bool((positions < 0).any()), self.history)

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self._rows(lambda p: p.index_select(0, beam_idx.to(p.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._rows(lambda p: p.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._rows(lambda p: p[indices.to(p.device), ...])

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self.held, self._expected = Held(), None

    def _rows(self, change: Any) -> None:
        if self.positions is not None:
            self.held = replace(self.held, positions=change(self.positions))


def is_merged(cache: Any) -> bool:
    """Whether a patched model has filled this cache with merged sequences."""
    return isinstance(cache, Cache) and any(isinstance(x, MergedLayer) for x in getattr(cache, "layers", ()))


def check_cache(cache: Any) -> None:
    """Refuse a cache whose layers cannot hold different lengths.

    Raises:
        CacheError: a static, sliding-window or quantised cache, or a tuple of tensors.
    """
    if cache is None:
        return
    kinds = {type(layer) for layer in getattr(cache, "layers", ())} if isinstance(cache, Cache) else set()
    # Linear attention keeps a state of fixed size, which does not care how many tokens made it.
    kinds = {kind for kind in kinds if kind.__name__ != "LinearAttentionLayer"}
    if not isinstance(cache, DynamicCache) or not kinds <= {DynamicLayer, MergedLayer}:
        layers = ", ".join(sorted(kind.__name__ for kind in kinds)) or type(cache).__name__
        raise CacheError(
            f"{type(cache).__name__} ({layers}) cannot hold layers of different lengths, which merging "
            "in the language model needs; use the default DynamicCache (leave out "
            "cache_implementation and past_key_values), or patch with llm_layers=() and vit_layers=()"
        )


def check_whole(cache: Any, depth: int) -> None:
    """Refuse a merged cache whose layers have not seen the same tokens.

    Raises:
        CacheError: a call that failed midway has filled some of its `depth` layers, and not the others.
    """
    kinds = (DynamicLayer, MergedLayer)
    seen = {layer.get_seq_length() for layer in cache.layers if type(layer) in kinds}
    if len(cache.layers) < depth:
        seen.add(0)
    if len(seen) > 1:
        raise CacheError(
            f"the layers of this cache have seen between {min(seen)} and {max(seen)} tokens: a call that "
            "failed midway has left it half filled. Start with a new cache, or go on from a copy made "
            "before that call (copy.deepcopy)"
        )


def cache_layer(cache: Any, layer: int, batch: int, device: torch.device) -> MergedLayer:
    """The cache's layer, turned into a `MergedLayer` in place if it is not one yet."""
    while len(cache.layers) <= layer:
        cache.layers.append(DynamicLayer())
    current = cache.layers[layer]
    if isinstance(current, MergedLayer):
        return current
    merged = MergedLayer()
    seen = current.get_seq_length()
    if seen:
        merged.keys, merged.values = current.keys, current.values
        merged.dtype, merged.device, merged.is_initialized = current.dtype, current.device, True
        merged.held = Held(torch.arange(seen, device=device).expand(batch, -1), seen)
    cache.layers[layer] = merged
    return merged


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Gather along the second last dimension.

    Args:
        x: `[..., L, D]`.
        index: `[..., n]`; leading dimensions must match `x` or broadcast from the right.

    Returns:
        `[..., n, D]`.
    """
    index = index.to(x.device).expand(*x.shape[:-2], index.shape[-1])
    return x.gather(-2, index[..., None].expand(*index.shape, x.shape[-1]))


def valid_positions(positions: Tensor, padding_mask: Tensor | None) -> Tensor:
    """Positions with the caller's own padding marked -1 as well; both `[B, K]`."""
    if padding_mask is None:
        return positions
    real = padding_mask.to(positions.device).bool().gather(1, positions.clamp(min=0))
    return positions.masked_fill(~real, -1)


def needs_mask(implementation: str, queries: int, keys: int, unpadded: bool) -> bool:
    """Whether an implementation's own causal masking of the last `queries` of `keys` is wrong."""
    if implementation.startswith("flash"):
        return not unpadded
    return not (unpadded and (queries == 1 or (queries == keys and implementation == "sdpa")))


def attention_mask(
    implementation: str,
    queries: Tensor,
    keys: Tensor,
    *,
    unpadded: bool,
    dtype: torch.dtype,
) -> Tensor | None:
    """The mask one layer needs, in the form its attention implementation takes.

    Args:
        implementation: `"sdpa"`, `"eager"` or a flash attention.
        queries: `[B, n]` positions of the queries, the last `n` of the keys.
        keys: `[B, K]` positions of the keys, -1 where nobody may look.
        unpadded: no position is -1.
        dtype: of the hidden states.

    Returns:
        `[B, 1, n, K]` bool (SDPA) or additive (eager), `[B, K]` bool (flash), or `None` where the
        implementation's own causal masking is right.
    """
    length, total = queries.shape[1], keys.shape[1]
    if not needs_mask(implementation, length, total, unpadded):
        return None
    if implementation.startswith("flash"):
        return keys >= 0
    visible = (keys[:, None] >= 0) & (keys[:, None] <= queries[:, :, None])  # [B, n, K]
    # A padded query sees nothing; it looks at itself, so that no softmax is taken over nothing.
    itself = torch.eye(length, dtype=torch.bool, device=keys.device)
    itself = torch.nn.functional.pad(itself, (total - length, 0))  # [n, K]
    visible = (visible | (itself & ~visible.any(dim=-1, keepdim=True)))[:, None]
    if implementation == "sdpa":
        return visible
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


def expand_rows(x: Tensor, columns: Tensor, length: int) -> Tensor:
    """Put a shortened sequence back at the caller's length; tokens merged away are zero.

    Args:
        x: `[B, n, D]`.
        columns: `[B, n]` the column each slot stands for, negative for padding.
        length: `L`.

    Returns:
        `[B, L, D]`.
    """
    columns = columns.to(x.device)
    place = columns.masked_fill(columns < 0, length)  # padding goes to a row that is cut off
    full = x.new_zeros((x.shape[0], length + 1, x.shape[2]))
    return full.scatter(1, place[..., None].expand_as(x), x)[:, :length]


def later_text(segment: Tensor, text: Tensor, segments: int) -> Sequence[bool]:
    """For each segment, whether a text token of its row comes after it.

    Args:
        segment: `[B, L]` on the CPU, -1 for what belongs to none.
        text: `[B, L]` bool on the CPU, text that is not padding.
        segments: how many there are.
    """
    columns = torch.arange(segment.shape[1])
    last_text = torch.where(text, columns, -1).max(dim=1).values  # [B]
    rows, places = (segment >= 0).nonzero(as_tuple=True)
    last_own = torch.full((segments,), -1).scatter_reduce(0, segment[rows, places], places, "amax")
    row_of = torch.zeros(segments, dtype=torch.long).scatter(0, segment[rows, places], rows)
    return (last_text[row_of] > last_own).tolist()


def visual_places(segment: Tensor, tokens: Sequence[int], grids: Sequence[tuple[int, int, int]]) -> Tensor:
    """`[B, L, 3]` frame or tile, row and column of each visual token; 0 for text.

    Args:
        segment: `[B, L]` the picture or video of each token, -1 for none.
        tokens: visual tokens of each.
        grids: `(frames or tiles, height, width)` of each in visual tokens; one that does not come to as many
            counts as one long row.
    """
    shapes = [
        grid if math.prod(grid) == total else (1, 1, total) for total, grid in zip(tokens, grids, strict=True)
    ]
    flat = segment.flatten()  # [B * L]
    places = torch.zeros((len(flat), 3), dtype=torch.long)
    places[flat.argsort(stable=True)[len(flat) - sum(tokens) :]] = grid_places(shapes)
    return places.view(*segment.shape, 3)
