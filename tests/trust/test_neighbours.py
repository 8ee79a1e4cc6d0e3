"""Other libraries' hooks on the same modules, in every order of attaching and removing."""

import itertools
from contextlib import contextmanager

import pytest
import torch

import illava
import zoo
from contract import tools


def claim(name, how, verdict="works"):
    return pytest.mark.claim("Neighbours", name, verdict, how)


# Each neighbour: a context that is attached inside, given a model and a folder ---------------------------


@contextmanager
def cpu_offload(model, folder):
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    cpu_offload(model, execution_device=torch.device("cpu"))
    yield
    remove_hook_from_submodules(model)


@contextmanager
def dispatched(model, folder):
    """Every other encoder block and decoder layer on disk, the rest where it was."""
    from accelerate import dispatch_model
    from accelerate.hooks import remove_hook_from_submodules

    away = {id(m) for m in (*tools.blocks(model)[::2], *tools.layers(model)[1::2])}

    def place(module, name) -> dict:
        if id(module) in away or not any(True for _ in module.children()):
            return {name: "disk" if id(module) in away else "cpu"}
        own = {f"{name}.{p}".lstrip("."): "cpu" for p in module._parameters} | {
            f"{name}.{b}".lstrip("."): "cpu" for b in module._buffers
        }
        for child, part in module.named_children():
            own |= place(part, f"{name}.{child}".lstrip("."))
        return own

    dispatch_model(model, place(model, ""), main_device="cpu", offload_dir=str(folder), force_hooks=True)
    yield
    remove_hook_from_submodules(model)
    for name in ("hf_device_map", "to", "cuda"):
        model.__dict__.pop(name, None)


@contextmanager
def hooks_everywhere(model, folder):
    """What a user's own hooks may do: look, and hand on what they were given."""
    seen, handles = [], []
    for name, module in model.named_modules():
        handles += [
            module.register_forward_pre_hook(lambda m, args, kwargs: (args, kwargs), with_kwargs=True),
            module.register_forward_hook(lambda m, args, out, name=name: seen.append(name) or out),
            module.register_forward_hook(lambda m, a, k, out: out, with_kwargs=True, prepend=True),
            module.register_forward_hook(lambda *_: None, always_call=True),
        ]
    yield
    assert len(set(seen)) > 20
    for handle in handles:
        handle.remove()


@contextmanager
def global_hooks(model, folder):
    from torch.nn.modules import module as hooks

    seen = []
    handles = [
        hooks.register_module_forward_pre_hook(lambda m, args: args),
        hooks.register_module_forward_hook(lambda m, args, out: seen.append(m) or out),
    ]
    yield
    assert seen
    for handle in handles:
        handle.remove()


@contextmanager
def profiler(model, folder):
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, with_modules=True) as watched:
        yield
    assert any("mm" in event.key for event in watched.key_averages())


@contextmanager
def flop_counter(model, folder):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        yield
    assert counter.get_total_flops() > 0


NEIGHBOURS = {
    "accelerate.cpu_offload": cpu_offload,
    "accelerate.dispatch_model, half on disk": dispatched,
    "a user's hooks on every module": hooks_everywhere,
    "torch's global module hooks": global_hooks,
    "torch.profiler": profiler,
    "torch's FLOP counter": flop_counter,
}
# a: attach, d: detach, p: patch, r: remove. A call behind each step.
ORDERS = ("apdr", "aprd", "padr", "pard")


def logits(model, inputs):
    return tools.forward(model, inputs).logits


def check_order(family, neighbour, order, folder) -> None:
    model = zoo.FAMILIES[family].build()
    inputs = tools.prompt_of(family, tools.mixed(family))
    plain = logits(model, inputs)
    with tools.patch(model, family, **tools.DEEP):
        merged = logits(model, inputs)
    assert not torch.equal(plain, merged)
    with neighbour(model, folder):  # what it leaves behind by itself is its own affair
        try:
            logits(model, inputs)
        except NotImplementedError as error:
            pytest.skip(f"be offloaded by accelerate: {error}")
    before = tools.trace(model)
    there, handle = neighbour(model, folder), None
    for number, step in enumerate(order):
        if step == "a":
            there.__enter__()
        elif step == "d":
            there.__exit__(None, None, None)
        elif step == "p":
            handle = tools.patch(model, family, **tools.DEEP)
        else:
            handle.remove()
        patched = handle is not None and handle.active
        assert torch.equal(logits(model, inputs), merged if patched else plain), order[: number + 1]
    assert tools.trace(model) == before


