"""Half precision and both attention implementations, while tokens are merged away."""

import pytest
import torch

from contract import tools

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.mark.capability("fp16 and bf16")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@HALVES
@tools.each_family
@tools.each_rule
def test_same_counts_as_in_full_precision(family, dtype, attention, settings):
    counts = []
    for kind in (torch.float32, dtype):
        model = tools.build(family, attention, kind)
        inputs = tools.prompt_of(family, "batch", dtype=kind)
        with tools.patch(model, family, **settings) as handle:
            out = tools.forward(model, inputs, use_cache=True)
        assert out.logits.dtype == kind
        assert out.logits[inputs["attention_mask"].bool()].isfinite().all()
        records = [(p.row, p.tokens, p.layers) for p in handle.report.pictures]
        if (
            "llava" in family
        ):  # which patches survive, rounding may decide; that says which tokens packing leaves
            records = [(row, n, [r for r in layers if r.stage == "vit"]) for row, n, layers in records]
            counts.append(records)
        else:
            counts.append((records, tools.held(out.past_key_values)))
    assert counts[0] == counts[1]


@pytest.mark.capability("fp16 and bf16")
@HALVES
@tools.each_family
@tools.each_rule
def test_generate(family, dtype, settings):
    model = tools.build(family, dtype=dtype)
    inputs = tools.prompt_of(family, "batch", dtype=dtype)
    with tools.patch(model, family, **settings):
        ids, logits, _ = tools.greedy(model, inputs)
    assert ids.shape == (len(inputs["input_ids"]), 6)
    assert logits.isfinite().all()


@pytest.mark.capability("eager and sdpa")
@tools.each_kind_with_pictures
@tools.each_rule
def test_eager_gives_what_sdpa_gives(family, kind, settings):
    found = []
    for attention in ("sdpa", "eager"):
        model, inputs = tools.build(family, attention), tools.prompt_of(family, kind)
        with tools.patch(model, family, **settings):
            found.append(tools.greedy(model, inputs))
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-4, rtol=1e-4)
    assert torch.equal(found[0][0], found[1][0])
    assert tools.held(found[0][2]) == tools.held(found[1][2])
