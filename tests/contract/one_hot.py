"""What each token is made of, told by a slow reference: "which patch am I" as a feature, merged along.

Every merge of a reference is done once more, by the reference's own code, over one-hot features of patches.
What comes out are dense matrices `[tokens, patches]`, to compare with `report.provenance`.

Sizes in the shape comments: n tokens or units alive, g patches of a unit, P patches of a picture.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field

import torch

from illava import provenance
from references import core, llava


@dataclass
class Made:
    """The tokens of one picture after one merge."""

    tokens: list[int]
    recycled: list[int]
    rows: torch.Tensor  # [n, P]
    importance: dict[int, float] = field(default_factory=dict)  # of the tokens ranked


class Follower:
    """The merges of a reference, each with a way to repeat it over other features."""

    def __init__(self, reference, monkeypatch) -> None:
        self.merges: list[tuple] = []  # Merge, unit importance [n], g, how to repeat it
        module = sys.modules[reference.forward.__module__]
        merge_segment, latest = core.merge_segment, []

        def merge(x, q, k, importance, removed, g, options, *others, **named):
            def again(features):
                return merge_segment(features, q, k, importance, removed, g, options)[2]

            latest[:] = importance.reshape(-1, g).mean(1), g, again
            return merge_segment(x, q, k, importance, removed, g, options, *others, **named)

        def record(*args):
            made = core.Merge(*args)
            self.merges.append((made, *latest))
            return made

        monkeypatch.setattr(module, "merge_segment", merge)
        monkeypatch.setattr(module, "Merge", record)

    def at(self, stage: str, layer: int) -> list[tuple]:
        return [found for found in self.merges if (found[0].stage, found[0].layer) == (stage, layer)]


def expected(family, model, inputs, merges: Follower, pictures, order, plan, reads=None):
    """For each picture its `Made` after each merging layer by (stage, layer), the entry as ("entry", -1), and
    `[T, P]` on which patches left by the encoder each visual token stands.

    Args:
        pictures: kind, frames `(height, width)` and patches along a unit's side of each.
        order: the pictures in the order of the prompt.
        plan: the handle's.
        reads: `[T, units]` weights for each picture where a resampler reads the units.
    """
    frames = [
        Frames(family, model, sizes, side, first=first)
        for (_, sizes, side), first in zip(pictures, first_frames(pictures), strict=True)
    ]
    found = [{} for _ in pictures]
    for layer in plan.vit_layers:
        for merge, importance, g, again in merges.at("vit", layer):
            for number, (kind, sizes, _) in enumerate(pictures):
                own = merge.segment - frames[number].first
                if kind == merge.source and 0 <= own < len(sizes):
                    frames[number].merge(own, merge, importance, g, again)
        for number, picture in enumerate(frames):
            found[number]["vit", layer] = picture.made()
    for number, (kind, _, _) in enumerate(pictures):
        weights = None if reads is None else reads[number]
        entry, stands = enter(family, model, inputs, kind, number, pictures, frames, weights)
        found[number]["entry", -1], found[number]["stands"] = entry, stands
    held = [dict(zip(own["entry", -1].tokens, own["entry", -1].rows, strict=True)) for own in found]
    for layer in plan.llm_layers:
        news = [([], {}) for _ in pictures]
        for merge, importance, _, again in merges.at("llm", layer):
            number = order[merge.segment]
            before = held[number]
            merged = again(torch.stack(list(before.values())))
            news[number] = merge.recycled, dict(zip(before, importance.tolist(), strict=True))
            held[number] = dict(zip(merge.kept, merged, strict=True))
        for number, (recycled, importance) in enumerate(news):
            rows = torch.stack(list(held[number].values()))
            found[number]["llm", layer] = Made(list(held[number]), sorted(recycled), rows, importance)
    return found


def first_frames(pictures) -> list[int]:
    """Of each picture the number of its first frame in the encoder call of its kind."""
    counts, firsts = {}, []
    for kind, sizes, _ in pictures:
        firsts.append(counts.get(kind, 0))
        counts[kind] = firsts[-1] + len(sizes)
    return firsts


class Frames:
    """One picture in the encoder: one-hot features of each frame's patches, unit by unit."""

    def __init__(self, family, model, sizes, side, *, first) -> None:
        self.first = first
        self.number = sum(h * w for h, w in sizes)
        self.units, self.rows, self.names, self.orders, self.recycled, self.importance = (
            [],
            [],
            [],
            [],
            [],
            [],
        )
        start = start_unit = 0
        for h, w in sizes:
            cells = [(r, c) for r in range(h // side) for c in range(w // side)]
            held = held_order(family, model, cells, side)
            patches = [
                start + (cells[u][0] * side + i) * w + cells[u][1] * side + j
                for u in held
                for i in range(side)
                for j in range(side)
            ]
            self.rows.append(torch.eye(self.number)[patches])  # [n * g, P]
            self.names.append([start_unit + u for u in held])
            self.orders.append([start_unit + u for u in held])
            self.recycled.append([])
            self.importance.append({})
            start, start_unit = start + h * w, start_unit + len(cells)

    def merge(self, own, merge, importance, g, again) -> None:
        rows = self.rows[own]
        if len(rows) == 4 * g * len(
            importance
        ):  # the merger inside MiniCPM's tower has run: mean of each window
            units = rows.reshape(len(importance), 2, 2, 2, 2, -1)  # [n, top, row, left, column, P]
            rows = units.mean((2, 4)).flatten(0, 2)
        self.importance[own] = dict(zip(self.names[own], importance.tolist(), strict=True))
        self.rows[own] = again(rows)
        self.names[own] = [self.orders[own][n] for n in merge.kept]
        self.recycled[own] = [self.orders[own][n] for n in merge.recycled]

    def made(self) -> Made:
        """The units left, and a unit as the mean of its patches."""
        rows = []
        for names, own in zip(self.names, self.rows, strict=True):
            rows += zip(names, own.reshape(len(names), -1, self.number).mean(1), strict=True)
        rows.sort(key=lambda row: row[0])
        importance = {name: x for own in self.importance for name, x in own.items()}
        recycled = sorted(name for own in self.recycled for name in own)
        self.importance, self.recycled = [{} for _ in self.rows], [[] for _ in self.rows]
        return Made([n for n, _ in rows], recycled, torch.stack([row for _, row in rows]), importance)

    def left(self) -> torch.Tensor:
        """`[units, P]`, one-hot rows of all units merged along; those merged away are -inf."""
        made = self.made()
        full = torch.full((sum(map(len, self.orders)), self.number), float("-inf"))
        full[made.tokens] = made.rows
        return full


def held_order(family, model, cells, side) -> list[int]:
    """A frame's units in the order in which the reference numbers them: window by window in Qwen2.5-VL."""
    if family != "qwen2_5_vl":
        return list(range(len(cells)))
    config = model.config.vision_config
    reach = config.window_size // side // config.patch_size
    return sorted(range(len(cells)), key=lambda i: (cells[i][0] // reach, cells[i][1] // reach, cells[i]))


def enter(family, model, inputs, kind, number, pictures, frames, reads):
    """What the language model is given of a picture, and `[T, P]` on which patches its tokens stand."""
    left = frames[number].left()  # [units, P]
    standing = torch.full_like(left, float("-inf"))
    alive = ~left.isinf().any(1)
    own = Frames(
        family, model, *pictures[number][1:], first=0
    ).left()  # every unit as the mean of its patches
    standing[alive] = own[alive]
    if family in ("llava_onevision", "llava_next"):
        nth = [n for n, (other, _, _) in enumerate(pictures) if other == kind].index(number)
        left, standing = (packed(model, inputs, kind, nth, rows) for rows in (left, standing))
    if reads is not None:
        left, standing = reads[:, alive] @ left[alive], reads[:, alive] @ standing[alive]
    tokens = [n for n, row in enumerate(left) if not row.isinf().any()]
    stands = torch.where(standing.isinf(), 0, standing)
    return Made(tokens, [], left[tokens]), stands


def packed(model, inputs, kind, nth, rows) -> torch.Tensor:
    """LLaVA's packing by its reference, without newlines: `[units, P]` to `[T, P]`."""
    config = model.config
    n = config.vision_config.image_size // config.vision_config.patch_size
    tiles = [list(tile) for tile in rows.split(n * n)]
    if kind == "video":
        half = math.ceil(n / 2)
        frames = ([tile[r * n : (r + 1) * n] for r in range(n)] for tile in tiles)
        return torch.stack(
            [x for lines in frames for line in llava.resample(lines, half, half) for x in line]
        )
    if len(tiles) == 1:
        return torch.stack(tiles[0])
    size, side = inputs["image_sizes"][nth].tolist(), config.vision_config.image_size
    height, width = llava.best_resolution(size, config.image_grid_pinpoints)
    lines = llava.pack(config, tiles[1:], (height // side, width // side), size)
    return torch.stack([*tiles[0], *(x for line in lines for x in line)])


def same_provenance(a, b) -> None:
    """Two pictures' tokens are made of the same patches at every step, and stand where they stand."""
    assert a.frames == b.frames
    for one, other in zip((*a.merges, a.entry), (*b.merges, b.entry), strict=True):
        assert (one.stage, one.layer) == (other.stage, other.layer)
        for name in ("tokens", "recycled", "mixed", "state"):
            assert getattr(one, name).tolist() == getattr(other, name).tolist(), name
        for name in ("sources", "stands"):
            own, others = getattr(one, name).to_dense(), getattr(other, name).to_dense()
            torch.testing.assert_close(own, others, atol=1e-4, rtol=1e-4)


def check_step(step, made, stands, own):
    assert step.tokens.tolist() == made.tokens
    assert step.tokens[step.recycled].tolist() == made.recycled
    torch.testing.assert_close(step.sources.to_dense(), made.rows, atol=1e-5, rtol=1e-5)
    if step.stage == "vit":
        stands = units_of(own)
    torch.testing.assert_close(step.stands.to_dense(), stands[step.tokens], atol=1e-5, rtol=1e-5)
    standing = stands[step.tokens] > 1e-6  # [n, P]
    state = torch.zeros(own.patches, dtype=torch.uint8)
    state[standing[step.recycled].any(0)] = provenance.RECYCLED
    state[standing[~step.recycled].any(0)] = provenance.INFORMATIVE
    assert step.state.tolist() == state.tolist()
    if not made.importance:
        assert step.importance is None or step.importance.isnan().all()
        return
    ranked, values = list(made.importance), torch.tensor([*made.importance.values()])
    weights = stands[ranked]
    mean = (weights * values[:, None]).sum(0) / weights.sum(0)  # NaN where nobody stands
    torch.testing.assert_close(step.importance, mean, atol=1e-5, rtol=1e-4, equal_nan=True)


def units_of(own) -> torch.Tensor:
    """`[units, P]` the patches of each unit, both line by line."""
    rows, start = [], 0
    for h, w in own.frames:
        places = torch.arange(h * w).view(h, w) + start
        for r in range(0, h, own.unit_side):
            for c in range(0, w, own.unit_side):
                row = torch.zeros(own.patches)
                row[places[r : r + own.unit_side, c : c + own.unit_side].flatten()] = 1 / own.unit_side**2
                rows.append(row)
        start += h * w
    return torch.stack(rows)


def account(own):
    """Weights of a token sum to 1, and every patch is somewhere or nowhere, for good."""
    before = torch.ones(own.patches, dtype=torch.bool)
    for step in own.merges:
        made = step.sources.to_dense()
        torch.testing.assert_close(made.sum(1), torch.ones(len(made)))
        assert made.min() >= 0
        torch.testing.assert_close(step.share, made.sum(0))
        here = step.state != provenance.GONE
        assert not (here & ~before).any(), "a patch that was gone is back"
        assert (step.share[here] > 0).all(), "a token stands on a patch but is not made of it"
        assert not (here & step.absorbed).any()
        before = here
    maps = own.maps(before)
    assert tuple(m.shape for m in maps) == own.frames
    assert torch.equal(torch.cat([m.flatten() for m in maps]), before)
