"""Which units are most alike: plain torch and the Triton kernel, against the definition in fp64.

Without a GPU the kernel runs in Triton's interpreter; under `-m gpu` the same tests run compiled, on CUDA.
"""

import math
import warnings
from itertools import pairwise

import pytest
import torch

from illava import bipartite, kernels, matching
from on_triton import MATRIX_UNITS, assert_wide_copies, device_limits, measure, ptx

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
AWKWARD = [1, 2, 3, 63, 64, 65, 130, 257]


def segments(counts, size, dtype=FP32, seed=0):
    """Features that are alike in groups, a table of units and where each stands."""
    draw = torch.Generator().manual_seed(seed)
    total = sum(counts)
    kinds = torch.randn(7, size, generator=draw) * 3
    x = kinds[torch.randint(0, 7, (total,), generator=draw)] + torch.randn(total, size, generator=draw)
    starts = torch.tensor([0, *counts]).cumsum(0)[:-1]
    index = (starts[:, None] + torch.arange(max(counts))).clamp(max=total - 1)
    grid = torch.stack([torch.randint(0, side, (total,), generator=draw) for side in (2, 9, 7)], dim=1)
    return x.to(dtype), index, grid


def by_definition(x, index, counts, penalty=0.0, grid=None):
    """For each unit at an even place of a segment: its cosines with all at odd ones, in fp64."""
    x = x.double()
    for row, count in enumerate(counts):
        own = index[row, :count].tolist()
        for place in range(0, count, 2):
            found = []
            for other in range(1, count, 2):
                one, two = x[own[place]], x[own[other]]
                alike = (one @ two / (one.norm() * two.norm())).item()
                if not math.isfinite(alike):
                    alike = -1.0
                if penalty:
                    frames, *steps = (grid[own[place]] - grid[own[other]]).abs().tolist()
                    alike -= 0.0 if frames + max(steps) <= 1 else penalty
                found.append(alike)
            yield row, place, found


