"""Against slow independent references: the same choices, features, logits and generated tokens."""

import pytest
import torch

import zoo
from contract import tools
from contract.recorder import Recorder

PLANS = {
    "prune": dict(reduction=0.778, merge="prune"),
    "linear": dict(reduction=0.778, merge="linear"),
    "lse": dict(reduction=0.667, score="lse"),
    "all queries": dict(reduction=0.667, queries="all", recycled=0.2),
    "visual queries": dict(reduction=0.667, queries="visual"),
    "last query": dict(reduction=0.667, queries="last"),
    "whole picture": dict(reduction=0.667, window_score="picture", recycled=0.4),
    "keep ratio": dict(vit_keep_ratio=0.85, llm_keep_ratio=0.9),
    "tokens removed": dict(vit_tokens_removed=3, llm_tokens_removed=4, merge="linear"),
    "encoder alone": dict(reduction=0.6, encoder_share=1.0, llm_layers=()),
    "language model alone": dict(reduction=0.6, vit_layers=()),
    "bipartite": dict(reduction=0.778, vit_merge="bipartite"),
    "bipartite, several rounds": dict(reduction=0.9, encoder_share=0.95, vit_merge="bipartite"),
    "bipartite in both": dict(reduction=0.778, merge="bipartite"),
    "bipartite in the language model, several rounds": dict(
        reduction=0.9, encoder_share=0.1, merge="bipartite", vit_merge="prune"
    ),
}
MAIN = {"paper": tools.MAIN, "recycled 0.3, members 3": tools.DEEP}


def options(settings) -> dict:
    names = (
        "recycled", "members", "score", "merge", "queries", "window_score", "vit_merge", "distance_penalty",
    )  # fmt: skip
    return {name: settings[name] for name in names if name in settings}


def compare(family, kind, settings, monkeypatch, attention="sdpa"):
    model, inputs = tools.build(family, attention), tools.prompt_of(family, kind)
    recorder = Recorder(monkeypatch)
    entered = []
    # Registered before the patch, so that it sees what the language model is given.
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: entered.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with tools.patch(model, family, **settings) as handle:
        logits = tools.forward(model, inputs).logits[0]
    hook.remove()
    expected = zoo.reference(family).forward(
        model, inputs, *tools.removed_by(handle.plan), **options(settings)
    )
    if tools.pictures_of(zoo.FAMILIES[family].KINDS[kind]):
        assert expected.merges, "the reference merged nothing: the case tests nothing"
        features = entered[0][0, tools.visual_places(model, inputs)]
        torch.testing.assert_close(features, expected.features, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits, expected.logits, atol=1e-5, rtol=1e-5)
    recorder.compare(expected)


@pytest.mark.capability("same as the reference")
@pytest.mark.parametrize("settings", MAIN.values(), ids=MAIN.keys())
@tools.each_single_row
def test_every_prompt(family, kind, settings, monkeypatch):
    compare(family, kind, settings, monkeypatch)


@pytest.mark.capability("same as the reference")
@pytest.mark.parametrize("settings", PLANS.values(), ids=PLANS.keys())
@tools.each_family
def test_every_plan(family, settings, monkeypatch):
    compare(family, tools.mixed(family), settings, monkeypatch)


@pytest.mark.capability("same as the reference")
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "internvl"])
@pytest.mark.parametrize("reduction", [0.3, 0.778])
def test_what_stands_apart_is_less_alike(family, reduction, monkeypatch):
    """In windows and out of them, in tiles, and over the frames of a video."""
    settings = dict(reduction=reduction, merge="bipartite", distance_penalty=0.3)
    compare(family, tools.mixed(family), settings, monkeypatch)


@pytest.mark.capability("same as the reference")
@tools.each_family
def test_with_eager_attention(family, monkeypatch):
    compare(family, tools.mixed(family), tools.DEEP, monkeypatch, attention="eager")


@pytest.mark.capability("same as the reference")
@tools.each_single_row
def test_generated_tokens(family, kind):
    """The reference runs the whole text anew for each token, without a cache."""
    model, inputs = tools.build(family), tools.prompt_of(family, kind)
    with tools.patch(model, family, **tools.DEEP) as handle:
        ids, _, _ = tools.greedy(model, inputs)
    expected = zoo.reference(family).generate(
        model, inputs, *tools.removed_by(handle.plan), new_tokens=6, **options(tools.DEEP)
    )
    assert ids[0].tolist() == expected
