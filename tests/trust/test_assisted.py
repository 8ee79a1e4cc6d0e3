"""Assisted decoding: drafts, whoever makes them, change nothing about what is answered.

The first call brings the prompt and its draft together. Were drafted tokens to count as questions about the
picture, then what survives, and with it the answer, would depend on the draft.
"""

import pytest
import torch

from contract import tools
from trust.plain import each_family, inputs_of, patched, plain_of

TOKENS = 9
each_decision = pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampling"])


@pytest.fixture(autouse=True)
def _stateless(family):
    if family.startswith("minicpmv4"):
        pytest.skip("transformers refuses assisted decoding of models with linear attention")


def claimed(name):
    return pytest.mark.claim(
        "Assisted decoding",
        name,
        "works",
        "greedily the same tokens, and always the same logits, as running all anew",
    )


def draft_model(family, exactly):
    """A model for drafts: the same weights, which are always right, or others, which hardly ever are."""
    return tools.zoo.FAMILIES[family].build(seed=0 if exactly else 1)


def check(family, **settings):
    """The answer, and the logits every token of it was chosen from."""
    inputs, plain = inputs_of(family, "one picture"), plain_of(family, "one picture")
    # 4.57 needs a token that ends answers.
    settings |= dict(
        eos_token_id=plain.config.vocab_size - 1, return_dict_in_generate=True, output_logits=True
    )
    with patched(family) as handle:
        out = tools.generate(tools.build(family), inputs, tokens=TOKENS, **settings)
        assert handle.report.reduction > 0.6
    answer = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    expected = plain.logits(answer[:-1])[-len(answer) :]
    torch.testing.assert_close(torch.cat(out.logits)[: len(answer)], expected, atol=1e-5, rtol=1e-5)
    if not settings["do_sample"]:
        assert answer == expected.argmax(-1).tolist()


@claimed("prompt lookup")
@each_decision
@each_family
def test_prompt_lookup(family, do_sample):
    """Drafts are copied out of prompt and answer; a single token is enough to find one."""
    check(family, prompt_lookup_num_tokens=3, max_matching_ngram_size=1, do_sample=do_sample)


@claimed("assistant_early_exit")
@each_family
def test_early_exit(family):
    """The model drafts for itself with its first layers, one of which merges."""
    settings = dict(assistant_early_exit=2, do_sample=False)
    try:
        tools.generate(tools.build(family), inputs_of(family, "one picture"), **settings)
    except AttributeError as error:
        pytest.skip(f"without illava, this model cannot leave early: {error}")
    check(family, **settings)


@pytest.mark.parametrize("exactly", [False, True], ids=["bad drafts", "good drafts"])
@pytest.mark.parametrize("drafts", [
    pytest.param("unpatched", marks=claimed("the patched model as target, an unpatched one drafts")),
    pytest.param("patched", marks=claimed("patched models as target and as draft")),
])  # fmt: skip
@each_decision
@each_family
def test_target(family, drafts, exactly, do_sample):
    draft = draft_model(family, exactly)
    if drafts == "patched":
        tools.patch(draft, family, **tools.DEEP)
    check(family, assistant_model=draft, do_sample=do_sample)


@pytest.mark.claim(
    "Assisted decoding",
    "the patched model as draft alone",
    "works",
    "the target's own greedy answer, bit by bit",
)
@each_family
def test_draft(family):
    model, inputs = tools.build(family), inputs_of(family, "one picture")
    expected = tools.generate(model, inputs, tokens=TOKENS, do_sample=False)
    draft = draft_model(family, exactly=True)
    with tools.patch(draft, family, **tools.DEEP):
        found = tools.generate(model, inputs, tokens=TOKENS, do_sample=False, assistant_model=draft)
    assert torch.equal(found, expected)
