"""Odd inputs by name: one unit, strips, crowds, ties, repeats, nothing at all, and what does not match."""

import pytest
import torch
from PIL import Image as PIL

import zoo
from contract import tools
from trust import odd
from zoo.common import V5, Image

# Elsewhere the processor makes at least a whole tile or slice of any picture.
SMALL = {name: Image(32 if "3" in name else 28, 28) for name in zoo.FAMILIES if name.startswith("qwen")}
DEEPEST = {
    "reduction": dict(reduction=0.9999),
    "keep ratio": dict(vit_keep_ratio=1e-9, llm_keep_ratio=1e-9),
    "tokens removed": dict(vit_tokens_removed=10**9, llm_tokens_removed=10**9),
}


def run(family, *rows, **settings):
    """Logits of a patched model, its report and everything it decided."""
    model = tools.build(family)
    with tools.patch(model, family, **(settings or tools.DEEP)) as handle, odd.Watch(model) as watch:
        logits = tools.forward(model, tools.prompt(family, *rows)).logits
    assert logits.isfinite().all()
    return logits, handle.report, watch


@pytest.mark.claim("Odd inputs", "a picture of one merge unit", "works", "it keeps it, under every budget")
@pytest.mark.parametrize("budget", DEEPEST.values(), ids=DEEPEST)
@pytest.mark.parametrize("family", SMALL)
def test_a_picture_of_one_unit(family, budget):
    large = tools.pictures_of(zoo.FAMILIES[family].KINDS["batch"])[0]
    _, report, _ = run(family, [1, SMALL[family], 1, large, 2], **budget)
    small, large = report.pictures
    assert (small.tokens, small.final_tokens) == (1, 1)
    assert 1 <= large.final_tokens <= 2 < large.tokens


@pytest.mark.claim("Odd inputs", "maximal reduction", "works", "each frame and picture keeps a unit or two")
@pytest.mark.parametrize("budget", DEEPEST)
@tools.each_family
def test_maximal_reduction(family, budget):
    model, inputs = tools.build(family), tools.prompt_of(family, tools.mixed(family))
    with tools.patch(model, family, **DEEPEST[budget]) as handle, odd.Watch(model) as watch:
        tokens = tools.generate(model, inputs, tokens=2, do_sample=False)
    assert tokens.shape[1] == inputs["input_ids"].shape[1] + 2
    # Equal counts per layer leave one unit, and what does not divide by the layers.
    if budget != "reduction":  # of which the encoder's share is not all
        most = 1 if budget == "keep ratio" else len(handle.plan.vit_layers)
        assert {n for call in watch.vision for n in call.stages[-1].frame_counts} <= {*range(1, most + 1)}
    left = {p.final_tokens for p in handle.report.pictures}
    assert left <= ({1, 2} if budget == "tokens removed" else {1})


@pytest.mark.claim("Odd inputs", "extreme aspect ratios", "works", "strips of one unit's height and width")
@tools.each_family
def test_strips(family):
    small = family.startswith("minicpm")
    long, short = (400, 16) if small else (1400, 28)
    rows = [[1, Image(short, long), 2, Image(long, short), 1]]
    _, report, _ = run(family, *rows)
    assert len(report.pictures) >= 2
    assert report.final_tokens < report.tokens


@pytest.mark.claim("Odd inputs", "hundreds of small pictures", "works", "200 in a row (Qwen; elsewhere 40)")
@tools.each_family
def test_a_crowd(family):
    number = 200 if family.startswith("qwen") else 40
    side = 56 if family.startswith("qwen") else 32
    row = [part for i in range(number) for part in (Image(side, side, i), 1)]
    _, report, watch = run(family, row)
    assert len(report.pictures) == number
    left = [p.final_tokens for p in report.pictures]
    assert max(left) - min(left) <= 1  # LLaVA's packing may revive a patch in one and not in another
    call = watch.language[0]
    text = odd.real_text(tools.build(family), tools.prompt(family, row))[0].nonzero().flatten().tolist()
    assert set(text) <= set(call.stages[-1].positions[0].tolist()), "what stands between them stays"
    assert len(call.stages[-1].positions[0]) == call.length - report.tokens + report.final_tokens


def even(image):
    """One colour: in an encoder without positions every unit would tie."""
    return PIL.new("RGB", (image.width, image.height), (128, 64, 200))


