"""What speed.py measures: cases, and in each case the arms that are timed in turn.

A case is a model, an attention implementation, what it is shown, and a batch size. An arm is what is
compared with the unpatched model in it: illava at a reduction, or a rival at the same number of final
tokens. Rivals are plans of illava's, on the same hooks and kernels, so that the table compares where and
when tokens go, not how well somebody's fork was written; `RIVALS` says how each differs from what was
published.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from speed_inputs import CONTENTS, Shown

import illava
from illava.families.seams import Seams

OURS, EARLY, RECYCLE = "illava", "illava early", "illava recycle"
SMALLER_PICTURE, SMALLER_MODEL = "smaller picture", "smaller model"
WINDOWS, WINDOWS_MERGING = "fast windows", "illava, fast windows"
PROFILED = OURS, EARLY, RECYCLE  # with --profile, beside the unpatched model
EARLY_SHARE = 0.8
# Measured first: the sizes, contents and batches that the README speaks of.
TOKENS_FIRST = (4096, 16384, 1024, 256)
MODELS_FIRST = ("qwen2.5-vl-7b", "internvl2.5-26b", "qwen2.5-vl-3b", "internvl2.5-8b", "llava-onevision-7b")


@dataclass(frozen=True)
class Rival:
    """Another way to spend the same number of final tokens.

    Attributes:
        what: in a few words.
        note: its source, and how this row differs from what was published.
    """

    what: str
    note: str = ""


RIVALS = {
    EARLY: Rival(
        "illava, one merge in each stage",
        f"Plan(merge='recycle', encoder_share={EARLY_SHARE}) in the first layer of each stage: the same "
        "final tokens, most of them gone after a quarter of the encoder. The documented plan for speed above "
        "accuracy: in Qwen2.5-VL-7B at 88.9 % its bound is 4.4x at 4,096 visual tokens and 4.6x at 16,384.",
    ),
    RECYCLE: Rival(
        'Plan(merge="recycle")',
        "The paper's rule where illava has it merge: what exact statistics of attention cost.",
    ),
    "encoder only": Rival(
        'llm_layers=(), merge="recycle"', "Table 4 of the iLLaVA paper: no merge in the language model."
    ),
    "LLM only": Rival(
        'vit_layers=(), merge="recycle"', "Table 4 of the iLLaVA paper: no merge in the encoder."
    ),
    "FastV": Rival(
        "LLM only, one merge after its second layer, last query, prune",
        "Chen et al., ECCV 2024, arXiv 2403.06764, K = 2: layers 0 and 1 see every token, ranked by the last "
        "token's attention in layer 1, the rest dropped. Differs: the attention runs on SDPA or flash, "
        "where its code needs eager attention in that layer; R is whatever gives the row's final tokens.",
    ),
    "PyramidDrop": Rival(
        "LLM only, three merges, equal keep ratios, last query, prune",
        "Xing et al., CVPR 2025, arXiv 2410.17247: drops after 8, 16 and 24 of 32 layers (here at the same "
        "relative depth), ranked for the last token of the instruction. Differs: ranked by the "
        "softmax of the layer before the drop, where its code applies the next layer's projections; the keep "
        "ratio is what gives the row's final tokens, published 0.5 each, which is 87.5 % in all; original "
        "positions are kept, its code renumbers them.",
    ),
    "VisionZip": Rival(
        "encoder only, one merge in its last block but one, recycle",
        "Yang et al., CVPR 2025, arXiv 2412.04467: dominant tokens by the attention they receive in the last "
        "block but one, the others merged into contextual ones, 10 of 64. Differs: tokens leave inside that "
        "block (its feed-forward network and the last block run on the survivors), contextual tokens are the "
        "next most important and take in 5 by attention (recycled = 10/64) where it takes every nth and "
        "joins all others by the keys' likeness; merge units instead of patches, attention instead of CLS's.",
    ),
    WINDOWS: Rival("fast_windows=True alone: every token, all windows of a block in one call"),
    WINDOWS_MERGING: Rival("illava with fast_windows=True"),
    SMALLER_PICTURE: Rival("unpatched, a picture of as many tokens as the plan leaves"),
    SMALLER_MODEL: Rival("unpatched, the next smaller model of the family, the whole picture"),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Where arms are compared.

    Attributes:
        model: key of `MODELS`.
        attn: attention implementation.
        shown: what each row of the batch is shown.
        rows: batch size.
    """

    model: str
    attn: str
    shown: Shown
    rows: int

    def __str__(self) -> str:
        many = "" if self.shown.count == 1 else f"{self.shown.count} "
        kind = {"pictures": "pictures", "video": "frames"}.get(self.shown.content, "picture")
        return f"{self.model}, {self.attn}, {many}{kind}, {self.shown.tokens:,} tokens, batch {self.rows}"


