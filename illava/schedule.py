"""A plan settled for one model: units removed per layer and segment. Needs no tensor and no model.

Every count on this page is in merge units of the encoder, which in most families become one visual
token each, so that both stages count the same thing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from illava.errors import PlanError
from illava.plan import (
    BIPARTITE_DISTANCE_PENALTY,
    BIPARTITE_SHARE,
    DEFAULT_REDUCTION,
    INPUT,
    LLM_BIPARTITE,
    OUTPUT,
    PAPER_SHARE,
    VIT_BIPARTITE,
    Plan,
    name_of,
)


@dataclass(frozen=True)
class SegmentSchedule:
    """What happens to one picture or video.

    Attributes:
        frames: frames the encoder attends over one by one (1 for a picture).
        tokens: visual tokens before any merge.
        vit, llm: `(layer, tokens in, tokens out)` per merging layer, over all frames.
    """

    frames: int
    tokens: int
    vit: tuple[tuple[int, int, int], ...]
    llm: tuple[tuple[int, int, int], ...]

    @property
    def encoder_tokens(self) -> int:
        """Visual tokens that leave the encoder."""
        return self.vit[-1][2] if self.vit else self.tokens

    @property
    def final_tokens(self) -> int:
        """Visual tokens after the last merge."""
        return self.llm[-1][2] if self.llm else self.encoder_tokens

    @property
    def reduction(self) -> float:
        """Share of the visual tokens gone after the last merge."""
        return 1 - self.final_tokens / self.tokens


@dataclass(frozen=True)
class ModelPlan:
    """A plan settled for one model.

    Attributes:
        settings: the plan as asked for; what is `None` there is settled here.
        vit_layers, llm_layers: the layers that merge, ascending. The encoder's depth stands for its
            output, -1 for the language model's input.
        vit_depth, llm_depth: blocks and layers of the model.
        merge_size: patches along one side of a merge unit.
        encoder_share, proportional, distance_penalty: as of `illava.Plan`.
        scored_at: for each merging decoder layer the one whose attention ranks the tokens: itself, or
            where it has none (linear attention) the nearest before it that has. Empty where no attention
            ranks them.
    """

    settings: Plan
    vit_layers: tuple[int, ...]
    llm_layers: tuple[int, ...]
    vit_depth: int
    llm_depth: int
    merge_size: int
    encoder_share: float
    proportional: bool
    distance_penalty: float
    scored_at: Mapping[int, int] = field(default_factory=dict)

    @property
    def removes_nothing(self) -> bool:
        """Whether no picture of any size would lose a token."""
        return not (self.vit_layers or self.llm_layers) or self.reduction == 0

    @property
    def reduction(self) -> float | None:
        """The total reduction asked for; `None` if the budget is a ratio or a count per layer."""
        s = self.settings
        if s.budget != "reduction":
            return None
        return DEFAULT_REDUCTION if s.reduction is None else s.reduction

    def vit_removed(self, frame_tokens: int) -> tuple[int, ...]:
        """Tokens each merging encoder block removes from a frame of `frame_tokens`.

        With a total reduction this is the R_v of the paper's section 3.2.1, the same in every block but
        for a token where the total does not divide by them. A frame too small for the plan loses
        less, never its last token.
        """
        s, layers = self.settings, self.vit_layers
        if not layers:
            return ()
        if s.budget == "keep ratio":
            return _by_ratio(frame_tokens, s.vit_keep_ratio, len(layers))
        if s.budget == "shares":
            return _by_share(frame_tokens, frame_tokens, s.vit_shares)
        if s.budget == "tokens removed":
            return _equally(s.vit_tokens_removed or 0, frame_tokens, len(layers))
        share = self.encoder_share if self.llm_layers else 1.0
        return _spread(share * (self.reduction or 0) * frame_tokens, frame_tokens, len(layers))

    def llm_removed(self, tokens: int, alive_tokens: int) -> tuple[int, ...]:
        """Tokens each merging decoder layer removes from a picture or video: R_t, spread as R_v is.

        Args:
            tokens: its visual tokens before any merge.
            alive_tokens: those the encoder left.
        """
        s, layers = self.settings, self.llm_layers
        if not layers or not alive_tokens:
            return (0,) * len(layers)
        if s.budget == "keep ratio":
            return _by_ratio(alive_tokens, s.llm_keep_ratio, len(layers))
        if s.budget == "shares":
            return _by_share(tokens, alive_tokens, s.llm_shares)
        if s.budget == "tokens removed":
            return _equally(s.llm_tokens_removed or 0, alive_tokens, len(layers))
        removed_before = tokens - alive_tokens
        return _spread((self.reduction or 0) * tokens - removed_before, alive_tokens, len(layers))

    def segment(self, frames: int, frame_tokens: int) -> SegmentSchedule:
        """Layer by layer for one picture (`frames=1`) or video."""
        tokens = alive = frames * frame_tokens
        vit, llm = [], []
        for layer, removed in zip(self.vit_layers, self.vit_removed(frame_tokens), strict=True):
            vit.append((layer, alive, alive := alive - frames * removed))
        for layer, removed in zip(self.llm_layers, self.llm_removed(tokens, alive), strict=True):
            llm.append((layer, alive, alive := alive - removed))
        return SegmentSchedule(frames, tokens, tuple(vit), tuple(llm))

    def schedule(self, grids: Iterable[Sequence[int]]) -> list[SegmentSchedule]:
        """Layer by layer for pictures and videos of given sizes.

        Args:
            grids: `(frames, height, width)` each, in patches, as a processor's `image_grid_thw`.

        Raises:
            PlanError: a grid that is not made of whole merge units.
        """
        result = []
        for frames, height, width in ((int(t), int(h), int(w)) for t, h, w in grids):
            if height % self.merge_size or width % self.merge_size or min(frames, height, width) < 1:
                raise PlanError(
                    f"grid {(frames, height, width)} is not made of whole merge units of "
                    f"{self.merge_size} x {self.merge_size} patches; give (frames, height, width) in "
                    "patches, as in the processor's image_grid_thw"
                )
            result.append(self.segment(frames, height * width // self.merge_size**2))
        return result

    def __str__(self) -> str:
        s = self.settings
        budget = {
            "reduction": f"reduction {(self.reduction or 0):.1%}, encoder share {self.encoder_share:.0%}",
            "keep ratio": f"keep ratio {s.vit_keep_ratio} in the encoder, {s.llm_keep_ratio} in the LLM",
            "tokens removed": f"{s.vit_tokens_removed} tokens removed per encoder layer, "
            f"{s.llm_tokens_removed} per LLM layer",
            "shares": f"shares {list(s.vit_shares or ())} left in the encoder, "
            f"{list(s.llm_shares or ())} in the LLM",
        }[s.budget]
        scores = "".join(f", {layer} scored at {at}" for layer, at in self.scored_at.items() if layer != at)
        encoder = f" ({s.vit_merge} in the encoder)" if s.vit_merge else ""
        how = f", {self.distance_penalty} less alike where apart" if self.distance_penalty else ""
        if not all(s.by_likeness):
            how += f", score {'attention' if s.score is None else name_of(s.score)}"
        return (
            f"encoder blocks {list(self.vit_layers)} of {self.vit_depth}, decoder layers "
            f"{list(self.llm_layers)} of {self.llm_depth}{scores}; {budget}; {name_of(s.merge)}{encoder}{how}"
        )


def resolve(
    plan: Plan,
    *,
    vit_ranked: tuple[int, ...],
    llm_ranked: tuple[int, ...],
    vit_depth: int,
    llm_depth: int,
    merge_size: int,
    scoring_layers: Collection[int] | None = None,
    weighable: bool = True,
) -> ModelPlan:
    """Settle what a plan leaves open for one model.

    Args:
        plan: as asked for.
        vit_ranked, llm_ranked: layers that merge by attention where the plan names none.
        vit_depth, llm_depth: how many layers there are to choose from.
        merge_size: patches along one side of a merge unit.
        scoring_layers: decoder layers with softmax attention; `None` for all.
        weighable: whether the encoder's attention can be told what its tokens stand for.

    Raises:
        PlanError: layers out of the model's range, a decoder layer with no softmax attention at or
            before it, or layers whose budget is not said.
    """
    settled: list[tuple[int, ...]] = []
    vit_alike, llm_alike = plan.by_likeness
    vit_own = scale_layers(VIT_BIPARTITE, 1, vit_depth) if vit_alike else vit_ranked
    llm_own = scale_layers(LLM_BIPARTITE, 1, llm_depth) if llm_alike else llm_ranked
    for stage, layers, own, depth in (
        ("vit", plan.vit_layers, vit_own, vit_depth),
        ("llm", plan.llm_layers, llm_own, llm_depth),
    ):
        budgets = ("keep ratio", "tokens removed", "shares")
        key = f"{stage}_{plan.budget.replace(' ', '_')}" if plan.budget in budgets else None
        if key is not None and getattr(plan, key) is None:
            if layers:
                raise PlanError(
                    f"{stage}_layers={layers} merge, but {key} does not say how much; give {key}, or "
                    f"{stage}_layers=() to leave that stage alone"
                )
            layers = ()
        layers = own if layers is None else layers
        beyond = [layer for layer in layers if layer not in (OUTPUT, INPUT) and layer >= depth]
        if beyond:
            raise PlanError(
                f"{stage}_layers={layers}: this model has {depth} {stage} layers, counted from 0, so "
                f"{beyond} are out of range; choose layers up to {depth - 1}"
            )
        settled.append(tuple(sorted({_layer_at(x, depth) for x in layers})))
        if len(settled[-1]) < len(layers) and plan.budget != "reduction":
            raise PlanError(
                f"{stage}_layers={layers}: of this model's {depth} {stage} layers these are only "
                f"{settled[-1]}, and {key} is said of each; give layers that differ"
            )
    _check_ends(plan, settled[0], settled[1], vit_depth)
    scored_at = {}
    for layer in () if llm_alike else settled[1]:
        if layer < 0:
            continue
        before = [
            at for at in (range(llm_depth) if scoring_layers is None else scoring_layers) if at <= layer
        ]
        if not before:
            raise PlanError(
                f"llm_layers={settled[1]}: decoder layer {layer} comes before the first with softmax "
                f"attention ({min(scoring_layers or ())}), and linear attention ranks no tokens; choose "
                "that layer or a later one"
            )
        scored_at[layer] = max(before)
    share, penalty = plan.encoder_share, plan.distance_penalty
    if share is None:
        share = BIPARTITE_SHARE if vit_alike else PAPER_SHARE
    if penalty is None:
        penalty = BIPARTITE_DISTANCE_PENALTY if vit_alike or llm_alike else 0.0
    return ModelPlan(
        plan, settled[0], settled[1], vit_depth, llm_depth, merge_size, share,
        proportional=vit_alike and weighable if plan.proportional is None else plan.proportional,
        distance_penalty=penalty, scored_at=scored_at,
    )  # fmt: skip


def scale_layers(layers: Sequence[float], of_depth: int, depth: int) -> tuple[int, ...]:
    """The same relative places in a model of another depth, e.g. the paper's 2, 8, 14 of 28."""
    return tuple(sorted({min(depth - 1, round(layer * depth / of_depth)) for layer in layers}))


