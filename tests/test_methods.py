"""Methods of one's own: functions in place of a score and a rule, and merging between encoder and decoder."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import illava
import tiny
import zoo
from contract import tools
from contract.methods import each_alone, evenly, whole_mean
from contract.test_features import encode, needs_v5
from illava import Plan, PlanError
from illava.checks import check_proportional
from illava.families import family_of
from illava.families.seams import Observed
from illava.vision_scores import weigh
from rivals.common import seams_of
from zoo.common import Image


def both_ends(family):
    return Plan(
        ("output",), ("input", zoo.FAMILIES[family].LLM_LAYERS[-1]),
        vit_shares=(0.8,), llm_shares=(0.6, 0.4), score=evenly, merge=whole_mean,
    )  # fmt: skip


# Where ----------------------------------------------------------------------------------------------


@tools.each_family
def test_both_ends_of_every_family(family):
    """Lengths in every layer, rows as alone, generation, text, and nothing left behind."""
    model, inputs = tools.build(family), tools.prompt_of(family, "batch")
    text, plain = tools.prompt_of(family, "text only"), tools.prompt_of(family, tools.mixed(family))
    tools.forward(model, plain, output_hidden_states=True)
    before, words = tools.trace(model), tools.forward(model, text).logits
    with illava.patch(model, plan=both_ends(family)) as handle:
        out = tools.forward(model, inputs, use_cache=True, output_hidden_states=True)
        for picture in handle.report.pictures:
            last = picture.layers[-1]
            assert last.tokens_out == picture.final_tokens == max(1, round(0.4 * picture.tokens))
            assert [r.layer for r in picture.layers if r.stage == "llm"] == list(handle.plan.llm_layers)
            assert handle.plan.llm_layers[0] == -1
        assert "llm -1" in str(handle.report)
        assert {x.shape[1] for x in out.hidden_states} == {inputs["input_ids"].shape[1]}
        for number, row in enumerate(zoo.FAMILIES[family].KINDS["batch"]):
            alone = tools.forward(model, tools.prompt(family, row, seeds=[number])).logits[0, -1]
            torch.testing.assert_close(out.logits[number, -1], alone, atol=1e-4, rtol=1e-4)
        _, logits, _ = tools.greedy(model, plain)
        prefill = tools.forward(model, plain).logits[:, -1]
        torch.testing.assert_close(logits[:, 0], prefill.float(), atol=1e-4, rtol=1e-4)
        assert torch.equal(tools.forward(model, text).logits, words)
    assert tools.trace(model) == before


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl"])
def test_merging_at_the_output_is_merging_what_the_last_block_puts_out(family, attention):
    """The projector's features are those of the mixed units, those of the unpatched model before."""
    model, inputs = tools.build(family, attention), tools.prompt_of(family, "one picture")
    blocks, seen = tools.blocks(model), []
    plan = Plan(
        ("output",), (), vit_shares=(0.5,), score=lambda c: seen.append(c) or c.attention, merge="prune"
    )
    last = []
    hook = blocks[-1].register_forward_hook(
        lambda m, a, out: last.append(out[0] if isinstance(out, tuple) else out)
    )
    tools.forward(model, inputs)
    hook.remove()
    with illava.patch(model, plan=plan) as handle:
        tools.forward(model, inputs)
        assert all(r.stage == "vit" and r.layer == len(blocks) for r in handle.report.pictures[0].layers)
        assert handle.report.reduction == 0.5
        flops = handle.report.flops
    (c,) = seen
    whole = last[0].reshape(-1, last[0].shape[-1])
    assert all((whole - patch).abs().max(1).values.min() < 1e-5 for patch in c.features.flatten(0, 1))
    assert c.features.shape[0] * 4 == len(whole) - (len(c.counts) if family == "internvl" else 0)
    with illava.patch(model, vit_layers=(3,), llm_layers=(), vit_shares=(0.5,)) as h:
        tools.forward(model, inputs)
        inside = h.report.flops
    assert inside.vision.with_ < flops.vision.with_ < flops.vision.without
    assert inside.language.with_ == flops.language.with_


@needs_v5
@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl", "qwen3_vl"])
def test_features_first(family):
    model, inputs = tools.build(family), tools.prompt_of(family, tools.mixed(family))
    with illava.patch(model, plan=both_ends(family)):
        expected = tools.forward(model, inputs, use_cache=True)
        encoded, rest = encode(model, inputs)
        out = tools.forward(model, rest, mm_encoder_outputs=encoded, use_cache=True)
    torch.testing.assert_close(out.logits, expected.logits, atol=1e-5, rtol=1e-5)
    assert tools.held(out.past_key_values) == tools.held(expected.past_key_values)


