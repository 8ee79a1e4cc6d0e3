"""What a user asks for: layers, a budget, and how to rank and merge. Needs no tensor and no model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, Literal

from illava.errors import PlanError
from illava.plan_values import check_count, check_range, layer_tuple, share_tuple

DEFAULT_REDUCTION = 2 / 3
# Where a function may stand in place of a name, and what of.
_FUNCTIONS = {
    "score": ", or a function score(candidates)",
    "merge": ", or a function merge(candidates, kept)",
}
# The paper's merging layers and the depth they are of (section 4.1, Qwen2.5-VL-7B).
VIT_PAPER = (5, 9, 13), 32
LLM_PAPER = (2, 8, 14), 28
# Where tokens merge by likeness unless layers are named, as shares of the depth; chosen on the validation
# split of docs/accuracy.md, as are the shares and the penalty below.
VIT_BIPARTITE = (1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4)
LLM_BIPARTITE = (1 / 4, 1 / 2)
# Share of the removed tokens that the encoder removes, where it merges by likeness and by attention (paper).
BIPARTITE_SHARE, PAPER_SHARE = 0.6, 0.4
BIPARTITE_DISTANCE_PENALTY = 0.2

# Places for merging that are no layers: behind the encoder's last block, before the first decoder layer.
OUTPUT, INPUT = "output", "input"

_CHOICES = {
    "score": (None, "attention", "lse"),
    "merge": ("bipartite", "recycle", "prune", "linear"),
    "vit_merge": (None, "bipartite", "recycle", "prune", "linear"),
    "queries": ("text", "all", "visual", "last"),
    "window_score": ("window", "picture"),
}


@dataclass(frozen=True)
class Plan:
    """What is asked for. A budget is said in one of four ways, never in two at once.

    `merge` decides what `None` stands for elsewhere; so `Plan(merge="recycle")` is the paper's rule at the
    layers and share that suit it.

    Attributes:
        vit_layers: encoder blocks that merge, counted from 0; a number between 0 and 1 is a place, the
            block at that share of the encoder's depth. `()` for none. `"output"` merges what the last
            block puts out. `None` for the rule's own: five blocks from a quarter to three quarters of the
            depth by likeness, by attention the family's (`illava models`).
        llm_layers: decoder layers that merge, likewise: at a quarter and half of the depth by likeness.
            `"input"` merges before the first layer, where nothing has attended yet: by likeness, or with a
            function as `score`.
        reduction: share of the visual tokens gone after the last merge, in [0, 1); the first way.
            `None` means 2/3 unless another budget is given. Paper: 0.667, 0.778, 0.889.
        encoder_share: share of the removed tokens that the encoder removes, in [0, 1]. `None` for 0.6 where
            it merges by likeness, else for the paper's 0.4.
        vit_keep_ratio, llm_keep_ratio: share each merging layer keeps, in (0, 1]; the second way
            (the paper's release).
        vit_tokens_removed, llm_tokens_removed: tokens each merging layer removes from each frame or
            picture; the third way (the paper's first version).
        vit_shares, llm_shares: share of a picture's visual tokens that each merging layer leaves, from
            the lowest up, in (0, 1] and never rising; the fourth way, exact at every layer.
        recycled: share of the kept tokens that take in dropped ones, in (0, 1].
        members: size of such a group, the recycled token included (paper: M = 5).
        score: how tokens are ranked, by every rule but `"bipartite"`: `"attention"` received (paper, eq. 3;
            what `None` stands for), or `"lse"`, the query statistic that the paper's release reads, or a
            function of `illava.Candidates`.
        merge: `"bipartite"`, which makes one of tokens whose features are most alike (ToMe's bipartite soft
            matching, arXiv 2210.09461, section 3; each stage begins with tokens that weigh one), or a rule
            by attention: `"recycle"` (paper, section 3.2.2), `"prune"`, `"linear"` (first version), or a
            function of `illava.Candidates` and of the places of those kept. docs/accuracy.md compares them.
        vit_merge: the encoder's rule, where it is another of these than `merge`.
        queries: whose attention counts in the language model: the later `"text"`, `"all"`,
            `"visual"` tokens, or the `"last"` token. With `"text"`, a picture after which no text
            comes is ranked by all its queries.
        window_score: in blocks that attend in windows, rank tokens by the attention they receive
            within their `"window"`, or by what they would receive in the whole `"picture"`.
        proportional: let encoder tokens that stand for several attract as much attention as these would
            (ToMe, arXiv 2210.09461, eq. 1), in merging blocks, where the rule is a function or
            `"bipartite"`. `None`: where the encoder merges by likeness and can be told so.
        distance_penalty: where the rule is `"bipartite"`, how much less alike (in cosine) two tokens count
            that are no neighbours on their picture's grid, in [0, 2]; `None` for 0.2. A token's neighbours
            are the eight around it, and those at its place of the frame or tile before and after; in a
            language model whose family packs visual tokens otherwise, those next to it. At 0 what is alike
            merges wherever it is, at 2 neighbours merge before all others.

    Raises:
        PlanError: a value out of range, two budgets at once, or what the rule does not read.
    """

    vit_layers: tuple[int | float | Literal["output"], ...] | None = None
    llm_layers: tuple[int | float | Literal["input"], ...] | None = None
    reduction: float | None = None
    encoder_share: float | None = None
    vit_keep_ratio: float | None = None
    llm_keep_ratio: float | None = None
    vit_tokens_removed: int | None = None
    llm_tokens_removed: int | None = None
    vit_shares: tuple[float, ...] | None = None
    llm_shares: tuple[float, ...] | None = None
    recycled: float = 0.05
    members: int = 5
    score: Literal["attention", "lse"] | Callable[..., Any] | None = None
    merge: Literal["bipartite", "recycle", "prune", "linear"] | Callable[..., Any] = "bipartite"
    vit_merge: Literal["bipartite", "recycle", "prune", "linear"] | None = None
    queries: Literal["text", "all", "visual", "last"] = "text"
    window_score: Literal["window", "picture"] = "window"
    proportional: bool | None = None
    distance_penalty: float | None = None

    def __post_init__(self) -> None:
        for stage, place in (("vit", OUTPUT), ("llm", INPUT)):
            layers = layer_tuple(f"{stage}_layers", getattr(self, f"{stage}_layers"), place)
            object.__setattr__(self, f"{stage}_layers", layers)
            shares = share_tuple(f"{stage}_shares", getattr(self, f"{stage}_shares"), layers)
            object.__setattr__(self, f"{stage}_shares", shares)
        check_range("reduction", self.reduction, 0, 1, upper_open=True, hint="for example 0.667")
        for name in ("recycled", "members"):
            if getattr(self, name) is None:
                raise PlanError(f"{name}=None says nothing; leave it out for the default")
        check_range("encoder_share", self.encoder_share, 0, 1)
        for name in ("vit_keep_ratio", "llm_keep_ratio"):
            check_range(
                name, getattr(self, name), 0, 1, lower_open=True,
                hint="a layer that keeps nothing would leave a picture without a token",
            )  # fmt: skip
        for name in ("vit_tokens_removed", "llm_tokens_removed"):
            check_count(name, getattr(self, name), minimum=0)
        if self.proportional is not None and not isinstance(self.proportional, bool):
            raise PlanError(f"proportional={self.proportional!r} is neither True nor False; give one of them")
        check_range("recycled", self.recycled, 0, 1, lower_open=True)
        check_range("distance_penalty", self.distance_penalty, 0, 2, hint="a cosine ends at 1 and -1")
        check_count("members", self.members, minimum=1)
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices and not (name in _FUNCTIONS and callable(value)):
                raise PlanError(
                    f"{name}={getattr(self, name)!r} is not known; choose one of "
                    f"{', '.join(map(repr, choices))}{_FUNCTIONS.get(name, '')}"
                )
        said = [name for name, keys in _BUDGETS.items() if any(getattr(self, k) is not None for k in keys)]
        if len(said) > 1:
            given = [k for name in said for k in _BUDGETS[name] if getattr(self, k) is not None]
            raise PlanError(
                f"two budgets at once: {', '.join(f'{k}={getattr(self, k)!r}' for k in given)}; "
                f"give only {' or only '.join(said)}"
            )
        self._check_read()

    def _check_read(self) -> None:
        """Whether a rule reads what is said: by likeness nothing is ranked, by attention nothing compared."""
        if self.distance_penalty and not any(self.by_likeness):
            raise PlanError(
                f"distance_penalty={self.distance_penalty} is of tokens merged by likeness, and "
                f'merge={self.merge!r} does not do so; give merge="bipartite" or vit_merge="bipartite", too'
            )
        if self.proportional and self.vit_rule != "bipartite" and not callable(self.vit_rule):
            raise PlanError(
                f"proportional=True is of encoder tokens that stand for several; {self.vit_rule!r} counts "
                'none: give merge="bipartite", vit_merge="bipartite" or a function as merge, or leave it out'
            )
        said = [name for name in _OF_RANKING if getattr(self, name) != getattr(type(self), name)]
        if said and all(self.by_likeness):
            values = {name: getattr(self, name) for name in said}
            given = ", ".join(f"{n}={name_of(x) if callable(x) else repr(x)}" for n, x in values.items())
            raise PlanError(
                f'{given} is of tokens ranked and merged by attention, and merge="bipartite", which is the '
                'default, ranks none; give merge="recycle" (the paper\'s rule) or another, too'
            )

    @classmethod
    def paper(cls, reduction: float = DEFAULT_REDUCTION, **changes: Any) -> Plan:
        """The ICLR paper's plan for Qwen2.5-VL-7B (section 4.1): encoder 5, 9, 13, LLM 2, 8, 14."""
        plan = cls(VIT_PAPER[0], LLM_PAPER[0], reduction, PAPER_SHARE, merge="recycle")
        return replace(plan, **changes)

    @classmethod
    def release(cls, **changes: Any) -> Plan:
        """The paper's code release: encoder 5-8 keeping 0.85 each, LLM 19-21-23-25 keeping 0.9."""
        plan = cls((5, 6, 7, 8), (19, 21, 23, 25), vit_keep_ratio=0.85, llm_keep_ratio=0.9,
                   score="lse", merge="recycle")  # fmt: skip
        return replace(plan, **changes)

    @classmethod
    def first_version(cls, **changes: Any) -> Plan:
        """The paper's first version: 92 at encoder 3-6 and 108 at LLM layer 2, merged linearly."""
        plan = cls((3, 4, 5, 6), (2,), vit_tokens_removed=92, llm_tokens_removed=108,
                   merge="linear", queries="visual")  # fmt: skip
        return replace(plan, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values; `Plan.from_dict` reads it back.

        Raises:
            PlanError: a score or rule that is a function.
        """
        for name in _FUNCTIONS:
            choice = getattr(self, name)
            if callable(choice):
                raise PlanError(f"{name}={name_of(choice)} is a function, which has no plain value")
        return asdict(self)

    def to_json(self) -> str:
        """Everything as JSON; `Plan.from_json` reads it back."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, values: Any) -> Plan:
        """A plan from plain values that somebody else wrote; what is left out has its default.

        Raises:
            PlanError: not a dict, a setting that does not exist, or a value out of range.
        """
        if not isinstance(values, Mapping):
            raise PlanError(
                f"a plan is a dict of settings, not {values!r}; give for example {{'reduction': 0.5}}"
            )
        for name in values:
            if name not in PLAN_FIELDS:
                near = get_close_matches(str(name), PLAN_FIELDS, n=1)
                remedy = (
                    f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(PLAN_FIELDS))}"
                )
                raise PlanError(f"{name!r} is not a setting of a plan; {remedy}")
        return cls(**values)

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        """A plan from JSON, taken for data and nothing else.

        Raises:
            PlanError: not JSON, a name twice, NaN or infinity, or whatever `from_dict` refuses.
        """

        def refuse(constant: str) -> None:
            raise PlanError(f"{constant} in a plan's JSON is no number; write one within its range")

        def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            names = [name for name, _ in pairs]
            if twice := [name for name in names if names.count(name) > 1]:
                raise PlanError(f"a plan's JSON says {twice[0]!r} twice; say it once")
            return dict(pairs)

        try:
            values = json.loads(text, parse_constant=refuse, object_pairs_hook=once)
        except PlanError:
            raise
        except (ValueError, TypeError, RecursionError) as error:
            raise PlanError(
                f"a plan's JSON cannot be read: {error}; Plan.to_json() writes one that can"
            ) from error
        return cls.from_dict(values)

    @property
    def vit_rule(self) -> Any:
        """The encoder's rule."""
        return self.merge if self.vit_merge is None else self.vit_merge

    @property
    def by_likeness(self) -> tuple[bool, bool]:
        """Whether encoder and language model merge what is alike, and rank nothing."""
        return self.vit_rule == "bipartite", self.merge == "bipartite"

    @property
    def by_function(self) -> bool:
        """Whether a function of the caller's ranks or merges."""
        return any(callable(getattr(self, name)) for name in _FUNCTIONS)

    @property
    def budget(self) -> str:
        """`"reduction"`, `"keep ratio"`, `"tokens removed"` or `"shares"`."""
        for name, keys in _BUDGETS.items():
            if any(getattr(self, key) is not None for key in keys):
                return name
        return "reduction"


_BUDGETS = {
    "reduction": ("reduction",),
    "keep ratio": ("vit_keep_ratio", "llm_keep_ratio"),
    "tokens removed": ("vit_tokens_removed", "llm_tokens_removed"),
    "shares": ("vit_shares", "llm_shares"),
}
# What only a rule that ranks tokens reads.
_OF_RANKING = ("score", "queries", "recycled", "members", "window_score")


def name_of(choice: Any) -> str:
    """A score or rule as it is called."""
    return choice if isinstance(choice, str) else getattr(choice, "__name__", repr(choice))


PLAN_FIELDS = frozenset(f.name for f in fields(Plan))
