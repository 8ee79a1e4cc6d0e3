"""What a user asks for: layers, a budget, and how to rank and merge. Needs no tensor and no model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, Literal

from illava.errors import PlanError

DEFAULT_REDUCTION = 2 / 3
# Where a function may stand in place of a name, and what of.
_FUNCTIONS = {
    "score": ", or a function score(candidates)",
    "merge": ", or a function merge(candidates, kept)",
}
# The paper's merging layers and the depth they are of (section 4.1, Qwen2.5-VL-7B).
VIT_PAPER = (5, 9, 13), 32
LLM_PAPER = (2, 8, 14), 28
# Where `Plan.bipartite()` merges, as shares of the depth.
VIT_BIPARTITE = (1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4)
LLM_BIPARTITE = (1 / 4, 1 / 2)

# Places for merging that are no layers: behind the encoder's last block, before the first decoder layer.
OUTPUT, INPUT = "output", "input"

_CHOICES = {
    "score": ("attention", "lse"),
    "merge": ("recycle", "prune", "linear", "bipartite"),
    "vit_merge": (None, "bipartite", "recycle", "prune", "linear"),
    "queries": ("text", "all", "visual", "last"),
    "window_score": ("window", "picture"),
}


@dataclass(frozen=True)
class Plan:
    """What is asked for. A budget is said in one of four ways, never in two at once.

    Attributes:
        vit_layers: encoder blocks that merge, counted from 0; a number between 0 and 1 is a place, the
            block at that share of the encoder's depth. `None` for the family's default, `()` for none.
            `"output"` merges what the last block puts out, ranked by its attention.
        llm_layers: decoder layers that merge, likewise. `"input"` merges before the first layer, where
            nothing has attended yet: with a function as `score`, or with `merge="bipartite"`.
        reduction: share of the visual tokens gone after the last merge, in [0, 1); the first way.
            `None` means 2/3 unless another budget is given. Paper: 0.667, 0.778, 0.889.
        encoder_share: share of the removed tokens that the encoder removes, in [0, 1]. Paper: 0.4.
        vit_keep_ratio, llm_keep_ratio: share each merging layer keeps, in (0, 1]; the second way
            (the paper's release).
        vit_tokens_removed, llm_tokens_removed: tokens each merging layer removes from each frame or
            picture; the third way (the paper's first version).
        vit_shares, llm_shares: share of a picture's visual tokens that each merging layer leaves, from
            the lowest up, in (0, 1] and never rising; the fourth way, and the exact one.
        recycled: share of the kept tokens that take in dropped ones, in (0, 1].
        members: size of such a group, the recycled token included (paper: M = 5).
        score: `"attention"` received (paper, eq. 3), or `"lse"`, the query statistic that the
            paper's release reads, or a function of `illava.Candidates`.
        merge: `"recycle"` (paper, section 3.2.2), `"prune"`, `"linear"` (first version), or `"bipartite"`,
            which makes one of tokens whose features are most alike (ToMe's bipartite soft matching,
            arXiv 2210.09461, section 3; each stage begins with tokens that weigh one) whatever their
            `score`; or a function of `illava.Candidates` and of the places of those kept.
        vit_merge: the encoder's rule, where it is another of these than `merge`.
        queries: whose attention counts in the language model: the later `"text"`, `"all"`,
            `"visual"` tokens, or the `"last"` token. With `"text"`, a picture after which no text
            comes is ranked by all its queries.
        window_score: in blocks that attend in windows, rank tokens by the attention they receive
            within their `"window"`, or by what they would receive in the whole `"picture"`.
        proportional: let encoder tokens that stand for several attract as much attention as these would
            (ToMe, arXiv 2210.09461, eq. 1), in merging blocks, where the rule is a function or
            `"bipartite"`.
        distance_penalty: where the rule is `"bipartite"`, how much less alike (in cosine) two tokens count
            that are no neighbours on their picture's grid, in [0, 2]. A token's neighbours are the eight
            around it, and those at its place of the frame or tile before and after; in a language model
            whose family packs visual tokens otherwise, those next to it. At 0 what is alike merges wherever
            it is, at 2 neighbours merge before all others.

    Raises:
        PlanError: a value out of range, or two budgets at once.
    """

    vit_layers: tuple[int | float | Literal["output"], ...] | None = None
    llm_layers: tuple[int | float | Literal["input"], ...] | None = None
    reduction: float | None = None
    encoder_share: float = 0.4
    vit_keep_ratio: float | None = None
    llm_keep_ratio: float | None = None
    vit_tokens_removed: int | None = None
    llm_tokens_removed: int | None = None
    vit_shares: tuple[float, ...] | None = None
    llm_shares: tuple[float, ...] | None = None
    recycled: float = 0.05
    members: int = 5
    score: Literal["attention", "lse"] | Callable[..., Any] = "attention"
    merge: Literal["recycle", "prune", "linear", "bipartite"] | Callable[..., Any] = "recycle"
    vit_merge: Literal["bipartite", "recycle", "prune", "linear"] | None = None
    queries: Literal["text", "all", "visual", "last"] = "text"
    window_score: Literal["window", "picture"] = "window"
    proportional: bool = False
    distance_penalty: float = 0.0

    def __post_init__(self) -> None:
        for stage, place in (("vit", OUTPUT), ("llm", INPUT)):
            layers = _layer_tuple(f"{stage}_layers", getattr(self, f"{stage}_layers"), place)
            object.__setattr__(self, f"{stage}_layers", layers)
            shares = _share_tuple(f"{stage}_shares", getattr(self, f"{stage}_shares"), layers)
            object.__setattr__(self, f"{stage}_shares", shares)
        _check_range("reduction", self.reduction, 0, 1, upper_open=True, hint="for example 0.667")
        for name in ("encoder_share", "recycled", "members", "distance_penalty"):
            if getattr(self, name) is None:
                raise PlanError(f"{name}=None says nothing; leave it out for the default")
        _check_range("encoder_share", self.encoder_share, 0, 1)
        for name in ("vit_keep_ratio", "llm_keep_ratio"):
            _check_range(
                name, getattr(self, name), 0, 1, lower_open=True,
                hint="a layer that keeps nothing would leave a picture without a token",
            )  # fmt: skip
        for name in ("vit_tokens_removed", "llm_tokens_removed"):
            _check_count(name, getattr(self, name), minimum=0)
        if not isinstance(self.proportional, bool):
            raise PlanError(f"proportional={self.proportional!r} is neither True nor False; give one of them")
        _check_range("recycled", self.recycled, 0, 1, lower_open=True)
        self._check_distance_penalty()
        _check_count("members", self.members, minimum=1)
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

    def _check_distance_penalty(self) -> None:
        _check_range("distance_penalty", self.distance_penalty, 0, 2, hint="a cosine ends at 1 and -1")
        if self.distance_penalty and "bipartite" not in (self.merge, self.vit_merge):
            raise PlanError(
                f"distance_penalty={self.distance_penalty} is of tokens merged by likeness, and "
                f'merge={self.merge!r} does not do so; give merge="bipartite" or vit_merge="bipartite", too'
            )

    @classmethod
    def paper(cls, reduction: float = DEFAULT_REDUCTION, **changes: Any) -> Plan:
        """The ICLR paper's plan for Qwen2.5-VL-7B (section 4.1): encoder 5, 9, 13, LLM 2, 8, 14."""
        return replace(cls(VIT_PAPER[0], LLM_PAPER[0], reduction), **changes)

    @classmethod
    def release(cls, **changes: Any) -> Plan:
        """The paper's code release: encoder 5-8 keeping 0.85 each, LLM 19-21-23-25 keeping 0.9."""
        plan = cls((5, 6, 7, 8), (19, 21, 23, 25), vit_keep_ratio=0.85, llm_keep_ratio=0.9, score="lse")
        return replace(plan, **changes)

    @classmethod
    def first_version(cls, **changes: Any) -> Plan:
        """The paper's first version: 92 at encoder 3-6 and 108 at LLM layer 2, merged linearly."""
        plan = cls((3, 4, 5, 6), (2,), vit_tokens_removed=92, llm_tokens_removed=108,
                   merge="linear", queries="visual")  # fmt: skip
        return replace(plan, **changes)

    @classmethod
    def bipartite(cls, reduction: float = DEFAULT_REDUCTION, **changes: Any) -> Plan:
        """What keeps most answers of this project's own small models (docs/accuracy.md), for any family.

        Tokens that are most alike become one, neighbours before others, in five places of the encoder's
        middle and two of the language model's first half; the encoder removes 60 % of what goes. Published
        code, whose encoder computes attention by itself, needs `proportional=False` besides.
        """
        plan = cls(VIT_BIPARTITE, LLM_BIPARTITE, reduction, encoder_share=0.6,
                   merge="bipartite", proportional=True, distance_penalty=0.2)  # fmt: skip
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


def name_of(choice: Any) -> str:
    """A score or rule as it is called."""
    return choice if isinstance(choice, str) else getattr(choice, "__name__", repr(choice))


def _layer_tuple(name: str, layers: Any, place: str) -> tuple[Any, ...] | None:
    if layers is None:
        return None
    if isinstance(layers, int):
        raise PlanError(f"{name}={layers} is a single number; give a tuple, {name}=({layers},)")
    if not isinstance(layers, Iterable) or isinstance(layers, (str, bytes, Mapping)):
        raise PlanError(f"{name}={layers!r} is not a tuple of layers; give for example {name}=(2, 8)")
    layers = tuple(layers)
    wrong = [x for x in layers if x != place and not _is_layer(x)]
    if wrong:
        raise PlanError(
            f"{name}={layers}: {wrong} are not layer numbers; layers count from 0 upwards, a number between "
            f"0 and 1 is a share of the depth (0.25), and {place!r} is the only place that is no layer"
        )
    if len(set(layers)) < len(layers):
        raise PlanError(f"{name}={layers} names a layer twice; each layer merges once")
    return layers


def _is_layer(layer: Any) -> bool:
    if isinstance(layer, float):
        return 0 < layer < 1
    return isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0


def _share_tuple(name: str, shares: Any, layers: tuple[Any, ...] | None) -> tuple[float, ...] | None:
    if shares is None:
        return None
    if not isinstance(shares, Iterable) or isinstance(shares, (str, bytes, Mapping)):
        raise PlanError(f"{name}={shares!r} is not a tuple of shares; give one for each merging layer")
    shares = tuple(shares)
    for share in shares:
        if share is None:
            raise PlanError(f"{name}={shares}: None is no share; give one for each merging layer")
        _check_range(name, share, 0, 1, lower_open=True, hint="a picture keeps at least one token")
    if any(after > before for before, after in zip(shares, shares[1:], strict=False)):
        raise PlanError(f"{name}={shares} rises; each is the share of all tokens left, not of the last")
    if layers is None or len(layers) != len(shares):
        raise PlanError(
            f"{name} has {len(shares)} shares for {name[:3]}_layers={layers}; give one for each merging "
            "layer, the first for the lowest"
        )
    return shares


def _check_range(
    name: str,
    value: float | None,
    low: float,
    high: float,
    *,
    lower_open: bool = False,
    upper_open: bool = False,
    hint: str = "",
) -> None:
    if value is None:
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    too_low = not number or value < low or (lower_open and value == low) or value != value
    too_high = not number or value > high or (upper_open and value == high)
    if too_low or too_high:
        interval = f"{'(' if lower_open else '['}{low}, {high}{')' if upper_open else ']'}"
        raise PlanError(f"{name}={value!r} is outside {interval}{'; ' + hint if hint else ''}")


def _check_count(name: str, value: Any, *, minimum: int) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise PlanError(f"{name}={value!r} is not a whole number of at least {minimum}")


PLAN_FIELDS = frozenset(f.name for f in fields(Plan))
