"""Where tests of Triton kernels run: its interpreter, a GPU, and its compiler, which needs none."""

import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import pytest
import torch

from illava.attention import streaming

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
PLACES = [pytest.param("interpreter", marks=needs_triton), pytest.param("cuda", marks=pytest.mark.gpu)]


# ---------------------------------------------------------------- interpreted


def prepare_worker():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN


def any_kernel(x):
    return streaming.log_sum_exp(x, x, scale=1.0, backend="triton")


@contextmanager
def interpreting():
    """Calls a function with kernels interpreted, in a process of its own: Triton reads `TRITON_INTERPRET`
    when it is imported. Fresh memory is filled with NaN there, so that a number nobody wrote is seen.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), prepare_worker) as worker:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            try:
                worker.submit(any_kernel, torch.ones(1, 1, 1, 16)).result()  # starts the process
            except Exception as error:
                if "only 0-dimensional arrays" not in str(error):
                    raise
                pytest.skip("the interpreter of this old Triton cannot loop with this NumPy")
        yield lambda function, *args, **more: worker.submit(function, *args, **more).result()


# ---------------------------------------------------------------- compiled

MATRIX_UNITS = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}  # Ampere, Hopper, Blackwell: their instructions


def ptx(function, capability, types, fixed, **options):
    """PTX of a kernel whose pointers are aligned as torch's are.

    Args:
        types: of arguments, as Triton names them; `i32` for those not named.
        fixed: the values of those that are constants, and of any the kernel does not have.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = function.arg_names
    signature = {name: "constexpr" if name in fixed else types.get(name, "i32") for name in names}
    source = ASTSource(
        function,
        signature,
        {(names.index(name),): value for name, value in fixed.items() if name in names},
        {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")},
    )
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]


def assert_wide_copies(compiled, *others):
    """Vectors are copied ahead of use, 16 bytes at a time; `others` are sizes of what else may be."""
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[.*?\], \[.*?\], (\w+)", compiled)
    assert copies.count("0x10") > 4
    assert set(copies) <= {"0x10", *others}


# ---------------------------------------------------------------- on a GPU


def on_cuda(function, *args, **more):
    """Calls a function with its tensors on the GPU, and brings back what it returns."""

    def move(x):
        return x.cuda() if isinstance(x, torch.Tensor) else x

    out = function(*map(move, args), **{name: move(x) for name, x in more.items()})
    return tuple(x.cpu() for x in out) if isinstance(out, tuple) else out.cpu()


@cache
def device_limits():
    """Bytes, bf16 operations and exponentials per second: the first two measured, the last by clock."""
    from triton.runtime import driver
    from triton.testing import do_bench

    x = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    bandwidth = 2 * x.numel() / (do_bench(lambda: x.clone()) / 1e3)
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    flops = 2 * 8192**3 / (do_bench(lambda: a @ a) / 1e3)
    found = driver.active.utils.get_device_properties(torch.cuda.current_device())
    return bandwidth, flops, 16 * found["multiprocessor_count"] * found["sm_clock_rate"] * 1e3  # kHz


def measure(call, floors, extra_bytes):
    """Runs `call` without waiting for the GPU, within its memory; prints its time and its floors.

    Args:
        floors: least seconds by what they leave out, "" for the one that leaves out nothing.
        extra_bytes: what it may take beside its inputs.
    """
    from triton.testing import do_bench

    call()  # compiled and tuned
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    used = torch.cuda.max_memory_allocated() - before
    seconds = do_bench(call, return_mode="median") / 1e3
    shares = "; ".join(f"{name} {floor / seconds:.0%}".strip() for name, floor in floors.items())
    print(
        f"\n{torch.cuda.get_device_name()}: {seconds * 1e3:.3f} ms, floor {floors[''] * 1e3:.3f} ms "
        f"({shares}), {used / 2**20:.1f} MiB beside the inputs"
    )
    assert used <= extra_bytes
    return result
