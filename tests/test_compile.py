"""torch.compile of a patched model: as many graphs as the unpatched model, and none anew per picture size."""

import importlib
import logging
from types import SimpleNamespace

import pytest
import torch

import illava
import tiny
from contract.methods import evenly
from illava import patching
from illava.hooks import in_graph, tracing
from illava.language import LanguageCall
from illava.language_layers import LayerInputs
from zoo import internvl
from zoo.common import Image as Picture

SIZES = (8, 12), (16, 16), (12, 20)
TILED = (112, 224), (224, 336), (340, 120)
needs_contexts = pytest.mark.skipif(
    not tracing.reads_context(), reason="this torch cannot trace a ContextVar: graphs break at every hook"
)


@pytest.fixture(autouse=True)
def quiet(caplog):
    """pytest would write down every line of the compiler's trace."""
    caplog.set_level(logging.WARNING, logger="torch.__trace")


class Graphs:
    """A backend that counts what is compiled, and what of it runs."""

    def __init__(self):
        self.made, self.ran = 0, []

    def __call__(self, graph, _):
        number, self.made = self.made, self.made + 1

        def run(*args):
            self.ran.append(number)
            return graph.forward(*args)

        return run


def qwen():
    return tiny.build("qwen2_5_vl", layers=3), [tiny.prompt([5, tiny.Image(*s), 7]) for s in SIZES]


def tiles():
    return internvl.build(), [internvl.prompt([4, Picture(*s, 1), 6]) for s in TILED]


FAMILIES = {"qwen2_5_vl": qwen, "internvl": tiles}


def counts(family, part, plan=None):
    """Of each prompt the graphs that ran, how many were compiled in all, and the model's answers."""
    torch.compiler.reset()
    model, prompts = FAMILIES[family]()
    prompts = prompts[: 2 if part == "visual" else None]
    if plan is not None:
        illava.patch(model, **plan)
    with torch.no_grad():
        wanted = [model(**inputs).logits for inputs in prompts]
        graphs, ran = Graphs(), []
        getattr(model.model, part).compile(backend=graphs)
        for inputs, logits in zip(prompts, wanted, strict=True):
            graphs.ran.clear()
            torch.testing.assert_close(model(**inputs).logits, logits, atol=1e-5, rtol=1e-5)
            ran.append(len(graphs.ran))
    torch.compiler.reset()
    return ran, graphs.made


def plan(vit, llm, rule="recycle"):
    recycled = {"recycled": 0.3} if rule == "recycle" else {}
    return dict(vit_layers=vit, llm_layers=llm, reduction=0.7, merge=rule) | recycled


