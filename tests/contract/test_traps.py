"""Traps that other projects fell into, and the tests that fail if a family falls into one.

| trap | tests (files without the `test_`) |
|---|---|
| 1 log-sum-exp for attention received | same_as_reference: every_prompt; lse in every_plan |
| 2 text lost | same_as_reference: every position that survives; counts: cache_lengths |
| 3 positions of the wrong tokens | same_as_reference: every_prompt |
| 4 reduction undone | counts: units as the reference and as the plan count them |
| 5 deepstack counts stale | same_as_reference of Qwen3-VL, whose taps all see other survivors |
| 6 windows | same_as_reference of Qwen2.5-VL, whose windows the picture's edge cuts |
| 7 masks | batches; turns |
| 8 positions renumbered | same_as_reference: every_prompt, generated_tokens |
| 9 hard-coded token offsets | here: prompt_length_does_not_matter_to_the_encoder |
| 10 batch of one | batches; counts: report_and_cache_of_a_batch |
| 11 phase guessed from length | here: text_of_one_token, chunked_prefill; turns |
| 12 hidden cost | here: no_attention_weights, nothing_as_large_as_all_pairs, no_loop_over_tokens |
| 13 global state | no_trace: another_model_of_the_family_is_untouched |
"""

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import zoo
from contract import recorder, tools
from contract.recorder import Recorder
from illava import groups, matching
from illava.attention import streaming
from zoo.common import V5, Image


def picture_of(family) -> Image:
    return tools.pictures_of(zoo.FAMILIES[family].KINDS["one picture"])[0]


@tools.each_family
def test_prompt_length_does_not_matter_to_the_encoder(family, monkeypatch):
    """Trap 9: behind whatever text, a picture keeps the same units with the same features."""
    model, picture, kept = tools.build(family), picture_of(family), []
    for text in ([1, picture], [2, picture, 5], [40, picture, 33]):
        with monkeypatch.context() as scope, tools.patch(model, family, **tools.DEEP):
            recorder = Recorder(scope)
            tools.forward(model, tools.prompt(family, text))
        kept.append(
            [(block, units, [f.tolist() for f in found]) for _, block, units, found in recorder.vision]
        )
    assert kept[0]
    assert kept[0] == kept[1] == kept[2]


@pytest.mark.capability("text only")
@tools.each_family
def test_text_of_one_token(family):
    """Trap 11: a prompt as short as a step of decoding, on a patch that would merge."""
    model, ids = tools.build(family), tools.prompt_of(family, "text only")["input_ids"][:, :1]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = tools.forward(model, inputs).logits, tools.generate(model, inputs, do_sample=False)
    with tools.patch(model, family, **tools.DEEP):
        assert torch.equal(expected[0], tools.forward(model, inputs).logits)
        assert torch.equal(expected[1], tools.generate(model, inputs, do_sample=False))


@pytest.mark.capability("text only")
@tools.each_family
def test_chunked_prefill_of_text(family):
    """Trap 11: chunks of many tokens that bring no picture."""
    model, inputs = tools.build(family), tools.prompt(family, [23])
    chunks = dict(do_sample=False, prefill_chunk_size=4)
    tools.forward(model, inputs)  # 4.57's Qwen2-VL and Qwen2.5-VL cannot begin with chunks, patched or not
    expected = tools.generate(model, inputs, **chunks)
    with tools.patch(model, family, **tools.DEEP):
        assert torch.equal(expected, tools.generate(model, inputs, **chunks))


