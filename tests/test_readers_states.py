"""An interrupted training run goes on from its state as if it had not been interrupted."""

import json

import pytest
import torch
from safetensors import safe_open
from torch import nn

from readers import states


def begin():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 6))
    model[2].weight = model[0].weight if model[0].weight.shape == model[2].weight.shape else model[2].weight
    model[3].tied = model[2].weight  # one weight under two names, as embeddings have it
    first, rest = [model[2].weight], [p for p in model.parameters() if p is not model[2].weight]
    kind = getattr(torch.optim, "Muon", None)  # torch 2.9 and newer
    return model, [(kind or torch.optim.SGD)(first, lr=0.01), torch.optim.AdamW(rest, betas=(0.9, 0.98))]


def step(model, optimizers, seed):
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))
    model(x).square().mean().backward()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        optimizer.step()
        optimizer.zero_grad()


def test_a_run_goes_on_from_its_state(tmp_path):
    path, (model, optimizers) = tmp_path / "state.safetensors", begin()
    for seed in range(3):
        step(model, optimizers, seed)
    states.write(path, {"model": model}, optimizers, {"family": "some", "step": 3, "hours": 0.25})
    assert states.about(path) == {"family": "some", "step": 3, "hours": 0.25}
    again, others = begin()
    states.read(path, {"model": again}, others)
    for seed in range(3, 6):
        step(model, optimizers, seed)
        step(again, others, seed)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["groups"])[1][0]["betas"] == [0.9, 0.98]


def test_what_cannot_be_kept_is_refused(tmp_path):
    model, optimizers = begin()
    step(model, optimizers, 0)
    weight = model[0].weight
    optimizers[1].state[weight]["note"] = "text"
    with pytest.raises(TypeError, match="note='text' of an optimizer is no tensor"):
        states.write(tmp_path / "x.safetensors", {"model": model}, optimizers, {})
    with pytest.raises(ValueError, match="JSON"):
        states.write(tmp_path / "x.safetensors", {"model": model}, [], {"hours": float("nan")})
