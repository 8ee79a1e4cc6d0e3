"""Merging never waits for a device, and a prompt waits once, where it enters the decoder.

Tensors that claim to live on a CUDA device but hold no data stand in for real ones: reading a value of
them, which on a GPU would wait for it, fails here. Copies to the device must not block either. Where values
are needed, as in entering the decoder, tensors on the CPU are taken for a device's, and reads are counted.
"""

from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

from illava import kernels, language_entry, merge, vision, vision_scores
from illava.families.layout import Layout
from illava.families.visual import VisualInput
from illava.hooks import EncoderHooks, under_way
from illava.language import LanguageCall
from illava.plan import Plan
from illava.schedule import resolve
from illava.vision import VisionCall

CUDA = torch.device("cuda:0")


class NoBlockingCopies(TorchDispatchMode):
    """Fails on a copy between host and device that waits."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is torch.ops.aten._to_copy.default and isinstance(args[0], torch.Tensor):
            moves = args[0].device.type != out.device.type
            assert not moves or kwargs.get("non_blocking"), f"blocking copy {args[0].device} -> {out.device}"
        return out


class OnDevice(TorchFunctionMode):
    """Takes some tensors, and what is computed of them, for a device's; names reads of their values.

    Args:
        there: the tensors.

    A copy by `to` is not seen: the device that is played here is the CPU itself.
    """

    READS = (
        "__bool__", "__int__", "__float__", "__index__", "item", "tolist", "cpu", "numpy", "nonzero",
        "equal", "allclose", "masked_select", "unique", "bincount",
    )  # fmt: skip

    def __init__(self, *there):
        super().__init__()
        self.there, self.reads = {id(x): x for x in there}, []  # held on to: an id is one tensor's

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if any(id(x) in self.there for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)):
            found = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
            if func.__name__ in self.READS:
                self.reads.append(func.__name__)
                out = out.clone() if isinstance(out, torch.Tensor) else out  # `cpu` gives what is there back
            elif func is torch.Tensor.__getitem__ and self._by_values(args[1]):
                self.reads.append("by mask")
            else:
                self.there.update((id(x), x) for x in found)
        return out

    def _by_values(self, index):
        """Whether values say how much comes out."""
        parts = [x for x in tree_leaves(index) if isinstance(x, torch.Tensor)]
        return any(x.dtype == torch.bool and id(x) in self.there for x in parts)


@pytest.fixture
def device(monkeypatch):
    if Version(torch.__version__) < Version("2.7"):
        pytest.skip("torch 2.6 asks CUDA's driver about tensors that only claim to live on a device")
    # Kernels cannot run on tensors without data; what calls them is what is looked at here.
    monkeypatch.setattr(kernels, "has_triton", lambda: False)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, NoBlockingCopies():
        yield mode


def test_the_stand_in_notices_a_wait(device):
    x = torch.empty(3, device=CUDA)
    with pytest.raises(Exception, match="_local_scalar_dense"):
        x.sum().item()
    with pytest.raises(AssertionError, match="blocking copy"):
        torch.ones(3).to(CUDA)


def test_the_count_of_reads_notices_them():
    mask, ids = torch.ones(2, 5), torch.arange(5)
    with OnDevice(mask) as counted:
        assert bool(ids.any())
        assert mask.shape == (2, 5)
        (mask[:, 1:].bool() & (ids[1:] > 0)).all(dim=1)
    assert counted.reads == []
    with OnDevice(mask) as counted:
        if (mask[:, 1:] > 0).all():
            ids[mask[0] > 0].tolist()
        mask.sum(1).tolist()
    assert counted.reads == ["__bool__", "by mask", "tolist"]


@pytest.mark.parametrize("rule", ["recycle", "prune", "linear"])
def test_selecting_and_blending(device, rule):
    table = torch.empty(3, 40, dtype=torch.long, device=CUDA)
    units = torch.empty(120, 4, 2, 16, device=CUDA)
    decision = merge.select(
        torch.empty(3, 40, device=CUDA), table, [40, 30, 40], [10, 10, 12],
        total_units=120, rule=rule, queries=units, keys=units,
    )  # fmt: skip
    assert decision.kept_table.device == CUDA
    decision.blend(torch.empty(120, 4, 32, device=CUDA))


class Parts:
    full_attention_blocks = frozenset(range(4))
    window_patches = 0
    dead_rows = float("-inf")
    regrid = None


LAYOUTS = {
    "packed frames": Layout(((1, 8, 12), (3, 6, 6)), 2),
    "tiles with CLS": Layout(((1, 8, 8),) * 3, 2, raster=True, prefix=1, row_tokens=65),
    "padded slices": Layout(((1, 8, 8), (1, 5, 9)), 1, raster=True, row_tokens=64),
}


@pytest.mark.parametrize("rule", ["bipartite", "recycle"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_merging_in_the_encoder(device, layout, rule):
    plan = resolve(
        Plan((0, 1), (), 0.5, merge=rule),
        vit_ranked=(),
        llm_ranked=(),
        vit_depth=4,
        llm_depth=4,
        merge_size=layout.side,
    )
    call = VisionCall(plan, Parts, layout, CUDA, "sdpa")
    for block in (0, 1):
        stage = call.stage(block)
        rows, width = (
            (1, len(stage.tokens)) if layout.row_tokens is None else (len(layout.frames), stage.width)
        )
        q = torch.empty(rows, width, 2, 16, device=CUDA, dtype=torch.bfloat16)
        call.begin_attention(block, None)
        call.decide_observed(q, q, 0.25)
        hidden = torch.empty(rows, width, 32, device=CUDA, dtype=torch.bfloat16)
        call.merge(block, hidden)
    call.full_grid(call.merged[1], call.stages[-1])


class Windowed(Parts):
    full_attention_blocks = frozenset({3})
    window_patches = 16


@pytest.mark.parametrize("rule", ["bipartite", "recycle"])
@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2"])
def test_merging_in_windows(device, monkeypatch, implementation, rule):
    """How many tokens of a window survived a merge only the device knows, and nobody asks it."""

    def attend(q, k, v, spans, *, scale, backend):
        assert spans.longest <= 16
        return torch.empty_like(q), torch.empty(q.shape[:2], device=CUDA)

    def received(q, k, lse, spans, *, scale, unit=1):
        assert unit == 4, "units stand side by side: the kernel averages over them"
        assert spans.tokens is None
        read.append(unit)
        return torch.empty(len(q) // unit, device=CUDA)

    read = []

    monkeypatch.setattr(vision, "varlen_attention", attend)
    monkeypatch.setattr(vision_scores, "varlen_attention_received", received)
    layout = Layout(((1, 8, 8), (1, 8, 12)), 2)
    asked = Plan((0, 1, 2), (), 0.5, merge=rule)
    plan = resolve(asked, vit_ranked=(), llm_ranked=(), vit_depth=4, llm_depth=4, merge_size=2)
    call = VisionCall(plan, Windowed, layout, CUDA, implementation, plan_id=-7)
    hooks = EncoderHooks(SimpleNamespace(plan=plan, seams=Windowed, fast_windows=False, number=-7))
    under_way.VISION.enter(call)
    windows = torch.empty(11, dtype=torch.int32, device=CUDA)
    for block in (0, 1, 2):
        tokens = len(call.stages[-1].tokens)
        given = {"cu_seqlens": windows}
        _, given = hooks.enter_block(None, (), given, number=block) or ((), given)
        _, given = hooks.enter_block_attention(block, (), given)
        assert given["cu_seqlens"].device.type == "cpu", "where Hugging Face reads it back"
        q = torch.empty(1, tokens, 2, 16, device=CUDA, dtype=torch.bfloat16)
        call.begin_attention(call.attending, call.bounds)
        call.attend(q, q, q, 0.25)
        call.merge(block, torch.empty(tokens, 32, device=CUDA, dtype=torch.bfloat16))
    under_way.VISION.leave(call)
    assert len(call.stages) == 4
    assert len(read) == (3 if rule == "recycle" else 0)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("queries", ["text", "all", "visual", "last", "none, by likeness"])
def test_merging_in_the_language_model(device, monkeypatch, padded, queries):
    """One transfer when the decoder is entered, and no other until it is left."""
    transfers, length = [], 40
    monkeypatch.setattr(language_entry, "to_host", lambda x: transfers.append(x.shape) or x)
    ranked = {} if "likeness" in queries else {"merge": "recycle", "queries": queries}
    plan = resolve(
        Plan((), (0, 1), 0.5, **ranked), vit_ranked=(), llm_ranked=(), vit_depth=4, llm_depth=3,
        merge_size=2, scoring_layers=frozenset(range(3)),
    )  # fmt: skip
    seams = SimpleNamespace(
        layers=range(3), scoring_layers=frozenset(range(3)), newline=None,
        language_model=SimpleNamespace(config=None),
    )  # fmt: skip
    with unset_fake_temporarily():  # what is laid out on the host needs values
        segment = torch.full((2, length), -1)
        segment[0, 5:25], segment[1, 10:30] = 0, 1
        visual = VisualInput(segment, ("image", "image"), (20, 20), ((20,), (20,)))
        mask = torch.ones(2, length, dtype=torch.long)
        mask[1, :3] = 0
        call = LanguageCall(
            plan, seams, torch.zeros(2, length, 32), visual, mask if padded else None, 0, "sdpa", 0
        )
    call.grids = [(1, 4, 5)] * 2
    assert transfers == [(2 + 2 * padded, 2, length)]
    first = call.stages[0]
    first.positions, first.entry = (torch.empty_like(x, device=CUDA) for x in (first.positions, first.entry))
    for name in ("entry_columns", "table", "_text", *(("padding_mask",) if padded else ())):
        setattr(call, name, torch.empty_like(getattr(call, name), device=CUDA))

    hidden = call.merge_input(call.enter_features(torch.empty(2, length, 32, device=CUDA)))
    rotary = tuple(call.enter(torch.empty(2, length, 8, device=CUDA)) for _ in range(2))
    cache = DynamicCache()
    call.begin(cache)
    for cached in cache.layers:  # Hugging Face's own way to begin one copies from the host
        cached.keys = cached.values = torch.empty(2, 2, 0, 16, device=CUDA)
        cached.is_initialized = True
    for layer in range(3):
        q, k = (torch.empty(2, heads, hidden.shape[1], 16, device=CUDA) for heads in (4, 2))
        keys, _ = cache.layers[layer].update(k, k)
        if layer in call.scored:
            call.attended[layer] = q, keys, 0.25
        if layer in call.merging:
            hidden = call.leave_layer(layer, hidden, rotary)
            rotary = call.layers.now.rotary
    assert len(call.stages) == 3
    assert call.leave(hidden, 3).shape == (2, length, 32)
    assert len(transfers) == 1


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("past", [0, 3])
@pytest.mark.parametrize("hidden", [None, "nothing", "in the cache", "in the prompt"])
def test_entering_the_decoder_waits_once(hidden, past, traced):
    """All that is read of features and mask comes over in one transfer, whatever the mask hides."""
    length = 12
    segment = torch.full((2, length), -1)
    segment[:, 3:9] = torch.tensor([[0], [1]])
    visual = VisualInput(segment, ("image", "image"), (6, 6), ((6,), (6,)))
    embeds = torch.randn(2, length, 8)
    embeds[0, 4:6] = float("-inf")
    embeds[:, 7] = newline = torch.ones(8)
    mask = None if hidden is None else torch.ones(2, past + length, dtype=torch.long)
    if hidden == "in the cache":
        mask[1, :past] = 0
    elif hidden == "in the prompt":
        mask[1, past : past + 2] = 0
    there = [embeds, newline] + ([] if mask is None else [mask])
    with OnDevice(*there) as counted:
        entry = language_entry.enter(embeds, visual, mask, newline, past, past + length, traced)
    assert counted.reads == ["cpu"]
    assert entry.unpadded == (mask is None or bool(mask.all()))
    assert entry.lost_any
    assert entry.stage.row_lengths == (length - 2, length - 2 * (hidden == "in the prompt"))
