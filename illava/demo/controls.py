"""What a user may set: how much to merge, where, and by which rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from illava.plan import Plan
from illava.schedule import ModelPlan

RULES = {
    "bipartite: join tokens that are most alike (default)": "bipartite",
    "recycle: the paper's, recycled tokens take in dropped ones": "recycle",
    "prune: drop the rest": "prune",
    "linear: the paper's first version": "linear",
}
SAME = "same"
VIT_RULES = {"the same as beside (default)": SAME, **{rule: rule for rule in RULES.values()}}
SCORES = {"attention received (default)": "attention", "log-sum-exp, as the paper's release": "lse"}
QUERIES = {
    "the later text (default)": "text",
    "all tokens": "all",
    "visual tokens": "visual",
    "the last token": "last",
}
WINDOWS = {"within their window (default)": "window", "over the whole picture": "picture"}
REDUCTION = 77.8  # per cent, the middle one of the paper's three


@dataclass(frozen=True)
class Controls:
    """The components that say a plan, in the order `plan_of` takes their values.

    Layers and share are set to a rule's own when it is chosen.
    """

    reduction: gr.Slider
    encoder_share: gr.Slider
    vit_layers: gr.Dropdown
    llm_layers: gr.Dropdown
    rule: gr.Dropdown
    vit_rule: gr.Dropdown
    score: gr.Dropdown
    queries: gr.Dropdown
    windows: gr.Dropdown

    @property
    def follow(self) -> list[Any]:
        """Those that a rule sets, in the order of `own_of`."""
        return [self.encoder_share, self.vit_layers, self.llm_layers, self.score, self.queries, self.windows]

    @property
    def all(self) -> list[Any]:
        """All of them."""
        return list(vars(self).values())


def draw_controls(default: ModelPlan) -> Controls:
    """The components, set to a model's default plan, which ranks no tokens."""
    reduction = gr.Slider(
        0, 95, REDUCTION, step=0.1, label="reduction, %", elem_id="reduction",
        info="share of the visual tokens gone after the last merge; the paper's: 66.7, 77.8, 88.9",
    )  # fmt: skip
    share = gr.Slider(
        0, 100, 100 * default.encoder_share, step=1, label="encoder share, %",
        elem_id="encoder-share",
        info="how much of that the vision encoder removes; the language model removes the rest",
    )  # fmt: skip
    with gr.Accordion("layers and rules", open=False):
        vit = _layers("encoder blocks that merge", default.vit_layers, default.vit_depth)
        llm = _layers("decoder layers that merge", default.llm_layers, default.llm_depth)
        with gr.Row():
            rule = _choice("merging rule", RULES)
            vit_rule = _choice("that of the encoder", VIT_RULES)
        with gr.Row():
            score = _choice("tokens are ranked by", SCORES, interactive=False)
            queries = _choice("in the decoder, attention of", QUERIES, interactive=False)
            windows = _choice("in the encoder's windows, ranked", WINDOWS, interactive=False)
    return Controls(reduction, share, vit, llm, rule, vit_rule, score, queries, windows)


def _layers(label: str, chosen: Sequence[int], depth: int) -> gr.Dropdown:
    return gr.Dropdown(
        [(str(layer), layer) for layer in range(depth)], value=_inside(chosen, depth), multiselect=True,
        label=label,
    )  # fmt: skip


def _inside(chosen: Sequence[int], depth: int) -> list[int]:
    """What the list holds: not the encoder's output, nor the language model's input."""
    return [layer for layer in chosen if 0 <= layer < depth]


def _choice(label: str, choices: dict[str, str], *, interactive: bool = True) -> gr.Dropdown:
    first = next(iter(choices.values()))
    return gr.Dropdown(list(choices.items()), value=first, label=label, interactive=interactive)


def plan_by(rule: Any, vit_rule: Any) -> Plan:
    """A plan of which only the rules are said."""
    return Plan(merge=rule, vit_merge=None if vit_rule == SAME else vit_rule)


def own_of(settled: ModelPlan) -> list[Any]:
    """What the controls that follow a rule become, from the plan settled for it."""
    ranks = not all(settled.settings.by_likeness)
    layers, depths = (settled.vit_layers, settled.llm_layers), (settled.vit_depth, settled.llm_depth)
    return [
        gr.update(value=100 * settled.encoder_share),
        *(gr.update(value=_inside(x, n)) for x, n in zip(layers, depths, strict=True)),
        *(gr.update(interactive=ranks) for _ in range(3)),
    ]


def plan_of(
    reduction: float,
    encoder_share: float,
    vit_layers: Sequence[int] | None,
    llm_layers: Sequence[int] | None,
    rule: Any,
    vit_rule: Any,
    score: Any,
    queries: Any,
    windows: Any,
) -> Plan:
    """The plan the controls say.

    Raises:
        PlanError: values that are no plan.
    """
    plan = replace(
        plan_by(rule, vit_rule),
        vit_layers=tuple(vit_layers or ()),
        llm_layers=tuple(llm_layers or ()),
        reduction=reduction / 100,
        encoder_share=encoder_share / 100,
    )
    if all(plan.by_likeness):  # nothing is ranked
        return plan
    return replace(plan, score=score, queries=queries, window_score=windows)