@needs_contexts
@pytest.mark.slow
@pytest.mark.parametrize("rule", ["recycle", "bipartite"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_language_model_is_one_graph_across_its_merges(family, rule):
    ran, made = counts(family, "language_model", plan((0, 1), (0, 2), rule))
    assert ran == [1] * 3
    assert (ran, made) == counts(family, "language_model")


@needs_contexts
@pytest.mark.slow
@pytest.mark.parametrize("rule", ["recycle", "bipartite"])
def test_the_encoder_is_one_graph_across_its_merges(rule):
    ran, made = counts("internvl", "vision_tower", plan((0, 2), (), rule))
    assert ran == [1] * 3
    assert (ran, made) == counts("internvl", "vision_tower")


@pytest.mark.slow
@pytest.mark.parametrize("vit", [(0,), (2,), (1, 3)])
def test_an_encoder_that_breaks_its_graphs_itself(vit):
    """In Qwen2.5-VL's encoder Hugging Face's loop over windows breaks graphs in each block, and blocks are
    compiled one by one: what was compiled for one without hooks must not serve one that merges."""
    counts("qwen2_5_vl", "visual", plan(vit, ()))


@needs_contexts
@pytest.mark.slow
def test_generation():
    torch.compiler.reset()
    model, (_, inputs, *_) = qwen()
    options = dict(max_new_tokens=5, do_sample=False)
    made = []
    for settings in (None, plan((1,), (0, 2)), plan((1,), (0, 2), "bipartite")):
        if settings:
            illava.patch(model, **settings)
        wanted = model.generate(**inputs, **options)
        graphs = Graphs()
        model.model.language_model.compile(backend=graphs)
        assert torch.equal(model.generate(**inputs, **options), wanted)
        assert len(graphs.ran) == 5
        made.append(graphs.made)
        model.model.language_model._compiled_call_impl = None
        torch.compiler.reset()
    assert made[0] == made[1] == made[2]


def test_training():
    """Where gradients are asked for, graphs break at merges, through which gradients flow."""
    torch.compiler.reset()
    model, (inputs, *_) = qwen()
    illava.patch(model, **plan((1,), (0,)))
    gradients = []
    for compiled in (False, True):
        if compiled:
            model.model.language_model.compile(backend="eager")
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)
    torch.compiler.reset()


def test_hidden_states():
    torch.compiler.reset()
    model, (inputs, *_) = qwen()
    illava.patch(model, **plan((1,), (0,)))
    with torch.no_grad():
        wanted = model(**inputs, output_hidden_states=True).hidden_states
        model.model.language_model.compile(backend="eager")
        found = model(**inputs, output_hidden_states=True).hidden_states
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    torch.compiler.reset()


@needs_contexts
@pytest.mark.slow
@pytest.mark.parametrize(("family", "part"), [("qwen2_5_vl", "language_model"), ("internvl", "vision_tower")])
def test_functions_in_place_of_names_and_merges_at_both_ends(family, part):
    """Functions are never traced: they run inside the one operation that a merge is."""
    whole = illava.Plan(
        ("output",), ("input", 1), vit_shares=(0.8,), llm_shares=(0.6, 0.4), score=evenly, merge="prune"
    )
    assert counts(family, part, dict(plan=whole))[0] == [1] * 3


@pytest.mark.slow
def test_a_torch_that_cannot_trace_contexts(monkeypatch):
    monkeypatch.setattr(patching, "reads_context", lambda: False)
    for part in ("language_model", "visual"):
        counts("qwen2_5_vl", part, plan((1,), (0,)))


@needs_contexts
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_inductor(family):
    """What really compiles: memory of a graph is used again while the call under way goes on."""
    torch.compiler.reset()
    model, prompts = FAMILIES[family]()
    illava.patch(model, **plan((1, 2), (0, 1)))
    with torch.no_grad():
        wanted = [model(**inputs).logits for inputs in prompts[:3]]
        model.model.language_model.compile()
        getattr(model.model, "vision_tower" if family == "internvl" else "visual").compile()
        for inputs, logits in zip(prompts, wanted, strict=False):
            torch.testing.assert_close(model(**inputs).logits, logits, atol=1e-3, rtol=1e-3)
    torch.compiler.reset()


def test_the_operations_can_be_imported_again():
    """As notebooks do; torch knows each of them once."""
    importlib.reload(in_graph)
    assert torch.ops.illava.merge.default is not None


def test_a_merge_that_leaves_no_positions_is_an_error(monkeypatch):
    """In a graph or not, layers behind a merge are never given the positions of those ahead of it."""
    hidden, rotary = torch.zeros(1, 4, 8), (torch.ones(1, 4, 2), torch.zeros(1, 4, 2))
    call = SimpleNamespace(
        leave_layer=lambda layer, hidden, rotary: hidden[:, 1:],
        layers=SimpleNamespace(now=LayerInputs([], None)),
    )
    monkeypatch.setattr(in_graph.under_way, "LANGUAGE", SimpleNamespace(get=lambda: call))
    with pytest.raises(RuntimeError, match="the merge after decoder layer 2 left no positions"):
        torch.ops.illava.merge.default(hidden, *rotary, [], 0.0, 2, 3, [], [])
    call = SimpleNamespace(
        scored_at={2: 2}, attended={}, merge=lambda layer, hidden: hidden[:, 1:],
        stages=[SimpleNamespace(origin=None)],
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="decoder layer 2 does not say which slots it kept"):
        LanguageCall.leave_layer(call, 2, hidden, rotary)
