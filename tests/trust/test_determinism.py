"""The same inputs and the same seed twice give the same bits, also where torch is told to insist on it."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

import zoo
from contract import tools

SAME = "prefill and six tokens, greedy and sampled: ids, logits and cache are the same bits"
TWICE = "the same inputs and seed twice in torch's deterministic mode"

LEAST = 2 * (1 + 6 + 4)  # of a sequence, six steps' logits, and four layers' caches


def answers(model, inputs):
    """Everything a patched model gives, as tensors: greedy and sampled answers, logits, keys and values."""
    found = []
    for sampling in (dict(do_sample=False), dict(do_sample=True, top_k=20)):
        settings = dict(return_dict_in_generate=True, output_logits=True) | sampling
        out = tools.generate(model, inputs, **settings)
        held = [x for layer in out.past_key_values.layers for x in vars(layer).values()]
        found += [out.sequences, *out.logits, *(x for x in held if isinstance(x, torch.Tensor))]
    return found


def differing(family: str, device: str, dtype: torch.dtype, settings: dict | None) -> tuple[int, int]:
    """How many tensors there are, and how many of them a second run has other bits of.

    Args:
        settings: of the patch; `None` leaves the model alone.

    Deterministic mode ends with an error at operations that have no deterministic form, and fills memory that
    nobody has written yet with NaN.
    """
    model = zoo.FAMILIES[family].build(dtype=dtype).to(device)
    inputs = tools.prompt_of(family, tools.mixed(family), dtype=dtype)
    inputs = {name: x.to(device) for name, x in inputs.items()}
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        if settings is None:
            first, second = answers(model, inputs), answers(model, inputs)
        else:
            with tools.patch(model, family, **settings) as handle:
                first, second = answers(model, inputs), answers(model, inputs)
                assert handle.report.reduction > 0.6
    finally:
        torch.use_deterministic_algorithms(before)
    pairs = zip(first, second, strict=True)
    return len(first), sum(not torch.equal(one, other) for one, other in pairs)


@pytest.mark.claim("Determinism", f"{TWICE}, on a CPU", "works", SAME)
@tools.each_rule
@tools.each_family
def test_the_same_bits_on_a_cpu(family, settings):
    tensors, others = differing(family, "cpu", torch.float32, settings)
    assert tensors >= LEAST
    assert others == 0


@pytest.fixture(scope="module")
def worker():
    """A process of its own, for cuBLAS reads its setting once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as torch's deterministic mode asks
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as worker:
            worker.submit(abs, 1).result()  # starts it
            yield worker


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here; it runs with pytest -m gpu")
@pytest.mark.claim("Determinism", f"{TWICE}, on CUDA", "works", SAME)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@tools.each_rule
@tools.each_family
def test_the_same_bits_on_cuda(family, settings, dtype, worker):
    def differ(settings):
        return worker.submit(differing, family, "cuda", dtype, settings).result()

    try:
        tensors, others = differ(settings)
    except RuntimeError:  # illava's, unless the unpatched model ends with one as well
        with pytest.raises(RuntimeError, match="deterministic") as error:
            differ(None)
        pytest.skip(f"without illava, too: {str(error.value).splitlines()[0]}")
    assert tensors >= LEAST
    assert others == 0
