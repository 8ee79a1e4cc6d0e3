"""What writing down where tokens came from costs: nothing when it is off."""

import sys
from collections import Counter

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

import illava
from contract import tools
from illava.tracing import EncoderTrace, LanguageTrace

# Only these may hold or make records; with tracing off none of their code runs.
RECORDING = ("illava/tracing.py", "illava/retrace.py", "illava/origins.py", "illava/sparse.py")


class Operations(TorchDispatchMode):
    """Counts every operation that reaches torch's kernels, and what is moved to the CPU."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


def operations(model, inputs, family, **settings):
    """What one patched call does: its operations, hooks and how often code of the records ran."""
    ran = Counter()

    def watch(frame, event, arg):
        if event == "call" and frame.f_code.co_filename.endswith(RECORDING):
            ran[
                frame.f_code.co_qualname if hasattr(frame.f_code, "co_qualname") else frame.f_code.co_name
            ] += 1

    tools.forward(model, inputs)  # transformers puts hooks of its own in place with the first call
    with tools.patch(model, family, **tools.DEEP, **settings) as handle:
        hooks = [
            (name, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()
        ]
        tools.forward(model, inputs)  # what is made once and kept is made here
        sys.setprofile(watch)
        try:
            with Operations() as counted:
                tools.forward(model, inputs)
        finally:
            sys.setprofile(None)
        report = handle.report
    return counted.seen, hooks, ran, report


@pytest.fixture
def without_records(monkeypatch):
    """The code path without tracing: whatever could write a record fails instead."""

    def forbidden(*args, **kwargs):
        raise AssertionError("a record is made")

    for module in ("illava.language", "illava.vision", "illava.vision_stage"):
        if hasattr(sys.modules.get(module), "record_merge"):
            monkeypatch.setattr(sys.modules[module], "record_merge", forbidden)
    monkeypatch.setattr(LanguageTrace, "__init__", forbidden)
    monkeypatch.setattr(EncoderTrace, "__init__", forbidden)


@tools.each_family
def test_off_it_runs_no_operation_more(family, without_records):
    """With every record forbidden the call does exactly what `trace=False` does, hook by hook."""
    model, inputs = tools.build(family), tools.prompt_of(family, tools.mixed(family))
    off, hooks, ran, report = operations(model, inputs, family, trace=False)
    default, default_hooks, _, _ = operations(model, inputs, family)
    assert off == default
    assert hooks == default_hooks
    assert not ran, "code that keeps records ran"
    assert report.provenance is None
    assert report._trace is None
    with pytest.raises(AssertionError, match="a record is made"):  # and it would be noticed
        operations(model, inputs, family, trace=True)


@tools.each_family
def test_on_it_shows(family):
    """The test above can fail: with records kept there are more operations, and as many hooks."""
    model, inputs = tools.build(family), tools.prompt_of(family, tools.mixed(family))
    off, hooks, _, _ = operations(model, inputs, family)
    on, traced_hooks, ran, report = operations(model, inputs, family, trace=True)
    assert traced_hooks == hooks
    assert on.total() > off.total()
    assert all(on[name] >= count for name, count in off.items())
    assert ran["record_merge"] >= 2
    assert len(report.provenance) == len(report.pictures)


def test_nothing_of_a_call_is_kept(monkeypatch):
    """Off, records of encoder and language model have no trace to hold on to."""
    model, inputs = tools.build("qwen2_5_vl"), tools.prompt_of("qwen2_5_vl", "one picture")
    kept = []
    from illava import report as reports

    build = reports.build_report

    def watched(plan, shape, call, encoded, *rest):
        encoded = list(encoded or ())
        kept.append((call.trace, *(record.trace for record in encoded)))
        return build(plan, shape, call, encoded, *rest)

    for module in list(sys.modules.values()):
        if module is not None and getattr(module, "build_report", None) is build:
            monkeypatch.setattr(module, "build_report", watched)
    for trace in (False, True):
        with tools.patch(model, "qwen2_5_vl", trace=trace, **tools.DEEP) as handle:
            tools.forward(model, inputs)
            assert isinstance(handle.report, illava.Report)
    off, on = kept
    assert off == (None, None)
    assert len(on) == 2
    assert None not in on
