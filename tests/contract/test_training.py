"""Labels and gradients while tokens are merged away."""

import pytest
import torch

from contract import tools


@pytest.mark.capability("labels")
@tools.each_rule
@tools.each_family
def test_loss_and_gradients(family, settings):
    model, inputs = tools.build(family), tools.prompt_of(family, tools.mixed(family))
    labels = inputs["input_ids"].clone()
    labels[:, :-6] = -100
    model.zero_grad()
    with tools.patch(model, family, **settings):
        out = model(**inputs, labels=labels)
        out.loss.backward()
    assert out.logits.shape[:2] == labels.shape
    by_hand = torch.nn.functional.cross_entropy(out.logits[0, -7:-1], labels[0, -6:])
    torch.testing.assert_close(out.loss, by_hand)
    for part in (tools.blocks(model)[0], tools.layers(model)[0]):
        gradients = {name: p.grad for name, p in part.named_parameters()}
        # The bias of a key moves all of a softmax's scores alike.
        assert all(g is not None and g.isfinite().all() for g in gradients.values())
        assert all(g.abs().sum() > 0 for name, g in gradients.items() if not name.endswith("bias"))
    model.zero_grad()


@pytest.mark.capability("labels")
@tools.each_rule
@tools.each_family
def test_loss_of_a_padded_batch(family, settings):
    """The mean over all rows' tokens, each row at its own length."""
    model, inputs = tools.build(family), tools.prompt_of(family, "batch", side="right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :3] = -100
    with tools.patch(model, family, **settings):
        out = tools.forward(model, inputs, labels=labels)
    by_hand = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, by_hand)
