"""Several threads on one model, several models in one process, tasks of one thread."""

import asyncio
import contextvars
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import illava
import zoo
from contract import tools
from trust import faults
from zoo.common import V5, Image

THREADS = 8


def claim(name, how):
    return pytest.mark.claim("Threads", name, "works", how)


def prompts(family, sizes: bool) -> list[dict]:
    """A prompt for each thread: other pictures, other text; with `sizes` other sizes too, and text alone."""
    image = tools.pictures_of(zoo.FAMILIES[family].KINDS["one picture"])[0]
    steps = [(0, 0), (1, 0), (0, 1), (1, 1)] if sizes else [(0, 0)] * 4
    unit = 56
    made = []
    for i in range(THREADS):
        high, wide = steps[i % 4]
        picture = Image(image.height + high * unit, image.width + wide * unit, seed=i)
        made.append(tools.prompt(family, [2 + i, picture, 3], seeds=[i]))
    return [*made[:-1], tools.prompt(family, [9], seeds=[8])] if sizes else made


def at_once(calls) -> list:
    """Every call in a thread of its own, all let go at the same moment."""
    barrier = threading.Barrier(len(calls))

    def run(call):
        torch.set_num_threads(1)
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def equal(found, expected) -> None:
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert faults.same(one, other), f"thread {i}"


@claim("eight threads generating at once on one model, other pictures in each",
       "each thread's logits and cache are bit for bit those of the same call alone")  # fmt: skip
@faults.some_families
def test_eight_threads(family):
    if not V5 and family == "llava_onevision":
        pytest.skip("serve several threads: 4.57 records the encoder's hidden states by swapping its methods")
    model = tools.build(family)
    # transformers 4.57 keeps Qwen's rope_deltas on the model, where threads with pictures of other sizes
    # would read each other's, patched or not.
    sizes = V5 or not hasattr(model.model, "rope_deltas")
    inputs = prompts(family, sizes)
    with tools.patch(model, family, **tools.DEEP):
        expected = [faults.answer(model, x) for x in inputs]
        for _ in range(2):
            equal(at_once([lambda x=x: faults.answer(model, x) for x in inputs]), expected)


@claim("a thread that fails beside threads that go on",
       "an exception or Ctrl-C in four of eight; the other four's answers are the same bits")  # fmt: skip
@pytest.mark.parametrize("error", [faults.FailureError, KeyboardInterrupt])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl"])
def test_threads_that_fail(family, error):
    model, inputs = tools.build(family), prompts(family, sizes=False)
    failing = threading.local()

    def fail(*_):
        if getattr(failing, "now", False):
            raise error()

    def call(number):
        if number % 2:
            return faults.answer(model, inputs[number])
        failing.now = True
        with pytest.raises(error):
            faults.answer(model, inputs[number])
        failing.now = False
        return faults.answer(model, inputs[number])

    with tools.patch(model, family, **tools.DEEP):
        expected = [faults.answer(model, x) for x in inputs]
        hooks = [tools.blocks(model)[3].register_forward_hook(fail)]
        hooks.append(tools.layers(model)[1].register_forward_hook(fail))
        try:
            equal(at_once([lambda i=i: call(i) for i in range(THREADS)]), expected)
        finally:
            for hook in hooks:
                hook.remove()


@claim("models of several families with a plan each, one thread a model", "bit for bit as alone")
def test_several_models_at_once():
    plans = [tools.MAIN, tools.DEEP, dict(llm_layers=()), dict(vit_layers=()), dict(merge="prune")]
    models, handles, calls = [], [], []
    for number, family in enumerate(zoo.FAMILIES):
        model, inputs = tools.build(family), tools.prompt_of(family, "batch")
        handles.append(tools.patch(model, family, **plans[number % len(plans)]))
        models.append(model)
        calls.append(lambda model=model, inputs=inputs: faults.answer(model, inputs))
    expected = [call() for call in calls]
    equal(at_once(calls), expected)
    for handle in handles[::2]:
        handle.remove()  # the others go on
    equal([call() for call in calls[1::2]], expected[1::2])


@claim("two models of one family with other plans, taking turns within one thread",
       "encoding, prefill and decoding of both interleaved, bit for bit as alone")  # fmt: skip
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_next"])
def test_two_models_in_turns(family):
    models = [zoo.FAMILIES[family].build(seed=seed) for seed in (0, 1)]
    inputs = tools.prompt_of(family, tools.mixed(family))
    handles = [
        tools.patch(m, family, **plan) for m, plan in zip(models, (tools.MAIN, tools.DEEP), strict=True)
    ]

    def alone(model):
        out = tools.forward(model, inputs, use_cache=True)
        return out.logits, out.past_key_values

    expected = [alone(model) for model in models]
    reports = [str(handle.report) for handle in handles]
    # The second model's whole call runs inside the first one's, behind its encoder and in its decoder.
    for module in (tools.blocks(models[0])[-1], tools.layers(models[0])[1]):
        inner = []
        hook = module.register_forward_hook(lambda *_, inner=inner: inner.append(alone(models[1])) and None)
        outer = alone(models[0])
        hook.remove()
        assert torch.equal(outer[0], expected[0][0])
        assert all(torch.equal(logits, expected[1][0]) for logits, _ in inner)
        assert inner
        assert [str(handle.report) for handle in handles] == reports


@claim("asyncio tasks that take turns between encoding and forward", "bit for bit as alone")
def test_tasks():
    family = "internvl"
    model, inputs = tools.build(family), prompts(family, sizes=False)[:4]

    async def task(x, pause):
        await asyncio.sleep(0)
        image = model.get_image_features(pixel_values=x["pixel_values"])
        if pause:
            await asyncio.sleep(0)  # another task encodes and answers in between
        logits = tools.forward(model, x).logits
        await asyncio.sleep(0)
        return getattr(image, "pooler_output", image), logits

    async def all_of(pause):
        return await asyncio.gather(*(task(x, pause) for x in inputs))

    with tools.patch(model, family, **tools.DEEP), torch.no_grad():
        alone = contextvars.copy_context().run(asyncio.run, all_of(False))
        together = asyncio.run(all_of(True))
    for (_, one), (_, other) in zip(alone, together, strict=True):
        assert torch.equal(one, other)


@claim("patching and removing one model while another generates in a thread", "bit for bit as alone")
def test_patching_beside_a_running_model():
    first, second = (zoo.FAMILIES[name].build(seed=0) for name in ("qwen2_5_vl", "internvl"))
    inputs = tools.prompt_of("qwen2_5_vl", "batch")
    tools.patch(first, "qwen2_5_vl", **tools.DEEP)
    expected = faults.answer(first, inputs)
    done = threading.Event()

    def coming_and_going():
        count = 0
        while not done.wait(0.002):  # without a pause, the other thread would hardly ever have its turn
            with tools.patch(second, "internvl", **tools.DEEP):
                count += 1
        return count

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(coming_and_going)
        try:
            found = [faults.answer(first, inputs) for _ in range(10)]
        finally:
            done.set()
        assert other.result() > 3
    equal(found, [expected] * 10)
    illava.unpatch(first)
