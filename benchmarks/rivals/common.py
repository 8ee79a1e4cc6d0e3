"""What a rival is, and the few steps that several methods share.

Notation for tensor shapes: S segments, N units of the largest, P kept units of the largest, g tokens per
unit, D head size, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import illava
from illava import Candidates, ModelPlan, Plan, checks, families
from illava.families.seams import Seams
from illava.schedule import SegmentSchedule


@dataclass(frozen=True)
class Rival:
    """A method to compare with, at its best published settings.

    What sets its strength is `final_ratio`: visual tokens left after its last stage, of all.

    Attributes:
        name: as its authors call it.
        source: paper, and the file of its code that was read.
        stages: where it saves: `"input"`, `"encoder"`, `"encoder output"`, `"llm"`, `"both"` or `"none"`.
        differs: where and why it is not exactly what was published.
        plan_of: the plan for a model's parts and a final ratio; `None` if it leaves the model alone.
        resize: for a method that works on pictures instead, what it does to them.
    """

    name: str
    source: str
    stages: str
    differs: str = ""
    plan_of: Callable[[Seams, float], Plan] | None = None
    resize: Callable[..., Any] | None = None

    def patch(self, model: nn.Module, *, final_ratio: float) -> AbstractContextManager[Any]:
        """Make `model` work by this method until the context ends; yields illava's handle, if any."""
        if self.plan_of is None or final_ratio >= 1:
            return nullcontext()
        return illava.patch(model, plan=self.plan_of(seams_of(model), final_ratio))

    def prepare(self, pictures: Sequence[Any], *, final_ratio: float, unit: int = 28) -> list[Any]:
        """Pictures (PIL) and videos (`[T, H, W, 3]`) as the method shows them to the model.

        Args:
            unit: pixels along one side of a visual token. The processor must not resize on its own (for
                Qwen: its `min_pixels` low enough).
        """
        if self.resize is None:
            return list(pictures)
        return [self.resize(picture, final_ratio, unit) for picture in pictures]

    def plan(self, model: nn.Module, *, final_ratio: float) -> ModelPlan:
        """What it does to `model`, layer by layer."""
        seams, plan = seams_of(model), Plan((), (), reduction=0)
        if self.plan_of is not None and final_ratio < 1:
            plan = self.plan_of(seams, final_ratio)
        return seams.settle(plan)

    def schedule(
        self, model: nn.Module, *, visual_tokens: int, final_ratio: float, frames: int = 1
    ) -> SegmentSchedule:
        """Tokens in and out of every merging layer, for a picture of `visual_tokens` in `frames` or tiles."""
        tokens = visual_tokens
        if self.resize is not None:
            tokens = max(1, round(final_ratio * visual_tokens))
        return self.plan(model, final_ratio=final_ratio).segment(frames, tokens // frames)

    def token_counts(
        self, model: nn.Module, *, visual_tokens: int, final_ratio: float
    ) -> tuple[list[float], list[float]]:
        """The share of the picture's visual tokens that enters each encoder block, and each decoder layer."""
        seams = seams_of(model)
        done = self.schedule(model, visual_tokens=visual_tokens, final_ratio=final_ratio)
        vit = entering(done.tokens, done.vit, len(seams.blocks))
        llm = entering(done.encoder_tokens, done.llm, len(seams.layers))
        return [n / visual_tokens for n in vit], [n / visual_tokens for n in llm]


def entering(tokens: int, merges: Sequence[tuple[int, int, int]], depth: int) -> list[int]:
    """Tokens that enter each of `depth` layers."""
    left = {layer: out for layer, _, out in merges}
    counts = []
    for layer in range(depth):
        tokens = left.get(layer - 1, tokens)
        counts.append(tokens)
    return counts


def seams_of(model: nn.Module) -> Seams:
    """The parts of a model that a plan is made for."""
    core: Any = checks.unwrap(model)
    return families.family_of(core.config.model_type, type(core).__name__).find_seams(core)


# Scores ---------------------------------------------------------------------------------------------


def seen_by_class(c: Candidates) -> Tensor:
    """`[S, N]` attention from the class token, or in encoders without one, from all tokens alike."""
    return c.attention if c.class_attention is None else c.class_attention


def best(scores: Tensor, counts: Sequence[int]) -> Tensor:
    """`[S, N]` bool: in each row its `counts` highest scores; of equal ones the earlier."""
    rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return rank < torch.tensor(counts, device=scores.device)[:, None]


def chosen(c: Candidates, rows: Sequence[Sequence[int]]) -> Tensor:
    """`[S, N]` scores under which exactly these units of each segment are kept."""
    scores = torch.zeros(c.index.shape)
    for row, units in enumerate(rows):
        scores[row, list(units)] = 1
    return scores.to(c.index.device)


def cosine(x: Tensor) -> Tensor:
    """`[S, N, N]` likeness of all pairs of `[S, N, d]`."""
    x = torch.nn.functional.normalize(x.float(), dim=-1)
    return x @ x.transpose(-1, -2)


def mean_keys(c: Candidates) -> Tensor:
    """`[S, N, g*D]` keys averaged over heads, those of a unit's patches side by side."""
    return c.keys.float().mean(dim=2).flatten(1)[c.index]


# Rules ----------------------------------------------------------------------------------------------


def is_kept(c: Candidates, kept: Tensor) -> Tensor:
    """`[S, N]` bool from `[S, P]` places, padded ones left out."""
    real = torch.arange(kept.shape[1], device=kept.device) < torch.tensor(
        c.keep_counts, device=kept.device
    ).unsqueeze(1)
    spare = kept.masked_fill(~real, c.index.shape[1])
    mask = torch.zeros((len(kept), c.index.shape[1] + 1), dtype=torch.bool, device=kept.device)
    return mask.scatter(1, spare, True)[:, :-1]


def gathered(kept: Tensor, owner: Tensor, sizes: Tensor) -> Tensor:
    """`[S, P, N]` the weighted mean of each kept unit's group.

    Args:
        kept: `[S, P]` places.
        owner: `[S, N]` place of the kept unit that each unit goes into, -1 for none.
        sizes: `[S, N]` how much each counts.
    """
    mine = (owner[:, None] == kept[..., None]) * sizes[:, None]
    return mine / mine.sum(dim=-1, keepdim=True).clamp(min=1e-12)


def unchanged(kept: Tensor, width: int) -> Tensor:
    """`[S, P, N]` each kept unit made of itself alone."""
    return torch.nn.functional.one_hot(kept, width).float()