@pytest.mark.claim(
    "Odd inputs", "a picture of one colour", "works", "ties: the plan is kept, the bits repeat"
)
@tools.each_family
def test_one_colour(family, monkeypatch):
    """With attention that tells nothing apart as well: every importance in the encoder ties."""
    model = zoo.FAMILIES[family].build()
    for name, weight in model.named_parameters():
        if any(part in name for part in ("qkv", "q_proj", "k_proj")):
            weight.data.zero_()
    picture = tools.pictures_of(zoo.FAMILIES[family].KINDS["one picture"])[0]
    monkeypatch.setattr(Image, "pil", even)
    inputs = tools.prompt(family, [3, picture, 2, picture, 4])
    with tools.patch(model, family, **tools.DEEP) as handle, odd.Watch(model) as watch:
        logits = tools.forward(model, inputs).logits
        kept = [d.keep for d in watch.decisions]
        assert torch.equal(logits, tools.forward(model, inputs).logits)
        assert all(torch.equal(a, b.keep) for a, b in zip(kept, watch.decisions[len(kept) :], strict=True))
    assert logits.isfinite().all()
    assert (
        len({p.final_tokens for p in handle.report.pictures if p.tokens == handle.report.pictures[0].tokens})
        == 1
    )
    assert handle.report.reduction > 0.6