@dataclass(frozen=True)
class Arm:
    """What is compared with the unpatched model: ours or a rival, at a reduction."""

    name: str
    reduction: float

    def __str__(self) -> str:
        return f"{self.name} at {self.reduction:.1%}"

    @property
    def patches(self) -> bool:
        return self.name not in (SMALLER_PICTURE, SMALLER_MODEL)

    @property
    def fast_windows(self) -> bool:
        return self.name in (WINDOWS, WINDOWS_MERGING)


def plan_of(arm: Arm, seams: Seams) -> illava.Plan:
    """The plan behind an arm, for one model."""
    r, blocks, layers = arm.reduction, len(seams.blocks), len(seams.layers)
    if arm.name in (OURS, WINDOWS, WINDOWS_MERGING):
        return illava.Plan(reduction=r)
    if arm.name == EARLY:
        first = {"vit_layers": seams.vit_ranked[:1], "llm_layers": seams.llm_ranked[:1]}
        return illava.Plan(**first, reduction=r, encoder_share=EARLY_SHARE, merge="recycle")
    if arm.name == RECYCLE:
        return illava.Plan(reduction=r, merge="recycle")
    if arm.name == "encoder only":
        return illava.Plan(llm_layers=(), reduction=r, merge="recycle")
    if arm.name == "LLM only":
        return illava.Plan(vit_layers=(), reduction=r, merge="recycle")
    last: dict[str, Any] = {"queries": "last", "merge": "prune"}
    if arm.name == "FastV":
        return illava.Plan(vit_layers=(), llm_layers=(1,), reduction=r, **last)
    if arm.name == "PyramidDrop":
        places = tuple(sorted({max(0, round(layers * done / 4) - 1) for done in (1, 2, 3)}))
        keep = (1 - r) ** (1 / len(places))
        return illava.Plan(vit_layers=(), llm_layers=places, llm_keep_ratio=keep, **last)
    if arm.name == "VisionZip":
        place = (max(0, blocks - 2),)
        return illava.Plan(
            vit_layers=place,
            llm_layers=(),
            reduction=r,
            recycled=10 / 64,
            window_score="picture",
            merge="recycle",
        )
    raise ValueError(f"{arm.name} has no plan")


def all_cases(
    models: Sequence[str],
    attns: Sequence[str],
    contents: Sequence[str],
    tokens: Sequence[int],
    batches: Sequence[int],
    pictures: int,
    frames: int,
) -> list[Case]:
    """Every combination, the most important first, and as few changes of model as that allows."""
    counts = {"picture": 1, "pictures": pictures, "video": frames}
    cases = []
    for content in contents:
        for number in tokens:
            for rows in batches:
                for model in models:
                    shown = Shown(content, number, counts[content])
                    cases += [Case(model, attn, shown, rows) for attn in attns]
    return sorted(cases, key=_importance)


def _importance(case: Case) -> tuple[int, int, int, int]:
    tokens = TOKENS_FIRST.index(case.shown.tokens) if case.shown.tokens in TOKENS_FIRST else 0
    often = case.shown.content == "picture"
    tier = 2 * (not often) + (case.rows > 1) + (tokens > 2) + (tokens == 1 and case.rows > 1)
    return (
        tier,
        MODELS_FIRST.index(case.model),
        CONTENTS.index(case.shown.content),
        tokens,
    )


def main_cases(cases: Sequence[Case]) -> list[Case]:
    """Of each model and attention the first: the most important one."""
    first: dict[tuple[str, str], Case] = {}
    for case in cases:
        first.setdefault((case.model, case.attn), case)
    return list(first.values())


def arms_of(
    case: Case,
    reductions: Sequence[float],
    rivals: Sequence[str],
    rivals_at: Sequence[float],
    has_smaller: bool,
    has_windows: bool,
) -> list[Arm]:
    """The arms of a case: ours at every reduction, rivals at some; pictures alone can be made smaller, and
    windows alone be run together."""
    arms = [Arm(OURS, r) for r in reductions]
    for name in rivals:
        if name == SMALLER_MODEL:
            arms += [Arm(name, 0.0)] if has_smaller else []
        elif name == WINDOWS:
            arms += [Arm(name, 0.0)] if has_windows else []
        elif name == WINDOWS_MERGING and not has_windows:
            continue
        elif name != SMALLER_PICTURE or case.shown.content == "picture":
            arms += [Arm(name, r) for r in rivals_at]
    return arms