def test_the_example_of_contributing():
    """As it stands there."""
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text().split("## Writing your own method")[1]
    code = text.split("```python")[1].split("```")[0]
    inputs = tools.prompt_of("qwen2_5_vl", "batch") | {"max_new_tokens": 2}
    names = {"model": tools.build("qwen2_5_vl"), "inputs": inputs}
    exec(compile(code, "CONTRIBUTING.md", "exec"), names)
    assert all(p.final_tokens == round(p.tokens / 4) for p in names["handle"].report.pictures)


# What a function is given ---------------------------------------------------------------------------


def given(family, kind="one picture", **settings):
    """What functions are given in one call, and the inputs."""
    model, inputs, seen = tools.build(family), tools.prompt_of(family, kind), []
    plan = Plan(score=lambda c: seen.append(c) or evenly(c), merge="prune", **settings)
    with illava.patch(model, plan=plan):
        tools.forward(model, inputs)
    return model, inputs, seen


@tools.each_family
def test_named_statistics_are_the_same_by_function(family):
    model, inputs = tools.build(family), tools.prompt_of(family, tools.mixed(family))
    with tools.patch(model, family, **tools.DEEP):
        expected = tools.forward(model, inputs).logits
    with tools.patch(model, family, **tools.DEEP, score=lambda c: c.attention):
        assert torch.equal(tools.forward(model, inputs).logits, expected)


@pytest.mark.parametrize("family", [f for f in zoo.FAMILIES if not f.startswith("minicpm")])
def test_queries_and_keys_before_they_were_turned(family):
    settings = dict(vit_layers=(), llm_layers=(0, 1), llm_shares=(0.6, 0.3))
    model, inputs, (first, second) = given(family, tools.mixed(family), **settings)
    attend = tools.layers(model)[0].self_attn
    caught = {}
    hooks = []
    for name in ("q", "k"):
        module = getattr(attend, f"{name}_norm", None) or getattr(attend, f"{name}_proj")
        hooks.append(module.register_forward_hook(lambda m, a, out, name=name: caught.update({name: out[0]})))
    tools.forward(model, inputs)
    for hook in hooks:
        hook.remove()
    for name, x in zip("qk", first.unrotated, strict=True):
        expected = caught[name].reshape(x.shape[0], *x.shape[2:])
        torch.testing.assert_close(x[:, 0], expected, atol=1e-5, rtol=1e-5)
    assert second.unrotated[0].shape == second.queries.shape
    assert not torch.allclose(second.unrotated[1], second.keys)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl"])
def test_text_and_its_attention(family):
    settings = dict(vit_layers=(), llm_layers=(1,), llm_shares=(0.5,))
    _, inputs, (c,) = given(family, "several pictures", **settings)
    weights = (
        tools.forward(tools.build(family, "eager"), inputs, output_attentions=True).attentions[1][0].mean(0)
    )
    ids, embedded = inputs["input_ids"][0], c.inputs
    visual = set(c.index[c.real].tolist())
    for segment in range(len(c.counts)):
        own = c.index[segment, : c.counts[segment]].tolist()
        places, real = c.text[0][segment], c.text[1][segment]
        words = [i for i in range(own[-1] + 1, len(ids)) if i not in visual]
        assert places[real].tolist() == words
        asking = torch.zeros_like(c.text[1])
        asking[segment] = real & (places % 2 == 0)
        mine = c.text_attention(asking)[segment, : c.counts[segment]]
        expected = weights[[w for w in words if w % 2 == 0]][:, own].mean(0)
        torch.testing.assert_close(mine, expected, atol=1e-6, rtol=1e-4)
    assert embedded.shape == c.features[:, 0].shape


def test_places_on_the_grid():
    settings = dict(vit_layers=("output",), llm_layers=("input", 0), llm_shares=(0.7, 0.5), vit_shares=(0.9,))
    _, _, (*vit, entry, later) = given("qwen2_5_vl", "pictures and video", **settings)
    for c in vit:
        assert c.stage == "vit"
        for place, real in zip(c.place, c.real, strict=True):
            assert len(place[real][:, 0].unique()) == 1  # a frame, its units window by window
            assert len(place[real].unique(dim=0)) == real.sum()
    for c in (entry, later):
        for place, real in zip(c.place, c.real, strict=True):
            frames = place[real]
            order = (frames[:, 0] * 100 + frames[:, 1]) * 100 + frames[:, 2]
            assert (order.diff() > 0).all()  # reading order


