"""Selecting and recycling: pure tensor maths over units, no model in sight.

A *segment* is the set of units among which one selection is made (an image, a video frame). The
segments of a call are handled together: padded to a table of `[segments, units]` whose sizes are
known on the host, so that nothing here waits for a device.

Notation for tensor shapes: S segments, N units of the largest segment, C recycled units, T targets,
M members of a group, U units in all, g tokens per unit, H query heads, K key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from illava.grids import row_places
from illava.groups import linear_groups, no_groups, recycled_groups
from illava.transfer import on


@dataclass(frozen=True)
class Merge:
    """One decision, to be applied to anything that has a row per unit.

    Attributes:
        keep: `[U]` bool, the units that survive. Units of no segment always survive.
        recycled: `[R]` the surviving units that take in others.
        sources: `[R, M]` the units each recycled unit is made of, itself among them.
        weights: `[R, M]` their weights in fp32; every row sums to 1, unused places weigh 0.
        kept_table: `[S, P]` for each segment its surviving units in ascending order; rows are
            padded at the end.
        kept_counts: how many of each row of `kept_table` are real.
        index, counts: `[S, N]` the units of each segment, and how many of each row are real.
        importance: `[S, N]` by what they were ranked.
        mixture: where a function is the rule, `[S, P, N]` the weights of which each kept unit is made.
        owner, sizes: where units are joined, `[U]` the surviving unit that each goes into, and how much each
            weighs there.
    """

    keep: Tensor
    recycled: Tensor
    sources: Tensor
    weights: Tensor
    kept_table: Tensor
    kept_counts: tuple[int, ...]
    index: Tensor
    counts: tuple[int, ...]
    importance: Tensor
    mixture: Tensor | None = None
    owner: Tensor | None = None
    sizes: Tensor | None = None

    @property
    def grows(self) -> bool:
        """Whether units go into others whole, so that these stand for more."""
        return self.mixture is not None or self.owner is not None

    def blend(self, features: Tensor) -> Tensor:
        """Replace the rows of units that take in others by the weighted sum of their groups.

        Args:
            features: `[U, ...]`, one row per unit; the inner layout of a unit is kept slot by slot.

        Returns:
            `[U, ...]` in the same dtype; rows of other units are untouched.
        """
        flat = features.reshape(features.shape[0], -1)  # [U, g*d]
        if self.mixture is not None:
            index, weights = (x.to(flat.device) for x in (self.index, self.mixture))
            mixed = torch.einsum("spn,snd->spd", weights, flat[index].float())
            real = on(flat.device, row_places(self.kept_counts, self.kept_table.shape[1]))
            kept = self.kept_table.to(flat.device).flatten()[real]
            return flat.index_copy(0, kept, mixed.flatten(0, 1)[real].to(flat.dtype)).reshape(features.shape)
        if self.owner is not None and self.sizes is not None:
            owner, sizes = self.owner.to(flat.device), self.sizes.to(flat.device)
            gone = sum(self.counts) - sum(self.kept_counts)
            return joined(flat, owner, sizes, gone).reshape(features.shape)
        if self.recycled.numel() == 0:
            return features
        group = flat[self.sources].float()  # [R, M, g*d]
        mixed = torch.einsum("rm,rmd->rd", self.weights, group).to(flat.dtype)
        return flat.index_copy(0, self.recycled, mixed).reshape(features.shape)

    def grow(self, sizes: Tensor) -> Tensor:
        """How many units each stands for, `[U]`, once others have gone into it whole."""
        if self.owner is not None:
            return torch.zeros_like(sizes).index_add(0, self.owner, sizes)
        if self.mixture is None:
            return sizes
        grown = torch.einsum("spn,sn->sp", (self.mixture != 0).to(sizes), sizes[self.index])
        real = on(sizes.device, row_places(self.kept_counts, self.kept_table.shape[1]))
        return sizes.index_copy(0, self.kept_table.flatten()[real], grown.flatten()[real])


def joined(flat: Tensor, owner: Tensor, sizes: Tensor, gone: int) -> Tensor:
    """Each unit's row `[U, d]` as the weighted mean of all that go into it; what takes in none is untouched.

    Only rows that go or take in others are read and widened where they are few. On CUDA the last bit of a
    mean of three and more depends on the order of adding, unless torch is told to use deterministic
    algorithms.

    Args:
        owner: `[U]` the unit that each goes into.
        sizes: `[U]` how much each weighs.
        gone: how many go into another.
    """
    sizes = sizes.float()
    total = torch.zeros_like(sizes).index_add(0, owner, sizes)  # [U] of all that go into each
    takes_in, share = total > sizes, (sizes / total[owner])[:, None]
    if 4 * gone >= len(flat):
        mixed = torch.zeros_like(flat, dtype=torch.float32).index_add(0, owner, share * flat.float())
        return torch.where(takes_in[:, None], mixed.to(flat.dtype), flat)
    rows = compact(takes_in[owner][None], 2 * gone)[0]  # [I] each goes into one, so no more are concerned
    slot = torch.zeros_like(owner).scatter(0, rows, torch.arange(len(rows), device=rows.device))
    part = flat[rows]
    mixed = torch.zeros_like(part, dtype=torch.float32)
    mixed = mixed.index_add(0, slot[owner[rows]], share[rows] * part.float())
    return flat.index_copy(0, rows, torch.where(takes_in[rows, None], mixed.to(flat.dtype), part))


def select(
    importance: Tensor,
    index: Tensor,
    counts: Sequence[int],
    keep_counts: Sequence[int],
    *,
    total_units: int,
    rule: str | Callable[[Tensor], Tensor] = "recycle",
    recycled_share: float = 0.05,
    members: int = 5,
    queries: Tensor | None = None,
    keys: Tensor | None = None,
    scale: float = 1.0,
) -> Merge:
    """Decide which units of each segment survive and what the recycled ones take in.

    Paper, section 3.2.2. A segment that keeps all its units is left exactly as it is.

    Args:
        importance: `[S, N]` mean attention received per unit; padding may hold anything.
        index: `[S, N]` where each segment's units stand among all `U` units, ascending in a row.
        counts: real units per segment.
        keep_counts: units to keep per segment, 1 to `counts`.
        total_units: `U`.
        rule: `"recycle"` (informative and recycled units), `"prune"` (drop the rest) or `"linear"`
            (the first version's: one unit takes in all the dropped ones with weights R+1, ..., 1,
            the least important weighing most, as its section 3.2 and its released code have it), or a
            function from the places of kept units `[S, P]`, ascending in a row, to the weights
            `[S, P, N]` of which each is made.
        recycled_share: share of the kept units that recycle; at least one does.
        members: size M of a group, the recycled unit itself included.
        queries, keys: `[U, g, H, D]` and `[U, g, K, D]`, the same layer's rotated queries and keys;
            needed by `"recycle"` alone.
        scale: factor on their scores.

    Returns:
        The decision. Ties in importance go to the earlier unit.
    """
    device = importance.device
    width = importance.shape[1]
    count = on(device, counts)[:, None]  # [S, 1]
    kept = on(device, keep_counts)[:, None]  # [S, 1]
    place = torch.arange(width, device=device)[None]  # [1, N]

    ranked = importance.float().masked_fill(place >= count, float("-inf"))
    order = ranked.argsort(dim=1, descending=True, stable=True)  # [S, N] unit at each rank

    # Surviving units in their own order: everything below the cut moves behind the last place.
    widest = max(keep_counts)
    table = torch.where(place < kept, order, width).sort(dim=1).values[:, :widest]  # [S, P]
    kept_table = index.gather(1, table.clamp(max=width - 1))
    keep = torch.ones(total_units + 1, dtype=torch.bool, device=device)
    keep = keep.index_fill(0, real_or(total_units, index, counts).flatten(), False)
    keep = keep.index_fill(0, real_or(total_units, kept_table, keep_counts).flatten(), True)[:total_units]

    groups, mixture = no_groups(device), None
    if callable(rule):
        places = table.clamp(max=width - 1)
        itself = torch.nn.functional.one_hot(places, width).float()
        mixture = torch.where((kept < count)[..., None], rule(places).float(), itself)
    elif rule == "linear":
        groups = linear_groups(order, index, counts, keep_counts)
    elif rule == "recycle":
        if queries is None or keys is None:
            raise ValueError("the rule 'recycle' needs the layer's queries and keys")
        groups = recycled_groups(
            order, index, counts, keep_counts, recycled_share, members, queries, keys, scale
        )
    return Merge(keep, *groups, kept_table, tuple(keep_counts), index, tuple(counts), importance, mixture)


def real_or(spare: int, index: Tensor, counts: Sequence[int]) -> Tensor:
    """A table `[S, N]` of units with `spare` in the place of padding."""
    width = index.shape[1]
    if min(counts) == width:
        return index
    return torch.where(
        torch.arange(width, device=index.device) < on(index.device, counts)[:, None], index, spare
    )


def compact(keep: Tensor, length: int) -> Tensor:
    """Where the kept places of each row stand, pushed to the right.

    Args:
        keep: `[B, L]` bool.
        length: places per row afterwards, at least the largest number kept in a row.

    Returns:
        `[B, length]` indices into a row. A row with fewer kept places starts with dropped ones,
        which the caller masks: padding on the left, so that the last token stays last.
    """
    return keep.to(torch.uint8).argsort(dim=1, stable=True)[:, keep.shape[1] - length :]
