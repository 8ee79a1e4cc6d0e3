"""On a GPU a patched model says what it says on a CPU, as an unpatched one does."""

from copy import deepcopy

import pytest
import torch

from contract import tools


def said(family, inputs, settings, device):
    """Logits `[B, L, vocabulary]` and what is left of each picture; unpatched without settings."""
    model = deepcopy(tools.build(family)).to(device)
    inputs = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    if settings is None:
        return tools.forward(model, inputs).logits.cpu(), []
    with tools.patch(model, family, **settings) as handle:
        logits = tools.forward(model, inputs).logits.cpu()
        return logits, [picture.final_tokens for picture in handle.report.pictures]


def differ(family, settings, device, monkeypatch):
    """By how much logits differ from a CPU's, on average; and whether as many tokens are left."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # it has ten bits of fp32's 23
    inputs = tools.prompt_of(family, tools.mixed(family))
    here, left = said(family, inputs, settings, "cpu")
    there, left_there = said(family, inputs, settings, device)
    assert here.shape == there.shape
    return (here - there).abs().mean().item(), left == left_there


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here; it runs with pytest -m gpu")
@tools.each_rule
@tools.each_family
def test_a_gpu_says_what_a_cpu_says(family, settings, monkeypatch):
    unpatched, _ = differ(family, None, "cuda", monkeypatch)
    patched, as_many = differ(family, settings, "cuda", monkeypatch)
    assert as_many
    assert patched <= 10 * unpatched + 1e-6