def mark(i: int, family: str, j: int, order: str) -> list:
    """By default one order of each neighbour. With `-m slow` all orders of two families, and one of each
    other family where the neighbour moves weights or hooks modules; with `-m soak` the rest."""
    ways = ("internvl", "qwen2_5_vl", "llava_next")
    if (family, order) == (ways[j % 3], ORDERS[j % 4]):
        return []
    slow = family in ways[1:] or (j < 3 and order == ORDERS[(i + j) % 4])
    return [pytest.mark.slow if slow else pytest.mark.soak]


CASES = [
    pytest.param(family, name, order, id=f"{family}-{name}-{order}", marks=mark(i, family, j, order))
    for (i, family), (j, name), order in itertools.product(
        enumerate(zoo.FAMILIES), enumerate(NEIGHBOURS), ORDERS
    )
]


@claim(
    "accelerate's offloading, a user's hooks, torch's own, the profiler: in every order",
    "attached and removed before, inside and around the patch: the same bits after each step, no trace",
)
@pytest.mark.parametrize(("family", "name", "order"), CASES)
def test_every_order(family, name, order, tmp_path):
    check_order(family, NEIGHBOURS[name], order, tmp_path)


# kvpress ------------------------------------------------------------------------------------------------


@contextmanager
def shortening(model):
    """What kvpress does: behind a layer's attention it throws keys and values out of that layer's cache."""

    def press(module, args, kwargs, output):
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        if layer.keys.shape[2] > 10:
            layer.keys, layer.values = layer.keys[:, :, ::2], layer.values[:, :, ::2]

    hooks = [x.self_attn.register_forward_hook(press, with_kwargs=True) for x in tools.layers(model)]
    yield
    for hook in hooks:
        hook.remove()


@claim(
    "a wrapper around every attention function of transformers, as `import kvpress` puts there",
    "put there before patching and after; the same bits",
)
@pytest.mark.parametrize("when", ["before patching", "after patching"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl"])
def test_wrapped_attention_functions(family, when, monkeypatch):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions

    model, inputs, seen = tools.build(family), tools.prompt_of(family, "one picture"), []

    def around(name, function):
        def wrapper(module, query, key, value, attention_mask, dropout, **kwargs):
            seen.append(name)
            return function(module, query, key, value, attention_mask, dropout, **kwargs)

        return wrapper

    def wrap():
        for name, function in list(functions.items()):
            monkeypatch.setitem(functions, name, around(name, function))

    with tools.patch(model, family, **tools.DEEP):
        expected = logits(model, inputs)
    if when == "before patching":
        wrap()
    with tools.patch(model, family, **tools.DEEP):
        if when == "after patching":
            wrap()
        assert torch.equal(logits(model, inputs), expected)
    assert "sdpa" in seen


PRESSED = "a cache that another tool has shortened no longer holds what illava knows of it: decoding refuses"
families = pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl"])


def check_refusal(family, pressing, error, message) -> None:
    model, inputs = tools.build(family), tools.prompt_of(family, "one picture")
    with tools.patch(model, family, **tools.DEEP):
        expected = tools.greedy(model, inputs)
        with pressing(model), pytest.raises(error, match=message):
            tools.generate(model, inputs, do_sample=False)
        assert torch.equal(tools.greedy(model, inputs)[1], expected[1])


@claim("whatever shortens a cache behind illava's back", PRESSED, "refused")
@families
def test_a_cache_shortened_by_somebody_else(family):
    check_refusal(family, shortening, illava.CacheError, "another tool .* Remove that tool")


class KnormPress:
    """As kvpress's: a bound method on each layer's attention."""

    __module__ = "kvpress.presses.knorm_press"

    def forward_hook(self, module, args, kwargs, output):
        return output

    @contextmanager
    def __call__(self, model):
        layers = [x for x in tools.layers(model) if hasattr(x, "self_attn")]
        hooks = [x.self_attn.register_forward_hook(self.forward_hook, with_kwargs=True) for x in layers]
        yield
        for hook in hooks:
            hook.remove()


@claim(
    "kvpress",
    "its presses would take a merged prompt for decoding and compress nothing: the call says so "
    "(run with kvpress 0.5.5 on transformers 4.57.6, and a stand-in elsewhere)",
    "refused",
)
@pytest.mark.parametrize("real", [True, False])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl", "minicpmv4_6"])
def test_kvpress(family, real):
    if family not in zoo.FAMILIES:
        pytest.skip(zoo.ABSENT[family])
    reason = "kvpress is not installed (0.5.5 wants transformers below 5.3 and brings `datasets` along)"
    press = (
        pytest.importorskip("kvpress", reason=reason).KnormPress(compression_ratio=0.5)
        if real
        else KnormPress()
    )
    check_refusal(family, press, illava.UnsupportedInputError, "KnormPress is attached .* Use one")
