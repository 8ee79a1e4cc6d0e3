"""Ways of handing in pictures that few use: features, embeddings, the language model alone."""

import pytest
import torch

import illava
import tiny

PLAN = dict(vit_layers=(0, 1), llm_layers=(0, 2), reduction=0.7)
PROMPT = [5, tiny.A, 7]


@pytest.fixture
def patched():
    model = tiny.build("qwen2_5_vl")
    with illava.patch(model, **PLAN):
        yield model


def test_features_handed_over_by_the_caller(patched):
    """Features encoded apart and passed on: what was merged away travels with them."""
    if not tiny.V5:
        pytest.skip("transformers 4.57 takes no mm_encoder_outputs")
    inputs = tiny.prompt([3, tiny.A, 4, tiny.B, 2])
    with torch.no_grad():
        wanted = patched(**inputs).logits
        encoded = patched.model.get_image_features(inputs.pop("pixel_values"), inputs["image_grid_thw"])
        assert torch.equal(patched(**inputs, mm_encoder_outputs={"image": encoded}).logits, wanted)


def test_pixels_with_embeddings(patched):
    """`inputs_embeds` in place of ids: placeholders are found by their embedding, as the model does."""
    inputs = tiny.prompt(PROMPT)
    with torch.no_grad():
        positions = torch.arange(inputs["input_ids"].shape[1]).expand(3, 1, -1)
        wanted = patched(**inputs, position_ids=positions).logits
        ids = inputs.pop("input_ids")
        inputs.pop("mm_token_type_ids", None)
        embeds = patched.get_input_embeddings()(ids)
        assert torch.equal(patched(**inputs, inputs_embeds=embeds, position_ids=positions).logits, wanted)


def test_language_model_called_by_itself(patched):
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        out = patched.model.language_model(input_ids=ids)
        with illava.patch(patched, reduction=0.0):
            assert torch.equal(
                out.last_hidden_state, patched.model.language_model(input_ids=ids).last_hidden_state
            )


def test_features_and_placeholders_that_do_not_match(patched):
    """The model's own error, not one of illava's making."""
    inputs = tiny.prompt(PROMPT)
    inputs["input_ids"][0, inputs["input_ids"][0].tolist().index(tiny.IMAGE)] = 7
    with pytest.raises(
        (ValueError, RuntimeError), match="[Ii]mage features and image tokens do not match|shape"
    ):
        patched(**inputs, position_ids=torch.arange(inputs["input_ids"].shape[1]).expand(3, 1, -1))
