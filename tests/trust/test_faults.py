"""A call that ends in an exception leaves nothing behind: the next one is right, and removal is clean."""

import copy
import itertools

import pytest
import torch
import transformers

import illava
from contract import tools
from illava import merge
from trust import faults


def claim(name, how):
    return pytest.mark.claim("Faults", name, "works", how)


def seams(model) -> dict:
    """The modules illava's hooks sit on, and those they hand results to."""
    parts = {"the whole model": model, "model": model.model, "tower": tools.tower(model)}
    parts |= {f"block {i}": block for i, block in enumerate(tools.blocks(model))}
    parts |= {f"layer {i}": layer for i, layer in enumerate(tools.layers(model))}
    parts |= {"language model": model.model.language_model, "head": model.lm_head}
    hooked = {name: m for name, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks}
    known = {id(m) for m in parts.values()}
    return parts | {name: m for name, m in hooked.items() if id(m) not in known}


class Subject:
    """A patched model, what it answers in so many tokens, and what the unpatched one looks like."""

    KINDS = ("one picture", "text only", "batch")  # of the next call: other sizes, no picture, several rows

    def __init__(self, family, monkeypatch, tokens=2) -> None:
        self.model, self.tokens = tools.build(family), tokens
        self.watch = faults.Watch(monkeypatch)
        self.inputs = tools.prompt_of(family, tools.mixed(family))
        # Hugging Face puts its recorders on a model when first asked.
        tools.forward(self.model, self.inputs, output_hidden_states=True)
        self.before, self.forwards = tools.trace(self.model), self._forwards()
        self.handle = tools.patch(self.model, family, **tools.DEEP)
        self.prompts = {kind: tools.prompt_of(family, kind) for kind in self.KINDS}
        self.expected = {
            kind: faults.answer(self.model, prompt, tokens) for kind, prompt in self.prompts.items()
        }
        self.turn = itertools.cycle(self.KINDS)

    def ends_with(self, error: type[BaseException]) -> bool:
        """Prefill and a step of decoding; whether they ended with an error of this kind."""
        try:
            tools.generate(self.model, self.inputs, tokens=2, do_sample=False)
        except error:
            return True
        return False

    def check_left(self, told: str) -> None:
        """Right behind an exception."""
        assert not faults.under_way(self.handle), told
        assert not self.watch.features(), told

    def check_next(self, told: str) -> None:
        """The next call is what a fresh patched model answers, and nothing is left."""
        kind = next(self.turn)
        answer = faults.answer(self.model, self.prompts[kind], self.tokens)
        assert faults.same(answer, self.expected[kind]), f"{kind} after {told}"
        assert not self.watch.alive, told
        assert not faults.under_way(self.handle, waiting=("encoded",)), told

    def check_removal(self) -> None:
        self.handle.remove()
        for module, forward in self.forwards.items():
            # 4.57 replaces it to record hidden states, and leaves it so after an exception, patched or not.
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.__dict__["forward"] = forward
        assert not self.watch.alive
        assert faults.context_is_empty()
        assert tools.trace(self.model) == self.before

    def _forwards(self):
        return {module: module.__dict__.get("forward") for module in self.model.modules()}


def merging(subject) -> dict:
    """The modules that carry a merge out: blocks and layers of the plan, and what follows the encoder."""
    plan, blocks, layers = subject.handle.plan, tools.blocks(subject.model), tools.layers(subject.model)
    parts = {f"block {i}": blocks[i] for i in plan.vit_layers} | {
        f"layer {i}": layers[i] for i in plan.llm_layers
    }
    projectors = subject.handle._state.seams.projectors
    return parts | {f"projector {i}": projector.module for i, projector in enumerate(projectors)}


def throw_at(subject, faults_in_turn) -> int:
    """Throw each fault, and call again behind it.

    Args:
        faults_in_turn: of a module's name, the module, an error and a place in the module's call.

    Returns:
        How many were thrown: a family may not call every module.
    """
    thrown = 0
    for (name, module), kind, where in faults_in_turn:
        error, told = faults.ERRORS[kind], f"{kind} {where} {name}"
        with faults.fault(module, where, error):
            if not subject.ends_with(type(error())):
                continue  # this family never calls it
        thrown += 1
        if kind != "Ctrl-C":  # torch runs no hooks behind it; the next call or removal clears up
            subject.check_left(told)
        subject.check_next(told)
    subject.check_removal()
    return thrown