def _layer_at(place: int | float | str, depth: int) -> int:
    if isinstance(place, str):
        return {OUTPUT: depth, INPUT: -1}[place]
    return place if isinstance(place, int) else scale_layers([place], 1, depth)[0]


def nearest_layers(layers: Sequence[int], among: Collection[int]) -> tuple[int, ...]:
    """The nearest of `among` to each layer, the earlier of two."""
    return tuple(sorted({min(sorted(among), key=lambda at: abs(at - layer)) for layer in layers}))


def _check_ends(plan: Plan, vit: tuple[int, ...], llm: tuple[int, ...], vit_depth: int) -> None:
    """Whether what merges at the encoder's output and the language model's input can be ranked there."""
    if {vit_depth - 1, vit_depth} <= set(vit):
        raise PlanError(
            f"vit_layers={plan.vit_layers}: a merge in block {vit_depth - 1} and one of what leaves the "
            "encoder would both read that block's attention; leave one of them out"
        )
    by_attention = plan.merge != "bipartite" and (not callable(plan.score) or plan.merge == "recycle")
    if -1 in llm and by_attention:
        raise PlanError(
            f"llm_layers={plan.llm_layers}: nothing attends before the first decoder layer, so "
            f"score={name_of(plan.score or 'attention')!r} with merge={name_of(plan.merge)!r} cannot choose "
            "there; give a function as score, and 'prune' or a function as merge, or 'bipartite' as merge"
        )


def _spread(total: float, alive: int, layers: int) -> tuple[int, ...]:
    """A total divided as evenly as whole numbers can, e.g. 13 of five layers: 3, 2, 3, 2, 3."""
    whole = min(max(0, round(total)), alive - 1)
    gone = [round(whole * layer / layers) for layer in range(layers + 1)]
    return tuple(after - before for before, after in pairwise(gone))


def _equally(per_layer: int, alive: int, layers: int) -> tuple[int, ...]:
    return (min(per_layer, (alive - 1) // layers),) * layers


def _by_share(tokens: int, alive: int, shares: tuple[float, ...] | None) -> tuple[int, ...]:
    removed = []
    for share in shares or ():
        kept = min(alive, max(1, round(share * tokens)))
        removed.append(alive - kept)
        alive = kept
    return tuple(removed)


def _by_ratio(tokens: int, keep_ratio: float | None, layers: int) -> tuple[int, ...]:
    removed = []
    for _ in range(layers):
        kept = max(1, round((1.0 if keep_ratio is None else keep_ratio) * tokens))
        removed.append(tokens - kept)
        tokens = kept
    return tuple(removed)