def test_errors_of_asking_for_what_is_not_there():
    settings = dict(vit_layers=(1,), vit_shares=(0.9,), llm_layers=("input",), llm_shares=(0.5,))
    _, _, (vit, entry) = given("qwen2_5_vl", **settings)
    for wrong, match in (
        (lambda: vit.text, "read no text"),
        (lambda: vit.inputs, "given nothing"),
        (lambda: entry.attention, "no attention"),
        (lambda: entry.unrotated, "rotary"),
        (lambda: entry.text_attention(entry.text[1]), "nothing attends"),
    ):
        with pytest.raises(PlanError, match=match):
            wrong()
    assert vit.class_attention is None


# What a function must give --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (
            dict(score=lambda c: c.attention[:, :-1], merge="recycle"),
            r"score=<lambda> must return a tensor \[segments, units\]",
        ),
        (dict(score=lambda c: [1], merge="recycle"), r"it returned list"),
        (dict(merge=lambda c, kept: kept), r"merge=<lambda> must return a tensor \[segments, kept, units\]"),
    ],
)
def test_wrong_shapes(settings, match):
    with illava.patch(tiny.build("qwen2_5_vl"), vit_layers=(1,), llm_layers=(1,), **settings) as handle:
        model = handle._seams.model
        with pytest.raises(PlanError, match=match):
            model(**tiny.prompt([5, tiny.A, 7]))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (dict(vit_layers=("input",)), "'input'.* are not layer numbers"),
        (dict(llm_layers=("output",)), "'output'.* are not layer numbers"),
        (dict(vit_layers=("output", "output")), "twice"),
        (dict(vit_layers=(1, 2), vit_shares=(0.5,)), "1 shares for vit_layers"),
        (dict(llm_shares=(0.5,)), "1 shares for llm_layers=None"),
        (dict(llm_layers=(1, 2), llm_shares=(0.5, 0.6)), "rises"),
        (dict(llm_layers=(1,), llm_shares=(0.0,)), "outside"),
        (dict(llm_layers=(1,), llm_shares=0.5), "not a tuple of shares"),
        (dict(llm_layers=(1,), llm_shares=(0.5,), reduction=0.5), "two budgets"),
        (dict(queries=lambda c: c), "queries=.* is not known"),
        (dict(score="mine"), "or a function score"),
    ],
)
def test_plans_that_cannot_be(settings, match):
    with pytest.raises(PlanError, match=match):
        Plan(**settings)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (dict(llm_layers=("input",), merge="prune"), "nothing attends before the first decoder layer"),
        (
            dict(llm_layers=("input",), score=evenly, merge="recycle"),
            "nothing attends before the first decoder layer",
        ),
        (
            dict(vit_layers=(3, "output")),
            "a merge in block 3 and one of what leaves .* leave one of them out",
        ),
        (
            dict(vit_layers=("output",), llm_layers=(1,), llm_shares=(0.5,)),
            "vit_shares does not say how much",
        ),
    ],
)
def test_plans_that_this_model_cannot_carry_out(settings, match):
    with pytest.raises(PlanError, match=match):
        illava.patch(tiny.build("qwen2_5_vl"), **settings)


def test_a_plan_with_functions_in_words():
    plan = Plan((1,), (1,), score=evenly, merge=whole_mean)
    with illava.patch(tiny.build("qwen2_5_vl"), plan=plan) as handle:
        assert "whole_mean, score evenly" in str(handle.plan)
    with pytest.raises(PlanError, match="score=evenly is a function"):
        plan.to_dict()
    assert Plan.paper(0.7, score=evenly) == Plan.paper(0.7, score=evenly)


@pytest.mark.parametrize("tokens", [1, 2, 9, 144, 577])
def test_shares_are_exact(tokens):
    with illava.patch(
        tiny.build("qwen2_5_vl"),
        vit_layers=(0, 2), llm_layers=(1, 2), vit_shares=(0.9, 0.7), llm_shares=(0.5, 0.111),
    ) as handle:  # fmt: skip
        done = handle.plan.segment(1, tokens)
    outs = [out for _, _, out in (*done.vit, *done.llm)]
    assert outs == [max(1, round(share * tokens)) for share in (0.9, 0.7, 0.5, 0.111)]
    assert "[0.5, 0.111] in the LLM" in str(handle.plan)


