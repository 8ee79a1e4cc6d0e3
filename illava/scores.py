"""What merges in the language model read of a layer's attention.

Notation for tensor shapes: S segments, N slots of the largest, B rows, n slots held now, K' key heads,
K keys of the layer (a cache's included), T text slots, H query heads, D head size, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from illava import merge, sequence
from illava.attention import streaming
from illava.candidates import Candidates, Sequences


@dataclass(frozen=True)
class Scores:
    """What merges read of a layer's attention.

    Attributes:
        importance: `[B, n]` attention each slot receives.
        queries, keys: `[B, n, H, D]`, rotated; of the slots alone, not of a cache.
        scale: factor on their products.
        all_keys: `[B, K', K, D]` keys as the layer meets them, a cache's included, and their positions
            `[B, K]`; `None` once a merge has taken some of the slots away.
        rotation: cosines and sines `[B, n, D]` that turned the slots' queries and keys.
    """

    importance: Tensor
    queries: Tensor
    keys: Tensor
    scale: float
    all_keys: tuple[Tensor, Tensor] | None = None
    rotation: tuple[Tensor, Tensor] | None = None

    def take(self, index: Tensor) -> Scores:
        """Those of the slots `index` `[B, n']`."""
        rows = torch.arange(len(index), device=index.device)[:, None]
        return Scores(
            self.importance.gather(1, index),
            self.queries[rows, index],
            self.keys[rows, index],
            self.scale,
            rotation=self.rotation and (self.rotation[0][rows, index], self.rotation[1][rows, index]),
        )


def slots_to_choose(
    layer: int,
    table: Tensor,
    counts: Sequence[int],
    removed: Sequence[int],
    hidden: Tensor,
    sizes: Tensor,
    scores: Scores | None,
    positions: Tensor,
    text: Tensor,
    text_width: int,
    place: Callable[[], Tensor],
    inputs: Callable[[], Tensor],
) -> Candidates:
    """What a merge behind `layer` chooses from.

    Args:
        table: `[S, N]` flat slots of each segment.
        counts, removed: slots of each segment, and those to be removed.
        hidden, sizes: `[B, n, d]` and `[B, n]`, what is merged and how many tokens each slot stands for.
        scores: what is known of the layer's attention; `None` before the first layer.
        positions, text: `[B, n]` of the slots; `text_width` the largest number of text slots in a row.
        place, inputs: give `[B, n, 3]`, where each slot stands in its picture, and `[B, n, d]`, what the
            first layer was given there.
    """
    candidates = Candidates(
        "llm",
        layer,
        table,
        tuple(counts),
        tuple(n - r for n, r in zip(counts, removed, strict=True)),
        hidden.flatten(0, 1)[:, None],  # [B*n, 1, d]
        sizes.flatten(),
        sequences=Sequences(positions, text, text_width),
        _place=lambda: place().flatten(0, 1),
        _inputs=lambda: inputs().flatten(0, 1),
    )
    if scores is None:
        return candidates
    return replace(
        candidates,
        queries=scores.queries.flatten(0, 1)[:, None],  # [B*n, 1, H, D]
        keys=scores.keys.flatten(0, 1)[:, None],
        scale=scores.scale,
        sequences=Sequences(positions, text, text_width, scores.all_keys, scores.rotation),
        _attention=scores.importance.flatten,
    )


def attention_importance(
    q: Tensor,
    k: Tensor,
    scale: float,
    *,
    k_positions: Tensor,
    asking_end: int,
    score: str,
    queries: str,
    text: Tensor,
    text_width: int,
    visual: Tensor | None,
    lone: Tensor | None,
) -> Tensor:
    """How much attention each slot receives, `[B, n]` in fp32.

    Args:
        q: `[B, H, n, D]`, rotated.
        k: `[B, K', K, D]`, the slots' own keys last.
        scale: factor on their products.
        k_positions: `[B, K]` positions of the keys, padding of both kinds marked -1.
        asking_end: nobody asks from this position on.
        score: `"attention"`, or `"lse"` for the query statistic.
        queries: whose attention counts: `"text"`, `"all"`, `"visual"` or the `"last"`.
        text: `[B, n]` bool, the slots that are text; `text_width` their largest number in a row.
        visual: `[B, n]` bool, the slots that are visual; needed by `"visual"` alone.
        lone: `[B, n]` bool, slots of pictures after which no text comes: nothing there can ask for
            them, so with `"text"` all their queries rank them instead. `None` if there are none.
    """
    slots = q.shape[2]
    own = k_positions[:, -slots:]  # the queries' positions
    if score == "lse":
        level = streaming.log_sum_exp(q, k, scale=scale, q_positions=own, k_positions=k_positions)
        return level.mean(dim=1)
    own = own.masked_fill(own >= asking_end, -1)

    def received(columns: Tensor, positions: Tensor) -> Tensor:
        chosen = sequence.take_rows(q, columns[:, None].expand(-1, q.shape[1], -1))  # [B, H, T, D]
        return streaming.attention_received(
            chosen, k, scale=scale, q_positions=positions, k_positions=k_positions,
            asked=slice(k.shape[2] - slots, None),
        )  # fmt: skip

    everyone = torch.arange(slots, device=q.device).expand(q.shape[0], -1)
    if queries == "all":
        return received(everyone, own)
    if queries == "visual" and visual is not None:
        return received(everyone, own.masked_fill(~visual, -1))
    if queries == "last":
        last = own.argmax(dim=1, keepdim=True)  # [B, 1]
        return received(last, own.gather(1, last))
    columns = merge.compact(text, text_width)  # [B, T]
    importance = received(columns, own.masked_fill(~text, -1).gather(1, columns))
    return importance if lone is None else torch.where(lone, received(everyone, own), importance)
