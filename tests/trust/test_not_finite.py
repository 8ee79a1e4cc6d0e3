"""Features that are NaN or infinite are named, and never read as merged away."""

import pytest
import torch

import illava
import zoo
from contract import tools
from zoo.common import V5

BAD = {"NaN": float("nan"), "inf": float("inf"), "-inf": float("-inf")}
KIND = "several pictures"


def break_output(module, value, rows=slice(1, 2), columns=slice(None)):
    """A hook that makes some rows of a module's output `value`, as an overflow would."""

    def hook(_, args, output):
        first = output[0] if isinstance(output, (list, tuple)) else output
        first = first.clone()
        first.view(-1, first.shape[-1])[rows, columns] = value
        return type(output)([first, *output[1:]]) if isinstance(output, (list, tuple)) else first

    return module.register_forward_hook(hook)


def projector(model):
    """The last layer of the projector: what it puts out are the features."""
    owners = (model.model, tools.tower(model))
    found = [getattr(o, n) for n in ("merger", "multi_modal_projector") for o in owners if hasattr(o, n)]
    return [m for m in found[0].modules() if isinstance(m, torch.nn.Linear)][-1]


CASES = {
    "NaN": (BAD["NaN"], {}),
    "inf": (BAD["inf"], {}),
    "-inf": (BAD["-inf"], {}),
    "-inf, encoder alone": (BAD["-inf"], dict(llm_layers=())),
    "-inf, language model alone": (BAD["-inf"], dict(vit_layers=())),
}


@pytest.mark.claim(
    "Odd inputs", "NaN or infinite features", "refused", "projector output overwritten in every family"
)
@pytest.mark.parametrize(("value", "plan"), CASES.values(), ids=CASES)
@tools.each_family
def test_features_that_are_not_finite_are_named(family, value, plan):
    """A whole row of -inf included, which is what illava marks rows merged away with."""
    model, inputs = tools.build(family), tools.prompt_of(family, KIND)
    fine = tools.forward(model, inputs).logits
    hook = break_output(projector(model), value)
    try:
        with tools.patch(model, family, **(tools.DEEP | plan)):
            with pytest.raises(illava.UnsupportedInputError, match=r"\(row 0\) has NaN or inf.*bfloat16"):
                tools.forward(model, inputs)
            hook.remove()
            assert tools.forward(model, inputs).logits.isfinite().all(), "the next call is right"
    finally:
        hook.remove()
    assert torch.equal(tools.forward(model, inputs).logits, fine)


@pytest.mark.claim(
    "Odd inputs", "an encoder that overflows", "refused", "each merging block in turn: the error names it"
)
@tools.each_family
def test_the_block_is_named(family):
    model, inputs = tools.build(family), tools.prompt_of(family, KIND)
    with tools.patch(model, family, **tools.DEEP) as handle:
        merging = handle.plan.vit_layers
        for block, module in enumerate(tools.blocks(model)[: merging[-1] + 1]):
            hook = break_output(module, BAD["inf"])
            place = next((m for m in merging if m > block), None)
            expected = (
                f"in the attention of encoder block {place}"
                if place is not None
                else f"finite up to encoder block {merging[-1]}"
            )
            try:
                with pytest.raises(illava.UnsupportedInputError, match=expected):
                    tools.forward(model, inputs)
            finally:
                hook.remove()
        assert tools.forward(model, inputs).logits.isfinite().all()


@tools.each_family
def test_pixels_that_are_not_finite(family):
    model, inputs = tools.build(family), tools.prompt_of(family, KIND)
    pixels = inputs["pixel_values"].clone()
    pixels.view(-1)[7] = float("nan")
    with (
        tools.patch(model, family, **tools.DEEP) as handle,
        pytest.raises(
            illava.UnsupportedInputError, match=f"encoder block {handle.plan.vit_layers[0]}.*pixels"
        ),
    ):
        tools.forward(model, inputs | {"pixel_values": pixels})


@pytest.mark.claim("Odd inputs", "float16 that really overflows", "refused", "weights scaled until it does")
@tools.each_family
def test_an_encoder_that_runs_out_of_float16(family):
    """No hook: weights so large that the last layers of the encoder leave the range of float16."""
    model = zoo.FAMILIES[family].build(dtype=torch.float16)
    inputs = tools.prompt_of(family, KIND, dtype=torch.float16)
    block = tools.blocks(model)[1]
    linear = [m for m in block.modules() if isinstance(m, torch.nn.Linear)][-1]
    linear.weight.data *= 6e4 / linear.weight.data.abs().max()
    unpatched = tools.forward(model, inputs).logits
    assert not unpatched.isfinite().all()
    with (
        tools.patch(model, family, **tools.DEEP),
        pytest.raises(illava.UnsupportedInputError, match="NaN or infinite features.*float16"),
    ):
        tools.forward(model, inputs)


@pytest.mark.skipif(not V5, reason="transformers 4.57 takes no mm_encoder_outputs")
@tools.each_family
def test_features_from_the_caller(family):
    """Kept by the caller and spoilt: named all the same."""
    model, inputs = tools.build(family), tools.prompt_of(family, KIND)
    with tools.patch(model, family, **tools.DEEP):
        wanted = ("pixel_values", "image_grid_thw", "image_sizes", "target_sizes", "batch_num_images")
        keys = [k for k in inputs if k in wanted]
        with torch.no_grad():
            encoded = model.get_image_features(**{k: inputs[k] for k in keys})
        alive = encoded.pooler_output[0]
        alive.view(-1, alive.shape[-1])[:, 0] = float("nan")
        rest = {k: v for k, v in inputs.items() if k != "pixel_values"}
        with pytest.raises(illava.UnsupportedInputError, match="image 0 .row 0. has NaN or infinite"):
            tools.forward(model, rest, mm_encoder_outputs={"image": encoded})


@pytest.mark.claim(
    "Odd inputs", "a decoder that overflows", "works", "as unpatched: NaN in that row, the others untouched"
)
@tools.each_family
def test_nan_in_the_decoder_stays_in_its_row(family):
    """What decoder layers themselves make of a row is the model's; it must not reach its neighbours."""
    model, part = tools.build(family), tools.pictures_of(zoo.FAMILIES[family].KINDS["one picture"])[0]
    inputs = tools.prompt(family, [3, part, 4], [3, part, 4], seeds=[0, 1])
    with tools.patch(model, family, **tools.DEEP) as handle:
        fine = tools.forward(model, inputs).logits

        def spoil(_, args, output):
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            hidden[0, 3:] = float("nan")
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        for layer in (0, 1):
            hook = tools.layers(model)[layer].register_forward_hook(spoil)
            try:
                logits = tools.forward(model, inputs).logits
            finally:
                hook.remove()
            assert logits[0].isnan().any()
            assert torch.equal(logits[1], fine[1])
            assert handle.report.reduction > 0.6
