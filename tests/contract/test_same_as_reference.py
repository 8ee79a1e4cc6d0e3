"""Against slow independent references: the same choices, features, logits and generated tokens."""

import pytest
import torch

import illava
import zoo
from contract import tools
from contract.recorder import Recorder, options

# Tokens that are alike, wherever they stand and however many they stand for.
ALIKE = dict(proportional=False, distance_penalty=0.0)
PLANS = {
    "paper": tools.MAIN,
    "prune": dict(reduction=0.778, merge="prune"),
    "linear": dict(reduction=0.778, merge="linear"),
    "lse": dict(reduction=0.667, merge="recycle", score="lse"),
    "all queries": dict(reduction=0.667, merge="recycle", queries="all", recycled=0.2),
    "visual queries": dict(reduction=0.667, merge="recycle", queries="visual"),
    "last query": dict(reduction=0.667, merge="recycle", queries="last"),
    "whole picture": dict(reduction=0.667, merge="recycle", window_score="picture", recycled=0.4),
    "keep ratio": dict(vit_keep_ratio=0.85, llm_keep_ratio=0.9, merge="recycle"),
    "tokens removed": dict(vit_tokens_removed=3, llm_tokens_removed=4, merge="linear"),
    "encoder alone": dict(reduction=0.6, merge="recycle", llm_layers=()),
    "language model alone": dict(reduction=0.6, merge="recycle", vit_layers=()),
    "bipartite": dict(reduction=0.778, merge="recycle", vit_merge="bipartite", **ALIKE),
    "bipartite, several rounds": dict(
        reduction=0.9, encoder_share=0.95, merge="recycle", vit_merge="bipartite", **ALIKE
    ),
    "bipartite in both": dict(reduction=0.778, **ALIKE),
    "bipartite in the language model, several rounds": dict(
        reduction=0.9, encoder_share=0.1, vit_merge="prune", **ALIKE
    ),
    "proportional, and a block that removes nothing": dict(
        vit_shares=(0.5, 0.5, 0.4), llm_shares=(0.3, 0.2), distance_penalty=0.0
    ),
}
MAIN = {"recycled 0.3, members 3": tools.DEEP, "default": tools.DEFAULT}
each_main = pytest.mark.parametrize("settings", MAIN.values(), ids=MAIN.keys())


def compare(family, kind, settings, monkeypatch, attention="sdpa", layers=None):
    """One call, by default merging at the layers that the zoo names."""
    model, inputs = tools.build(family, attention), tools.prompt_of(family, kind)
    recorder = Recorder(monkeypatch)
    entered = []
    # Registered before the patch, so that it sees what the language model is given.
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: entered.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with illava.patch(model, **(tools.LAYERS[family] if layers is None else layers) | settings) as handle:
        logits = tools.forward(model, inputs).logits[0]
    hook.remove()
    expected = zoo.reference(family).forward(
        model, inputs, *tools.removed_by(handle.plan), **options(handle.plan)
    )
    if tools.pictures_of(zoo.FAMILIES[family].KINDS[kind]):
        assert expected.merges, "the reference merged nothing: the case tests nothing"
        features = entered[0][0, tools.visual_places(model, inputs)]
        torch.testing.assert_close(features, expected.features, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits, expected.logits, atol=1e-5, rtol=1e-5)
    recorder.compare(expected)
    return handle.plan


@pytest.mark.capability("same as the reference")
@each_main
@tools.each_single_row
def test_every_prompt(family, kind, settings, monkeypatch):
    compare(family, kind, settings, monkeypatch)


@pytest.mark.capability("same as the reference")
@pytest.mark.parametrize("settings", PLANS.values(), ids=PLANS.keys())
@tools.each_family
def test_every_plan(family, settings, monkeypatch):
    compare(family, tools.mixed(family), settings, monkeypatch)


@pytest.mark.capability("same as the reference")
@tools.each_family
def test_what_is_merged_where_nothing_else_is_said(family, monkeypatch):
    """At the default's own layers, and told what its tokens stand for."""
    plan = compare(family, tools.mixed(family), tools.DEFAULT, monkeypatch, layers={})
    assert (plan.vit_layers, plan.llm_layers) == ((1, 2, 3), (1, 2))
    assert (plan.proportional, plan.distance_penalty) == (True, 0.2)


@pytest.mark.capability("same as the reference")
@pytest.mark.parametrize(
    "settings",
    [dict(reduction=0.3), dict(reduction=0.9, encoder_share=0.95)],
    ids=["few go", "several rounds"],
)
@tools.each_family
def test_what_stands_apart_is_less_alike(family, settings, monkeypatch):
    """In windows and out of them, in tiles, over the frames of a video, and where tokens lie on no grid."""
    compare(family, tools.mixed(family), settings | dict(distance_penalty=0.3), monkeypatch)


@pytest.mark.capability("same as the reference")
@each_main
@tools.each_family
def test_with_eager_attention(family, settings, monkeypatch):
    compare(family, tools.mixed(family), settings, monkeypatch, attention="eager")


@pytest.mark.capability("same as the reference")
@each_main
@tools.each_single_row
def test_generated_tokens(family, kind, settings):
    """The reference runs the whole text anew for each token, without a cache."""
    model, inputs = tools.build(family), tools.prompt_of(family, kind)
    with tools.patch(model, family, **settings) as handle:
        ids, _, _ = tools.greedy(model, inputs)
    expected = zoo.reference(family).generate(
        model, inputs, *tools.removed_by(handle.plan), new_tokens=6, **options(handle.plan)
    )
    assert ids[0].tolist() == expected