@tools.each_family
def test_the_default_in_every_family(family):
    """It merges where the plan says, each row of a batch is as alone, and nothing is left behind."""
    model, inputs = tools.build(family), tools.prompt_of(family, "batch")
    tools.forward(model, inputs, output_hidden_states=True)  # transformers' own hooks come with the first
    before = tools.trace(model)
    with illava.patch(model, reduction=0.7) as handle:
        assert len(handle.plan.vit_layers) > 1
        assert handle.plan.proportional is (seams_of(model).block_observed is None)
        out = tools.forward(model, inputs)
        for picture in handle.report.pictures:
            assert picture.final_tokens < 0.5 * picture.tokens
            assert [r.layer for r in picture.layers if r.stage == "vit"] == list(handle.plan.vit_layers)
            assert [r.layer for r in picture.layers if r.stage == "llm"] == list(handle.plan.llm_layers)
        for number, row in enumerate(zoo.FAMILIES[family].KINDS["batch"]):
            alone = tools.forward(model, tools.prompt(family, row, seeds=[number])).logits[0, -1]
            torch.testing.assert_close(out.logits[number, -1], alone, atol=1e-4, rtol=1e-4)
    assert tools.trace(model) == before


# Proportional attention -----------------------------------------------------------------------------


def test_larger_tokens_count_as_many():
    """Attention over tokens of sizes 1, 2, 3 is that over the same tokens once, twice, three times."""
    q, k, v = (torch.randn(3, 2, 8) for _ in range(3))
    sizes = torch.tensor([1.0, 2.0, 3.0])
    a, b, c = weigh(q, k, v, sizes, 0.3)
    out = torch.einsum("qhk,khd->qhd", (torch.einsum("qhd,khd->qhk", a, b) * 0.3).softmax(-1), c)
    often = torch.tensor([0, 1, 1, 2, 2, 2])
    scores = torch.einsum("qhd,khd->qhk", q, k[often]) * 0.3
    expected = torch.einsum("qhk,khd->qhd", scores.softmax(-1), v[often])
    torch.testing.assert_close(out[..., :8], expected)
    assert not out[..., 8:].any()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl"])
def test_proportional_attention_matters_once_sizes_differ(family):
    model, inputs = tools.build(family), tools.prompt_of(family, "one picture")
    shares = dict(vit_layers=(0, 1), llm_layers=(), vit_shares=(0.6, 0.3), score=evenly)
    logits = {}
    for rule in (each_alone, whole_mean):
        for proportional in (False, True):
            with illava.patch(model, **shares, merge=rule, proportional=proportional):
                logits[rule, proportional] = tools.forward(model, inputs).logits
    assert torch.equal(logits[each_alone, False], logits[each_alone, True])
    assert not torch.equal(logits[whole_mean, False], logits[whole_mean, True])


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_proportional_attention_is_the_same_in_a_batch(family):
    """The small picture loses a unit in block 0, none in block 2, where the large one beside it does."""
    model, rows = tools.build(family), [[5, Image(112, 112), 7], [4, Image(56, 56), 3]]
    plan = dict(vit_layers=(0, 2), llm_layers=(), vit_keep_ratio=0.85, merge="bipartite", proportional=True)
    inputs = tools.prompt(family, *rows)
    with tools.patch(model, family, **plan) as handle:
        together = tools.forward(model, inputs).logits
        assert [[r.tokens_out for r in p.layers] for p in handle.report.pictures] == [[14, 12], [3, 3]]
        for number, row in enumerate(rows):
            alone = tools.forward(model, tools.prompt(family, row, seeds=[number])).logits[0]
            own = together[number, inputs["attention_mask"][number].bool()]
            torch.testing.assert_close(own, alone, atol=1e-5, rtol=1e-5)
    with tools.patch(model, family, **plan | dict(proportional=False)):
        assert not torch.allclose(tools.forward(model, inputs).logits, together, atol=1e-4)


def test_blocks_that_attend_by_themselves_cannot_be_told_sizes():
    seams = replace(
        family_of("qwen2_vl", "Qwen2VLForConditionalGeneration").find_seams(tools.build("qwen2_vl")),
        block_observed=Observed((), lambda *_: None),
    )
    with pytest.raises(PlanError, match="leave proportional out"):
        check_proportional(seams)
