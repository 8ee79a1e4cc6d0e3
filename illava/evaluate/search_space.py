"""Which plans a search tries, and what each of them costs in operations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import product
from typing import Any, Literal

from illava.evaluate.loading import Loaded
from illava.families import family_of
from illava.families.seams import Seams
from illava.flops import count_flops, measure
from illava.plan import LLM_BIPARTITE, OUTPUT, VIT_BIPARTITE, Plan
from illava.report import PictureRecord, Report
from illava.schedule import nearest_layers, scale_layers

# Shares of the visual tokens that the encoder alone removes, and that are gone in all, the most first.
ENCODER_REMOVES = (0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
TOTALS = (0.95, 0.889, 0.778, 0.667, 0.5, 0.3)
# Places of single merges, as shares of the depth.
_DECODER_PLACES = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2)
_ENCODER_PLACES = (1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4)

Layers = tuple[Any, ...]


@dataclass(frozen=True)
class Rule:
    """How both stages merge; fields as of `illava.Plan`."""

    merge: Literal["recycle", "bipartite"] = "bipartite"
    proportional: bool | None = None
    distance_penalty: float | None = None


# By likeness with neighbours first, as the default does; by attention; by likeness wherever it is. They cost
# the same: of those that hold the first is taken.
NEAR, RECYCLE, ALIKE = RULES = (Rule(), Rule("recycle"), Rule("bipartite", False, 0.0))


@dataclass(frozen=True)
class Candidate:
    """A plan by its parts.

    Attributes:
        vit_layers, llm_layers: where it merges.
        encoder_removes: share of the visual tokens that the encoder removes.
        reduction: share that is gone after the last merge.
        rule: how both stages merge.
    """

    vit_layers: Layers
    llm_layers: Layers
    encoder_removes: float
    reduction: float
    rule: Rule = NEAR

    @property
    def plan(self) -> Plan:
        """As `illava.patch` takes it."""
        share = None  # one stage alone removes everything
        if self.vit_layers and self.llm_layers and self.reduction:
            share = round(self.encoder_removes / self.reduction, 4)
        return Plan(self.vit_layers, self.llm_layers, self.reduction, share, **asdict(self.rule))

    @property
    def parts(self) -> tuple[Candidate, ...]:
        """Either stage alone, if both merge."""
        if not (self.vit_layers and self.llm_layers):
            return ()
        removed = self.encoder_removes
        encoder = Candidate(self.vit_layers, (), removed, removed, self.rule)
        return encoder, Candidate((), self.llm_layers, 0.0, self.reduction, self.rule)


@dataclass(frozen=True)
class Shown:
    """The prompt that costs are counted for: one picture of the data's median size.

    Attributes:
        frames, frame_tokens: of the picture or video, in visual tokens.
        text: tokens around it.
    """

    frames: int
    frame_tokens: int
    text: int

    @classmethod
    def median(cls, reports: Iterable[Report], texts: Iterable[int]) -> Shown:
        """Of reports, and of the tokens around the pictures in each prompt."""
        pictures = sorted((p for r in reports for p in r.pictures), key=lambda p: p.tokens)
        around = sorted(texts)
        return cls(*frames_of(pictures[len(pictures) // 2]), around[len(around) // 2])


def frames_of(picture: PictureRecord) -> tuple[int, int]:
    """Frames or tiles of a picture or video, and visual tokens of one; where they do not divide, as one."""
    frames = 1 if picture.tokens % picture.frames else picture.frames
    return frames, picture.tokens // frames


class Space:
    """Candidates for one model.

    Args:
        loaded: the model.
        shown: what costs are counted for.
    """

    def __init__(self, loaded: Loaded, shown: Shown) -> None:
        model = loaded.model
        self.seams: Seams = family_of(model.config.model_type, type(model).__name__).find_seams(model)
        self.shown = shown
        self._shape = measure(self.seams)

    @cached_property
    def encoder_layers(self) -> list[Layers]:
        """Sets of encoder blocks: both rules' defaults, single ones, neighbours, the output.

        Where blocks attend in windows, single ones and neighbours are of those that attend to the whole
        picture: by attention the others cannot compare tokens of different windows.
        """
        depth, full = len(self.seams.blocks), sorted(self.seams.full_attention_blocks)
        inner = [block for block in full if block < depth - 1]
        if len(full) == depth:
            inner = sorted({round(place * depth) for place in _ENCODER_PLACES})
        sets: list[Layers] = [self.seams.vit_ranked, *((block,) for block in inner)]
        sets += [pair for pair in zip(inner, inner[1:], strict=False)]
        sets.append(scale_layers(VIT_BIPARTITE, 1, depth))
        return list(dict.fromkeys([*sets, (OUTPUT,)]))

    @cached_property
    def decoder_layers(self) -> list[Layers]:
        """Sets of decoder layers: both rules' defaults, single ones, those by attention moved up.

        Where some layers attend linearly, the nearest that rank tokens stand for them, for every rule.
        """
        depth = len(self.seams.layers)
        among = self.seams.scoring_layers
        places = nearest_layers([round(place * depth) for place in _DECODER_PLACES], among)
        later = nearest_layers([min(depth - 2, layer + depth // 8) for layer in self.seams.llm_ranked], among)
        pair = nearest_layers(scale_layers(LLM_BIPARTITE, 1, depth), among)
        return list(dict.fromkeys([self.seams.llm_ranked, *((layer,) for layer in places), later, pair]))

    def encoder_only(self) -> list[list[Candidate]]:
        """For each set of blocks and rule, from the strongest to the mildest."""
        ways = product(self.encoder_layers, RULES)
        return [[Candidate(x, (), e, e, rule) for e in ENCODER_REMOVES] for x, rule in ways]

    def decoder_only(self) -> list[list[Candidate]]:
        """For each set of layers and rule, from the strongest to the mildest."""
        ways = product(self.decoder_layers, RULES)
        return [[Candidate((), x, 0.0, r, rule) for r in TOTALS] for x, rule in ways]

    def joined(self, encoder: Sequence[Candidate], decoder: Sequence[Candidate]) -> list[Candidate]:
        """Plans of both stages from plans of one, with the same rule, and these too; the cheapest first."""
        found = [
            Candidate(e.vit_layers, d.llm_layers, e.encoder_removes, d.reduction, e.rule)
            for e, d in product(encoder, decoder)
            if d.reduction > e.encoder_removes and d.rule == e.rule
        ]
        return sorted([*encoder, *decoder, *found], key=self.cost)

    def default(self, reduction: float) -> Candidate:
        """illava's default plan."""
        settled = self.seams.settle(Plan(reduction=reduction))
        removes = settled.encoder_share * reduction
        return Candidate(settled.vit_layers, settled.llm_layers, removes, reduction)

    def left(self, candidate: Candidate, pictures: Iterable[tuple[int, int]]) -> int:
        """Visual tokens left of pictures, each given as its frames and the tokens of one."""
        plan = self.seams.settle(candidate.plan)
        return sum(plan.segment(frames, tokens).final_tokens for frames, tokens in pictures)

    def cost(self, candidate: Candidate) -> float:
        """Operations of a prefill, as a share of the unpatched model's."""
        plan = self.seams.settle(candidate.plan)
        segment = plan.segment(self.shown.frames, self.shown.frame_tokens)
        unit = self._shape.unit_tokens[0]
        flops = count_flops(plan, self._shape, [(segment, unit)], [(self.shown.text, [segment])])
        return 1 / flops.speedup_bound