@pytest.mark.claim(
    "Odd inputs", "the same picture twice", "works", "the encoder keeps the same units of both"
)
@tools.each_family
def test_a_picture_repeated(family):
    picture = tools.pictures_of(zoo.FAMILIES[family].KINDS["several pictures"])[0]
    _, report, watch = run(family, [3, picture, 2, picture, 2, picture, 4])
    call = watch.vision[0]
    stage, units = call.stages[-1], call.layout.frame_units
    starts = torch.tensor([0, *units]).cumsum(0)
    kept = [
        (stage.units[(stage.units >= a) & (stage.units < b)] - a).tolist()
        for a, b in zip(starts, starts[1:], strict=False)
    ]
    third = len(kept) // 3
    assert kept[:third] == kept[third : 2 * third] == kept[2 * third :]
    assert len({p.final_tokens for p in report.pictures[:: len(report.pictures) // 3]}) == 1


@pytest.mark.claim("Odd inputs", "pictures and no word", "works", "an answer follows from placeholders alone")
@tools.each_family
def test_a_prompt_without_words(family):
    picture = tools.pictures_of(zoo.FAMILIES[family].KINDS["one picture"])[0]
    model, inputs = tools.build(family), tools.prompt(family, [picture])
    with tools.patch(model, family, **tools.DEEP) as handle:
        ids = tools.generate(model, inputs, do_sample=False)
    assert ids.shape[1] == inputs["input_ids"].shape[1] + 6
    assert handle.report.reduction > 0.6


@pytest.mark.claim(
    "Odd inputs", "an empty row in a batch", "works", "all padding: as unpatched, neighbours untouched"
)
@pytest.mark.parametrize("side", ["left", "right"])
@tools.each_family
def test_a_row_that_is_all_padding(family, side):
    picture = tools.pictures_of(zoo.FAMILIES[family].KINDS["one picture"])[0]
    model = tools.build(family)
    inputs = tools.prompt(family, [2, picture, 3], [5], side=side)
    inputs["attention_mask"][1] = 0
    expected = outcome(lambda: tools.forward(model, inputs))
    with tools.patch(model, family, **tools.DEEP):
        assert outcome(lambda: tools.forward(model, inputs)) == expected
        if expected is not None:
            return  # Qwen makes its positions of the tokens of each row, and fails where there are none
        logits = tools.forward(model, inputs).logits
        alone = tools.forward(model, tools.prompt(family, [2, picture, 3])).logits[0]
    own = inputs["attention_mask"][0].bool()
    torch.testing.assert_close(logits[0, own], alone, atol=1e-4, rtol=1e-4)


def outcome(call):
    try:
        call()
    except Exception as error:
        return type(error), str(error)
    return None


def less(inputs):
    """One placeholder fewer than features."""
    ids = inputs["input_ids"].clone()
    visual = (ids == inputs["visual"]).nonzero()
    ids[tuple(visual[0])] = inputs["word"]
    return ids


def more(inputs):
    """One placeholder more than features."""
    ids = inputs["input_ids"].clone()
    ids[0, -1] = inputs["visual"]
    return ids


def none(inputs):
    """Features and no placeholder."""
    ids = inputs["input_ids"].clone()
    return ids.masked_fill(ids == inputs["visual"], inputs["word"])


@pytest.mark.claim(
    "Odd inputs",
    "placeholders that do not match the features",
    "refused",
    "the model's own error, word for word",
)
@pytest.mark.parametrize("change", [less, more, none])
@tools.each_family
def test_placeholders_that_do_not_match(family, change):
    model, inputs = tools.build(family), tools.prompt_of(family, "several pictures")
    visual = (
        model.config.image_token_id
        if hasattr(model.config, "image_token_id")
        else model.config.image_token_index
    )
    word = int(tools.prompt(family, [1])["input_ids"].flatten()[-1])
    ids = change(inputs | {"visual": visual, "word": word})
    changed = inputs | {"input_ids": ids}
    if "mm_token_type_ids" in inputs:
        changed["mm_token_type_ids"] = (ids == visual).to(inputs["mm_token_type_ids"].dtype)
    expected = outcome(lambda: tools.forward(model, changed))
    assert expected is not None, "else there would be nothing to hand on"
    with tools.patch(model, family, **tools.DEEP):
        assert outcome(lambda: tools.forward(model, changed)) == expected
        assert tools.forward(model, inputs).logits.isfinite().all(), "the next call is right"
    for settings in (dict(vit_layers=()), dict(llm_layers=())):
        with tools.patch(model, family, **(tools.DEEP | settings)):
            assert outcome(lambda: tools.forward(model, changed)) == expected


@pytest.mark.claim("Odd inputs", "no token at all", "refused", "the model's own error, word for word")
@tools.each_family
def test_no_token_at_all(family):
    model = tools.build(family)
    nothing = torch.zeros(1, 0, dtype=torch.long)
    inputs = {"input_ids": nothing, "attention_mask": nothing}
    expected = outcome(lambda: tools.forward(model, inputs))
    with tools.patch(model, family, **tools.DEEP):
        assert outcome(lambda: tools.forward(model, inputs)) == expected


LARGE = {
    # pixels, and grids where the family takes them: 256 x 256 patches, or 1,024 tiles of 16 tokens
    "qwen2_5_vl": ((256 * 256, 3 * 2 * 14 * 14), {"image_grid_thw": torch.tensor([[1, 256, 256]])}),
    "qwen3_vl": ((256 * 256, 3 * 2 * 16 * 16), {"image_grid_thw": torch.tensor([[1, 256, 256]])}),
    "internvl": ((1024, 3, 112, 112), {}),
}


@pytest.mark.slow
@pytest.mark.claim(
    "Odd inputs", "a picture of 16,384 tokens", "works", "one forward: exact counts, nothing N x N"
)
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.soak if name == "qwen3_vl" else ()) for name in LARGE]
)
def test_a_picture_of_16k_tokens(family):
    model = tools.build(family)
    shape, more = LARGE[family]
    text = tools.prompt(family, [6])["input_ids"]
    run = torch.full((1, 16384), model.config.image_token_id)
    ids = torch.cat([text[:, :-3], run, text[:, -3:]], dim=1)
    inputs = more | {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(shape),
    }
    if V5 and family.startswith("qwen"):
        inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    with tools.patch(model, family, **tools.DEEP) as handle:
        out = tools.forward(model, inputs, use_cache=True)
    assert out.logits.shape[1] == ids.shape[1]
    assert out.logits[:, -3:].isfinite().all()
    (picture,) = handle.report.pictures
    assert (picture.tokens, picture.note) == (16384, "")
    assert abs(picture.final_tokens - (1 - tools.DEEP["reduction"]) * 16384) <= 3
    assert tools.held(out.past_key_values)[-1] == text.shape[1] + picture.final_tokens


@pytest.mark.skipif(not V5, reason="transformers 4.57 records every layer or none")
@tools.each_family
def test_hidden_states_of_some_layers_alone(family):
    """The others are None, as unpatched: what illava keeps of merging layers is not handed out unasked."""
    model, inputs = tools.build(family), tools.prompt_of(family, "one picture")
    some = dict(output_hidden_states=[2])
    expected = [x is None for x in tools.forward(model, inputs, **some).hidden_states]
    with tools.patch(model, family, **tools.DEEP):
        found = tools.forward(model, inputs, **some).hidden_states
        every = tools.forward(model, inputs, output_hidden_states=True).hidden_states
    assert [x is None for x in found] == expected
    for one, other in zip(found, every, strict=True):
        assert one is None or torch.equal(one, other)