def one_each(places: dict, errors, wheres=faults.WHERE):
    """Every place once, with the next error at the next point of its call."""
    return zip(places.items(), itertools.cycle(errors), itertools.cycle(wheres), strict=False)


RIGHT = "the next call is bit-identical, nothing is left of the failed one"
IN_TURN = f"one at each module, at another point of its call each time; {RIGHT}"
EVERYWHERE = f"thrown at each in turn; {RIGHT}"
ANY = "an exception, out of memory or Ctrl-C in"


@claim(
    f"{ANY} a merging block, a merging layer or the projector",
    f"each of them inside forward and in hooks before and after it, ahead of illava's and behind; {RIGHT}",
)
@faults.families("qwen2_5_vl")
def test_every_error_at_every_point_of_a_merge(family, monkeypatch):
    subject = Subject(family, monkeypatch, tokens=1)
    product = list(itertools.product(merging(subject).items(), faults.ERRORS, faults.WHERE))
    assert len(product) >= 6 * len(faults.ERRORS) * len(faults.WHERE)
    assert throw_at(subject, product) == len(product), "each was thrown"


@claim("an exception or out of memory in a block, layer or projector, or in anybody's hook on one", IN_TURN)
@faults.some_families
def test_an_exception_at_every_seam(family, monkeypatch):
    subject = Subject(family, monkeypatch)
    assert throw_at(subject, one_each(seams(subject.model), ["an exception", "out of memory"])) > 10


@claim("Ctrl-C in a block, layer or projector, or in anybody's hook on one", IN_TURN)
@faults.some_families
def test_an_interruption_at_every_seam(family, monkeypatch):
    subject = Subject(family, monkeypatch)
    assert throw_at(subject, one_each(seams(subject.model), ["Ctrl-C"])) > 10


@claim(f"{ANY} any module", IN_TURN)
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=pytest.mark.slow if name in faults.SLOW else pytest.mark.soak)
        for name in tools.zoo.FAMILIES
    ],
)
def test_a_fault_in_every_module(family, monkeypatch):
    subject = Subject(family, monkeypatch)
    assert throw_at(subject, one_each(dict(subject.model.named_modules()), faults.ERRORS)) > 10


@claim(
    "Ctrl-C, then removal",
    "interrupted in the encoder and in the language model; removal alone lets go of all",
)
@faults.some_families
def test_removal_after_an_interruption(family, monkeypatch):
    for place in ("blocks", "layers"):
        subject = Subject(family, monkeypatch)
        with faults.fault(getattr(tools, place)(subject.model)[2], "inside", KeyboardInterrupt):
            assert subject.ends_with(KeyboardInterrupt)
        assert subject.watch.alive  # or this test shows nothing
        subject.check_removal()


# Lines to interrupt at: in a call or in patching, and in removal.
SAMPLE, REMOVAL_SAMPLE = 60, 20


def interrupted_at(lines: int, count: int) -> list[int]:
    """Seeded choice of lines to interrupt."""
    return sorted((torch.randperm(lines)[:count] + 1).tolist())


@claim(
    "Ctrl-C between two lines of illava's own code in a call",
    f"at {SAMPLE} lines drawn at random of the thousands that run; {RIGHT}",
)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava_next"])
@pytest.mark.parametrize("count", [8, pytest.param(SAMPLE, marks=pytest.mark.slow)])
def test_an_interruption_anywhere(family, count, monkeypatch):
    subject = Subject(family, monkeypatch)
    with faults.Interruption() as all_lines:
        assert not subject.ends_with(KeyboardInterrupt)
    assert all_lines.lines > 1000
    for line in interrupted_at(all_lines.lines, count):
        with faults.Interruption(line):
            assert subject.ends_with(KeyboardInterrupt)
        subject.check_next(f"line {line}")
    subject.check_removal()