def assert_best(found, x, index, counts, penalty=0.0, grid=None, tolerance=2e-6):
    """Each match is the best but for rounding in fp32, and its cosine is what it says."""
    likeness, match = found
    assert likeness.dtype == FP32
    assert likeness.shape == match.shape == index.shape
    for row, place, cosines in by_definition(x, index, counts, penalty, grid):
        if not cosines:
            continue
        chosen = match[row, place].item()
        assert chosen % 2 == 1
        assert cosines[chosen // 2] == pytest.approx(likeness[row, place].item(), abs=tolerance)
        assert cosines[chosen // 2] >= max(cosines) - tolerance
    odd = torch.arange(1, index.shape[1], 2)
    assert (match[:, 1::2] == odd).all()
    assert (likeness[:, 1::2] == -2 - penalty).all()
    assert ((match >= 0) & (match < index.shape[1])).all()  # what pads a row is read, too


def by_kernel(*args, **more):
    return matching.matches(*args, **more, backend="triton")


def on_a_large_device(*args):
    """With as many programs as a GPU wants, each for some of the odd places."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "processors", lambda _: 132)
        return by_kernel(*args)


def joined_by(backend, features, index, counts, keeps, grid):
    """What becomes of units if likeness is computed there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "likeness_backend", lambda *_: backend)
        ones = torch.ones(len(features), device=features.device)
        return bipartite.join(features, ones, index, counts, keeps, distance_penalty=0.2, grid=grid).owner


@pytest.mark.parametrize("penalty", [0.0, 0.3])
@pytest.mark.parametrize(
    ("counts", "size", "dtype"),
    [
        (AWKWARD, 24, FP32),
        (AWKWARD, 24, BF16),
        ([301], 64, BF16),
        ([40, 5], 200, FP16),  # no whole number of blocks of channels
        ([40, 5], 17, BF16),  # rows that begin nowhere near a whole load
        ([1, 1], 16, FP32),
    ],
)
def test_the_best_is_found(run, counts, size, dtype, penalty):
    x, index, grid = segments(counts, size, dtype)
    where = (x, index, counts, penalty, grid if penalty else None)
    assert_best(run(by_kernel, *where), *where)
    assert_best(matching.matches(*where), *where)


@pytest.mark.parametrize("penalty", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_work_is_split_and_put_together_again(run, dtype, penalty):
    counts = (601, 90)
    x, index, grid = segments(counts, 20, dtype)
    where = (x, index, counts, penalty, grid if penalty else None)
    found = run(on_a_large_device, *where)
    assert_best(found, *where)
    real = torch.arange(601) < torch.tensor(counts)[:, None]
    for one, other in zip(found, run(by_kernel, *where), strict=True):
        assert torch.equal(one[real], other[real]), "the same bits, however many programs"


@pytest.mark.parametrize("dtype", [FP32, FP16])
def test_the_first_of_equals(run, dtype):
    """Across tiles and programs, too: all are one of three vectors, without a rounding error."""
    x = torch.eye(3, 16)[torch.arange(600) % 3].to(dtype)  # [600, 16]
    where = (x, torch.arange(600)[None], (600,))
    for likeness, match in (run(by_kernel, *where), run(on_a_large_device, *where), matching.matches(*where)):
        assert (likeness[0, ::2] == 1).all()
        first = {kind: min(n for n in range(1, 600, 2) if n % 3 == kind) for kind in range(3)}
        assert match[0, ::2].tolist() == [first[n % 3] for n in range(0, 600, 2)]


def test_what_is_not_finite_is_like_nothing(run):
    x, index, _ = segments([150], 32, FP16)
    x[[3, 8, 140]] = torch.tensor([math.nan, math.inf, -math.inf], dtype=FP16)[:, None]
    x[[20, 21]] = 0
    for likeness, match in (run(by_kernel, x, index, (150,)), matching.matches(x, index, (150,))):
        assert likeness[0, [8, 140]].tolist() == [-1, -1]
        assert likeness[0, 20] == 0
        assert 3 not in match[0, ::2].tolist()
        assert likeness.isfinite().all()


def test_long_features_lose_no_digits(run):
    """Norms come after products: what is 1,000 times longer is as alike."""
    x, index, _ = segments([90], 64, BF16)
    longer = x * torch.logspace(-3, 6, 90)[:, None].bfloat16()
    found = run(by_kernel, longer, index, (90,))
    assert_best(found, longer, index, (90,))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_the_same_become_one(run, dtype):
    """In several rounds, of means in fp32; the third segment stays whole."""
    counts, keeps = (70, 31, 9, 2), (12, 30, 9, 1)
    x, index, grid = segments(counts, 40, dtype, seed=3)
    features = x.unflatten(1, (2, 20))  # [U, g, d]
    found = run(joined_by, "triton", features, index, counts, keeps, grid)
    assert torch.equal(found, joined_by("torch", features, index, counts, keeps, grid))


def test_blocks_of_plain_torch_change_nothing(monkeypatch):
    x, index, grid = segments((31, 17), 12, seed=6)
    likeness, match = matching.matches(x, index, (31, 17), 0.3, grid)
    monkeypatch.setattr(matching, "BLOCK_ELEMENTS", 64)
    found = matching.matches(x, index, (31, 17), 0.3, grid)
    torch.testing.assert_close(found[0], likeness)
    assert torch.equal(found[1], match)


# ---------------------------------------------------------------- choice


def test_choice(monkeypatch):
    monkeypatch.setattr(kernels, "has_triton", lambda: True)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert matching.likeness_backend(cpu, BF16) == "torch"
    for capability, expected in {(7, 5): "torch", (8, 0): "triton", (12, 0): "triton"}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, is_=capability: is_)
        assert matching.likeness_backend(cuda, BF16) == expected
    assert matching.likeness_backend(cuda, torch.float64) == "torch"
    monkeypatch.setattr(kernels, "has_triton", lambda: False)
    assert matching.likeness_backend(cuda, BF16) == "torch"
    with pytest.raises(ValueError, match='"triton" or "torch", not \'cuda\''):
        matching.matches(*segments([4], 8)[:2], (4,), backend="cuda")


def test_a_kernel_that_fails_says_so_once(monkeypatch):
    """As if these CPU tensors were on a GPU where nothing compiles."""

    def fail(*args):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(matching.KERNELS, "failed", set())
    monkeypatch.setattr(matching, "_by_kernel", fail)
    monkeypatch.setattr(
        matching, "likeness_backend", lambda *_: "torch" if matching.KERNELS.failed else "triton"
    )
    x, index, _ = segments([20], 8)
    with pytest.raises(RuntimeError, match="no compiler"):
        by_kernel(x, index, (20,))
    with pytest.warns(RuntimeWarning, match="kernel for likeness does not run on cpu .RuntimeError: no comp"):
        found = matching.matches(x, index, (20,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = matching.matches(x, index, (20,))
    assert all(map(torch.equal, found, again))
    assert_best(found, x, index, (20,))


# ---------------------------------------------------------------- compiled, for GPUs


@pytest.mark.parametrize(("capability", "matrix_units"), MATRIX_UNITS.items())
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_compiles_to_a_pipeline_of_wide_copies(dtype, capability, matrix_units, tmp_path, monkeypatch):
    """Features go to the matrix units by copies of 16 bytes ahead of use: easily lost in a small change."""
    pytest.importorskip("triton", minversion="3.4")  # older ones know fewer GPUs
    from illava import matching_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    even, odd, channels, warps, stages = matching.FULL if dtype == "fp32" else matching.HALF
    fixed = dict(D=5120, GRID=True, WIDEN=False, BLOCK_EVEN=even, BLOCK_ODD=odd, BLOCK_D=channels)
    types = dict.fromkeys(["inverse_norms", "cosines"], "*fp32") | dict.fromkeys(["index", "counts"], "*i64")
    types |= dict(x=f"*{dtype}", grid="*i32", places="*i32", penalty="fp32")
    compiled = ptx(
        matching_kernel.best_match, capability, types, fixed,
        num_warps=warps, num_stages=stages, **kernels.OPTIONS,
    )  # fmt: skip
    assert matrix_units in compiled
    assert_wide_copies(compiled)
    if (capability, dtype) == (90, "bf16"):
        assert "wgmma.wait_group.sync.aligned 1" in compiled, "products wait for those just begun"


# ---------------------------------------------------------------- at real sizes, on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("counts", "size"), [([16384], 5120), ([4096], 5120), ([256] * 64, 5120), ([4000, 700], 3584)], ids=str
)
def test_real_pictures(counts, size):
    """Merge units of Qwen2.5-VL's encoder, of pictures and of a video's frames; tokens of its decoder."""
    x, index, grid = (t.cuda() for t in segments(counts, size, BF16))
    given = (x, index, counts, 0.2, grid)
    expected = matching.matches(*given, backend="torch")
    operations = sum(2 * ((n + 1) // 2) * (n // 2) * size for n in counts)
    floor = max(operations / device_limits()[1], x.nbytes / device_limits()[0])
    likeness, match = measure(lambda: by_kernel(*given), {"": floor}, 2**24)
    torch.testing.assert_close(likeness, expected[0], rtol=0, atol=2e-6)
    assert (match == expected[1]).float().mean() > 0.999  # others are as alike to fp32's rounding


@pytest.mark.gpu
def test_no_compilation_per_picture_size():
    from illava.matching_kernel import best_match

    compiled = []
    for count in (1000, 1024, 777, 336, 300):
        x, index, grid = (t.cuda() for t in segments([count], 1280, BF16))
        by_kernel(x, index, (count,), 0.2, grid)
        compiled.append(len(best_match.device_caches[torch.cuda.current_device()][0]))
    assert all(after == before for before, after in pairwise(compiled))