@pytest.mark.skipif(not V5, reason="transformers 4.57 cannot cut pictures into chunks")
@tools.each_family
def test_chunked_prefill_of_pictures(family):
    """Trap 11: a picture's features may come in several chunks, each a call of the language model.

    A chunk with tokens of several pictures is refused, see tests/trust/test_calls.py.
    """
    kinds = zoo.FAMILIES[family].KINDS
    whole = (
        "one picture, 4x" if "one picture, 4x" in kinds else "one picture"
    )  # MiniCPM-V's others are sliced
    model, inputs = tools.build(family), tools.prompt_of(family, whole)
    chunks = dict(prefill_chunk_size=24)
    expected = tools.greedy(model, inputs, **chunks)
    with tools.patch(model, family, **tools.NOTHING["every merge idle"]):
        ids, logits, _ = tools.greedy(model, inputs, **chunks)
    assert torch.equal(ids, expected[0])
    assert torch.equal(logits, expected[1])
    with tools.patch(model, family, **tools.DEEP):
        ids, logits, cache = tools.greedy(model, inputs, **chunks)
    assert logits.isfinite().all()
    assert cache.get_seq_length() == expected[2].get_seq_length()
    assert sum(n or 0 for n in tools.held(cache)) < sum(n or 0 for n in tools.held(expected[2]))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@tools.each_family
def test_no_attention_weights_are_asked_for(family, attention):
    """Trap 12: not even in the layers that merge."""
    model, inputs = tools.build(family, attention), tools.prompt_of(family, tools.mixed(family))
    asked, hooks = [], []

    def spy(module, args, kwargs):
        if kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False):
            asked.append(type(module).__name__)

    for module in model.modules():
        if hasattr(module, "config"):
            hooks.append(module.register_forward_pre_hook(spy, with_kwargs=True))
    with tools.patch(model, family, **tools.DEEP):
        out = tools.forward(model, inputs)
    for hook in hooks:
        hook.remove()
    assert out.attentions is None
    assert not asked


class OwnWork(TorchDispatchMode):
    """Tensors made, and operations run, by illava's own code: not by Hugging Face's, called back or not."""

    def __init__(self):
        super().__init__()
        self.largest, self.operations = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        frame = sys._getframe(1)
        while frame is not None:
            name = frame.f_code.co_filename
            if name == recorder.__file__:
                break
            if "/illava/" in name:
                self.operations += 1
                tensors = out if isinstance(out, (list, tuple)) else [out]
                # What is merely expanded takes no memory.
                sizes = [
                    t.untyped_storage().nbytes() // t.itemsize for t in tensors if isinstance(t, torch.Tensor)
                ]
                self.largest = max([self.largest, *sizes])
                break
            if "/transformers/" in name:
                break
            frame = frame.f_back
        return out


def work(family, rows, settings, monkeypatch):
    """illava's own work in one call, and the tokens of its encoder calls and of the language model."""
    model, inputs = tools.build(family), tools.prompt(family, *rows)
    seen = Recorder(monkeypatch)
    with tools.patch(model, family, **settings), OwnWork() as mode:
        tools.forward(model, inputs)
    tokens = [call.layout.total_tokens for call in seen.calls]
    return mode, [*tokens, inputs["input_ids"].numel()]


@tools.each_rule
@tools.each_family
def test_nothing_as_large_as_all_pairs(family, settings, monkeypatch):
    """Trap 12: at most a hundred numbers a token (queries, keys and values side by side are 96).

    Blocks of scores are made as small as they go, or at these sizes one block would hold all pairs.
    """
    monkeypatch.setattr(streaming, "BLOCK_ELEMENTS_CPU", 1)
    monkeypatch.setattr(groups, "BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(matching, "BLOCK_ELEMENTS", 1)
    side = 480 if family not in ("minicpmv4_6", "minicpmv4_7") else 80
    rows = [[4, *(Image(side, side, n) for n in range(4)), 5]]
    mode, tokens = work(family, rows, settings, monkeypatch)
    assert mode.largest <= 100 * max(tokens)


@tools.each_rule
@tools.each_family
def test_no_loop_over_tokens(family, settings, monkeypatch):
    """Trap 12: four pictures cost about as many operations as one, and a large one as a small one."""
    picture = picture_of(family)
    few, _ = work(family, [[4, picture, 5]], settings, monkeypatch)
    many, _ = work(family, [[4, *[picture] * 4, 5]], settings, monkeypatch)
    assert many.operations < 1.5 * few.operations
