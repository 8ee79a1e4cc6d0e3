"""illava's own code never waits for a device.

Tensors that claim to live on a CUDA device but hold no data stand in for real ones: reading a value of
them, which on a GPU would wait for it, fails here. Copies to the device must not block either.
"""

import pytest
import torch
from packaging.version import Version
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from illava import merge
from illava.attention import column_sums
from illava.families.layout import Layout
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


@pytest.fixture
def device(monkeypatch):
    if Version(torch.__version__) < Version("2.7"):
        pytest.skip("torch 2.6 asks CUDA's driver about tensors that only claim to live on a device")
    # Kernels cannot run on tensors without data; what calls them is what is looked at here.
    monkeypatch.setattr(column_sums, "_has_triton", lambda: False)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, NoBlockingCopies():
        yield mode


def test_the_stand_in_notices_a_wait(device):
    x = torch.empty(3, device=CUDA)
    with pytest.raises(Exception, match="_local_scalar_dense"):
        x.sum().item()
    with pytest.raises(AssertionError, match="blocking copy"):
        torch.ones(3).to(CUDA)


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
    dead_rows = float("-inf")


LAYOUTS = {
    "packed frames": Layout(((1, 8, 12), (3, 6, 6)), 2),
    "tiles with CLS": Layout(((1, 8, 8),) * 3, 2, raster=True, prefix=1, row_tokens=65),
    "padded slices": Layout(((1, 8, 8), (1, 5, 9)), 1, raster=True, row_tokens=64),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_merging_in_the_encoder(device, layout):
    plan = resolve(
        Plan((0, 1), (), 0.5),
        vit_default=(),
        llm_default=(),
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