@claim(
    "Ctrl-C while patching or removing",
    f"at {SAMPLE} lines drawn at random of illava's code while patching, at {REMOVAL_SAMPLE} while removing; "
    "removing again finishes the job",
)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_next"])
def test_an_interrupted_patch_or_removal(family):
    model = tools.build(family)
    tools.forward(model, tools.prompt_of(family, "one picture"), output_hidden_states=True)
    before = tools.trace(model)
    with faults.Interruption() as patching:
        handle = tools.patch(model, family, **tools.DEEP)
    with faults.Interruption() as removing:
        handle.remove()
    assert patching.lines > 500
    assert removing.lines > 50
    for line in interrupted_at(patching.lines, SAMPLE):
        with pytest.raises(KeyboardInterrupt), faults.Interruption(line):
            tools.patch(model, family, **tools.DEEP)
        assert tools.trace(model) == before, line
    for line in interrupted_at(removing.lines, REMOVAL_SAMPLE):
        handle = tools.patch(model, family, **tools.DEEP)
        with pytest.raises(KeyboardInterrupt), faults.Interruption(line):
            handle.remove()
        handle.remove()
        assert tools.trace(model) == before, line


@claim("out of memory while a merge is decided or applied", EVERYWHERE)
@pytest.mark.parametrize("name", ["select", "compact"])
@faults.some_families
def test_out_of_memory_inside_every_merge(family, name, monkeypatch):
    """`select` decides a merge, `compact` finds what it leaves: in the encoder, on entry, in the decoder."""
    subject = Subject(family, monkeypatch)
    own, calls, failing = getattr(merge, name), 0, 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == failing:
            raise faults.out_of_memory()
        return own(*args, **kwargs)

    monkeypatch.setattr(merge, name, counted)
    assert not subject.ends_with(torch.OutOfMemoryError)
    merges = calls
    assert merges >= 3
    for failing in range(1, merges + 1):
        calls = 0
        assert subject.ends_with(torch.OutOfMemoryError)
        told = f"merge.{name}, call {failing} of {merges}"
        subject.check_left(told)
        calls = merges
        subject.check_next(told)
    subject.check_removal()


@claim("a turn that fails and is tried again", "from a copy of the cache made before it: the same bits")
@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl"])
def test_a_turn_again(family):
    model, turn = tools.build(family), Turn(family)
    with tools.patch(model, family, **tools.DEEP):
        expected = turn.second(model, turn.first(model))
        cache = turn.first(model)
        spare = copy.deepcopy(cache)
        failing = faults.fault(tools.layers(model)[2], "inside", faults.out_of_memory)
        with failing, pytest.raises(torch.OutOfMemoryError):
            turn.second(model, cache)
        assert torch.equal(turn.second(model, spare), expected)


@pytest.mark.claim(
    "Faults", "the cache of a call that failed midway", "refused",
    "some layers know the tokens and some do not: the next call with it says so",
)  # fmt: skip
@pytest.mark.parametrize("when", ["first turn", "second turn"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl", "minicpmv4_6"])
def test_a_half_filled_cache(family, when):
    if family not in tools.zoo.FAMILIES:
        pytest.skip(tools.zoo.ABSENT[family])
    model, turn = tools.build(family), Turn(family)
    cache = transformers.DynamicCache(config=model.config.get_text_config())
    with tools.patch(model, family, **tools.DEEP):
        calls = [turn.first, turn.second]
        if when == "second turn":
            calls.pop(0)(model, cache)
        failing = faults.fault(tools.layers(model)[-1], "before, first", faults.out_of_memory)
        with failing, pytest.raises(torch.OutOfMemoryError):
            calls[0](model, cache)
        with pytest.raises(illava.CacheError, match="half filled"):
            turn.second(model, cache)


class Turn:
    """A prompt with a picture, and three tokens more."""

    def __init__(self, family) -> None:
        self.inputs = tools.prompt_of(family, "one picture")

    def first(self, model, cache=None):
        return tools.forward(model, self.inputs, use_cache=True, past_key_values=cache).past_key_values

    def second(self, model, cache):
        ids = self.inputs["input_ids"][:, -3:]
        mask = torch.cat([self.inputs["attention_mask"], torch.ones_like(ids)], dim=1)
        place = torch.arange(3)[None] + self.inputs["input_ids"].shape[1]
        more = {"mm_token_type_ids": torch.zeros_like(ids)} if "mm_token_type_ids" in self.inputs else {}
        call = dict(input_ids=ids, attention_mask=mask, position_ids=place, past_key_values=cache)
        return tools.forward(model, call | more).logits
