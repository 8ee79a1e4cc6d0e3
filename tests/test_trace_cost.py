"""What writing down where tokens came from costs: nothing when it is off."""

import inspect
import sys
from collections import Counter

import pytest
from torch.utils._python_dispatch import TorchDispatchMode
from trace_cost import without_records

import illava
from contract import tools
from illava import language, vision
from illava.families import packing
from illava.hooks import EncoderHooks, encoder
from illava.language import LanguageCall
from illava.retrace import TracedPicture
from illava.tracing import LanguageTrace

# Code that keeps records: these modules, and what merges and hooks call only to fill them.
RECORDING = ("illava/tracing.py", "illava/retrace.py", "illava/origins.py", "illava/sparse.py")
FILLED = LanguageCall._names, EncoderHooks._trace_reads, packing.weights_of_packing, TracedPicture.__init__
FILLING = [inspect.unwrap(function).__code__ for function in FILLED]


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
        code = frame.f_code
        if event == "call" and (code.co_filename.endswith(RECORDING) or code in FILLING):
            ran[code.co_name] += 1

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


def cannot_record(monkeypatch):
    """From here on recording cannot happen: whatever makes a record is empty, whoever asks for one."""
    monkeypatch.setattr(language, "record_merge", lambda *args: None)
    monkeypatch.setattr(vision, "record_merge", lambda *args: None)
    monkeypatch.setattr(LanguageCall, "_names", lambda self, stage: None)
    monkeypatch.setattr(LanguageTrace, "entered", classmethod(lambda cls, *args: cls(0, [], None)))
    monkeypatch.setattr(EncoderHooks, "_trace_reads", lambda self, reads: None)
    monkeypatch.setattr(encoder, "weights_of_packing", lambda *args: [])


def costs_nothing(family, monkeypatch):
    """Off, no code of the records runs, and operations and hooks are as where recording cannot happen."""
    model, inputs = tools.build(family), tools.prompt_of(family, tools.mixed(family))
    off, hooks, ran, report = operations(model, inputs, family, trace=False)
    assert not ran, "code that keeps records ran"
    assert report.provenance is None
    assert report._trace is None
    assert operations(model, inputs, family)[:3] == (off, hooks, ran), "it is not off unless asked for"
    cannot_record(monkeypatch)
    without, other_hooks, _, report = operations(model, inputs, family, trace=True)
    assert report._trace is not None, "nothing was asked for: the case tests nothing"
    assert off == without
    assert hooks == other_hooks


@tools.each_family
def test_off_it_costs_nothing(family, monkeypatch):
    costs_nothing(family, monkeypatch)


@tools.each_family
def test_off_it_is_as_without_the_code_of_the_records(family):
    """Which benchmarks/trace_cost.py takes out of the source, to time what is left."""
    model, inputs = tools.build(family), tools.prompt_of(family, tools.mixed(family))
    off = operations(model, inputs, family, trace=False)
    before = LanguageCall.merge
    with without_records():
        bare = operations(model, inputs, family, trace=True)
    assert bare[:3] == off[:3]
    assert not bare[2], "code that keeps records ran"
    assert bare[3].provenance is None, "it is still there"
    assert bare[3] == off[3]
    assert LanguageCall.merge is before


@pytest.mark.parametrize("traced_alone", [False, True])
def test_an_operation_for_records_would_be_noticed(monkeypatch, traced_alone):
    """Done by every merge, or by traced ones outside of what makes records."""
    merge, names = LanguageCall.merge, LanguageCall._names

    def busy(self, layer, hidden):
        if self.trace is not None or not traced_alone:
            names(self, self.stages[-1])
        return merge(self, layer, hidden)

    monkeypatch.setattr(LanguageCall, "merge", busy)
    with pytest.raises(AssertionError, match="assert Counter" if traced_alone else "keeps records ran"):
        costs_nothing("qwen2_5_vl", monkeypatch)


@tools.each_family
def test_on_it_shows(family):
    """With records kept there are more operations, and as many hooks."""
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
