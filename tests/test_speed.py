"""benchmarks/speed.py as a reader runs it, and what it must never do: repeat itself, or make figures up."""

import csv
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import bounds
import pytest
import torch
import transformers
from prefill_models import build_config, build_model
from speed import plan_work
from speed_cases import (
    EARLY,
    OURS,
    RECYCLE,
    RIVALS,
    SMALLER_MODEL,
    WINDOWS,
    WINDOWS_MERGING,
    Arm,
    all_cases,
    arms_of,
    plan_of,
)
from speed_figures import cache_arithmetic, figures, peak_arithmetic, widths
from speed_inputs import CONTENTS, Shown, rectangle, show
from speed_measure import Peak, Side
from speed_models import MODELS
from speed_options import parse
from speed_profile import OTHERS, OWNERS, PYTHON, spent
from speed_ranges import Clock, Ranges
from speed_rows import COLUMNS, KEY, OK, OOM, Rows, environment, figure, identity
from speed_run import Models, Settings, Trial, run_case
from speed_show import NOT_MEASURED, TARGETS, markdown

import illava

ROOT = Path(__file__).parent.parent
SETTINGS = Settings("cpu", torch.float32, "quick", 16, 1, 1, 0, 1, 60.0)


def run(folder, *options):
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "speed.py"), "--quick", "--device", "cpu",
         "--csv", str(folder / "speed.csv"), *options],
        capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with (folder / "speed.csv").open(newline="") as file:
        return done.stdout, list(csv.DictReader(file))


def build(name):
    family = MODELS[name].quick
    return build_model(family, build_config(family, family.shape), "cpu", torch.float32, "sdpa")


def shown_to(model, name, content, tokens, count=1, rows=1):
    shown = Shown(content, tokens, count)
    return show(model, MODELS[name].family, shown, rows, 16, "cpu", torch.float32)


@pytest.mark.slow  # two fresh interpreters
def test_a_run_writes_resumes_and_records_what_ran_out_of_memory(tmp_path):
    printed, rows = run(tmp_path, "--inject-oom", "FastV", "--profile")
    measured = {row["arm"] for row in rows if row["status"] == OK}
    assert measured == {OURS, EARLY, "VisionZip", SMALLER_MODEL}
    (lost,) = [row for row in rows if row["arm"] == "FastV"]
    assert lost["status"] == OOM
    assert not any(lost[name] for name in COLUMNS[COLUMNS.index("figure") :])
    assert "out of memory" in printed
    for row in rows:
        assert all(row[name] for name in KEY if name not in ("driver", "cuda"))
    # Nothing that a CPU run cannot measure, and a value wherever there is a figure.
    found = {row["figure"] for row in rows if row["status"] == OK}
    assert found == {
        "encoder_ms", "llm_ms", "ttft_ms", "decode", "requests", "kv_cache", "kv_cache_by_plan", "own_share",
    }  # fmt: skip
    assert all(float(row["value"]) > 0 for row in rows if row["status"] == OK)
    assert (tmp_path / "speed.png").stat().st_size > 10_000
    assert (tmp_path / "speed.svg").read_text().startswith("<?xml")

    assert "illava's own" in printed
    with (tmp_path / "speed_profile.csv").open(newline="") as file:
        profiled = list(csv.DictReader(file))
    assert {row["arm"] for row in profiled} == {"unpatched", OURS, EARLY}
    assert {row["owner"] for row in profiled if row["arm"] == EARLY} == {"illava", "model"}
    assert {row["owner"] for row in profiled if row["arm"] == "unpatched"} == {"model"}

    again, after = run(tmp_path)
    assert "0 arms to measure" in again
    assert after == rows


def test_it_goes_on_after_a_line_that_was_never_finished(tmp_path):
    path = tmp_path / "speed.csv"
    rows = Rows(path)
    key = dict.fromkeys(KEY, "x")
    rows.add(key, [figure("ttft_ms", "ms", [3.0, 1.0, 2.0], 4.0, [2.0], 4.0)], status=OK)
    whole = path.read_text()
    path.write_text(whole + "2026-01-01,half a li")
    again = Rows(path)
    assert path.read_text() == whole
    assert again.done(key)
    assert not again.done(key | {"arm": "y"})
    (row,) = again.rows
    assert (row["value"], row["p25"], row["p75"], row["unpatched"]) == ("2", "1.5", "2.5", "4")
    assert (row["ratio"], row["ratio_p25"], row["share_of_bound"]) == ("2.0000", "", "0.5000")
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        Rows(path)


def test_models_have_the_sizes_of_their_checkpoints():
    """Parameters in billions, as safetensors' headers of the checkpoints add up to."""
    expected = {
        "qwen2.5-vl-7b": 8.29,
        "qwen2.5-vl-3b": 3.75,
        "internvl2.5-8b": 8.08,
        "internvl2.5-26b": 25.5,
        "llava-onevision-7b": 8.03,
    }
    for name, billions in expected.items():
        family = MODELS[name].full
        with torch.device("meta"):
            kind = getattr(transformers, f"{family.name}ForConditionalGeneration")
            model = kind._from_config(build_config(family, family.shape))
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.005)


def test_bounds_at_true_sizes():
    """Those that `RIVALS` and the README state, and the one of the paper's layers beside it."""
    seams, bound = bounds.bound_of("qwen2.5-vl-7b")
    early = plan_of(Arm(EARLY, 0.889), seams)
    assert bound(early, 4096, 64) == pytest.approx(4.4, abs=0.05)
    assert bound(early, 16384, 64) == pytest.approx(4.6, abs=0.05)
    assert bound(illava.Plan.paper(0.889), 16384, 64) == pytest.approx(2.5, abs=0.05)
    readme = " ".join((ROOT / "README.md").read_text().split())
    said = re.search(
        r'88\.9 %: (\S+)x by default, (\S+)x with `merge="recycle"`, (\S+)x with `Plan.paper', readme
    )
    plans = [
        illava.Plan(reduction=0.889),
        illava.Plan(reduction=0.889, merge="recycle"),
        illava.Plan.paper(0.889),
    ]
    own = [f"{bound(plan, 1024, 32):.2f}" for plan in plans]
    assert list(said.groups()) == own


def test_bounds_are_printed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bounds.py", "--reduction", "0.889"])
    bounds.main()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "Qwen2.5-VL-7B" in line]
    assert [cell.strip() for cell in line.split("│")[2:6]] == ["88.9%", "2.47x", "2.31x", "2.35x"]


@pytest.mark.parametrize(("model", "attn", "has"), [
    ("qwen2.5-vl-7b", "sdpa", True), ("qwen2.5-vl-7b", "flash_attention_2", False),
    ("internvl2.5-8b", "sdpa", False),
])  # fmt: skip
def test_windows_are_run_together_where_a_loop_runs_them(model, attn, has, tmp_path):
    options = parse(["--models", model, "--contents", "picture", "--tokens", "256", "--batches", "1"])
    options.attn = [attn]
    ((_, arms),) = plan_work(options, Rows(tmp_path / "x.csv"), environment("cpu", "float32", "reduced"))
    assert (Arm(WINDOWS, 0.0) in arms, Arm(WINDOWS_MERGING, 0.889) in arms) == (has, has)


@pytest.mark.parametrize("name", ["qwen2.5-vl-7b", "internvl2.5-26b", "llava-onevision-7b"])
def test_every_arm_runs_and_leaves_as_many_tokens(name):
    model = build(name)
    tokens = {"qwen": 256, "internvl": 256, "llava": 1024}[MODELS[name].family]
    batch = shown_to(model, name, "picture", tokens)
    side = Side(model, batch, "cpu")
    for arm in arms_of(all_cases([name], ["sdpa"], ["picture"], [tokens], [1], 1, 1)[0],
                       [0.889], [*RIVALS], [0.889], False, MODELS[name].family == "qwen"):  # fmt: skip
        if not arm.patches:
            continue
        plan = plan_of(arm, side.seams)
        with illava.patch(model, plan=plan, fast_windows=arm.fast_windows) as handle:
            result = side.prefill()
            report = handle.report
        if arm.name == WINDOWS:
            assert report is None, "nothing merges"
            assert 0 < result.encoder_ms < result.ttft_ms
            continue
        assert report.tokens == batch.tokens, arm
        slack = 8 if MODELS[name].family == "llava" else 3  # packing revives some
        if not (MODELS[name].family == "llava" and arm.name in ("encoder only", "VisionZip")):
            assert abs(report.final_tokens - (1 - 0.889) * batch.tokens) <= slack, arm
        assert 0 < result.encoder_ms < result.ttft_ms
        assert 0 < result.llm_ms < result.ttft_ms
        held = widths(report, batch, len(side.seams.layers))
        assert result.kv_bytes == sum(cache_arithmetic(model.config, 1, held, 4)), arm


@pytest.mark.parametrize("name", ["qwen2.5-vl-7b", "internvl2.5-8b", "llava-onevision-7b"])
@pytest.mark.parametrize("content", CONTENTS)
def test_every_content_is_shown_batched_and_patched(name, content):
    model = build(name)
    count = {"picture": 1, "pictures": 2, "video": 4}[content]
    tokens = {"qwen": 64, "internvl": 256 * count, "llava": 1024}[MODELS[name].family]
    batch = shown_to(model, name, content, tokens, count, rows=2)
    side = Side(model, batch, "cpu")
    whole = side.prefill().kv_bytes
    assert whole == sum(cache_arithmetic(model.config, 2, widths(None, batch, len(side.seams.layers)), 4))
    with illava.patch(model, reduction=0.778) as handle:
        merged = side.prefill().kv_bytes
        report = handle.report
        assert side.decode(3).requests_per_s > 0
    assert report.tokens == 2 * batch.tokens
    assert {p.row for p in report.pictures} == {0, 1}
    kind = "video" if content == "video" and name != "internvl2.5-8b" else "image"
    assert {p.kind for p in report.pictures} == {kind}
    assert merged == sum(cache_arithmetic(model.config, 2, widths(report, batch, len(side.seams.layers)), 4))
    assert merged < whole


def test_sizes_a_family_cannot_be_shown_are_said_to_be_absent(tmp_path):
    name = "llava-onevision-7b"
    model = build(name)
    assert shown_to(model, name, "picture", 256) is None
    assert shown_to(model, name, "picture", 16384) is None
    assert shown_to(model, name, "picture", 1024).tokens == pytest.approx(1024, rel=0.01)
    (case,) = all_cases([name], ["sdpa"], ["picture"], [256], [1], 1, 1)
    unpatched, (trial,) = run_case(case, [Arm(OURS, 0.5)], Models(SETTINGS), SETTINGS, lambda what: None)
    assert trial.status == "no such input"
    assert figures(trial, unpatched) == []


def test_an_unpatched_model_that_does_not_fit_leaves_ratios_out():
    (case,) = all_cases(["qwen2.5-vl-7b"], ["sdpa"], ["picture"], [64], [1], 1, 1)
    unpatched, (trial,) = run_case(case, [Arm(OURS, 0.5)], Models(SETTINGS), SETTINGS, lambda what: None)
    trial.prefills = [(own, None) for own, _ in trial.prefills]
    rows = figures(trial, Trial(None, status=OOM))
    assert {row["figure"] for row in rows} >= {"ttft_ms", "kv_cache"}
    assert not any(row.get("ratio") or row.get("unpatched") or row.get("share_of_bound") for row in rows)


def test_a_case_stops_at_its_time_limit():
    (case,) = all_cases(["qwen2.5-vl-7b"], ["sdpa"], ["picture"], [64], [1], 1, 1)
    settings = Settings("cpu", torch.float32, "quick", 16, 10_000, 1, 0, 1, 8.0)
    _, (trial,) = run_case(case, [Arm(OURS, 0.5)], Models(settings), settings, lambda what: None)
    assert trial.status == OK
    assert 0 < len(trial.prefills) < 10_000


def test_the_most_important_cases_come_first():
    cases = all_cases(list(MODELS), ["sdpa"], CONTENTS, [256, 1024, 4096, 16384], [1, 8], 8, 64)
    first = [(c.model, c.shown.tokens, c.rows, c.shown.content) for c in cases[:3]]
    assert first == [("qwen2.5-vl-7b", tokens, 1, "picture") for tokens in (4096, 16384, 1024)]
    assert len(cases) == len(set(cases)) == 5 * 3 * 4 * 2


def test_ranges_count_illavas_own_time_and_leave_nothing_behind():
    model = build("qwen2.5-vl-7b")
    side = Side(model, shown_to(model, "qwen2.5-vl-7b", "picture", 256), "cpu")
    with Ranges.installed(), illava.patch(model, reduction=0.889):
        assert 0 < side.own_share() < 0.9
    from illava import patching

    assert not hasattr(patching.EncoderHooks.merge_block, "__wrapped__")
    assert not hasattr(patching.attention, "__wrapped__")


def test_the_models_own_attention_is_not_illavas():
    ranges = Ranges(Clock("cpu"))
    ranges.listening = True
    marks = iter([0.0, 1.0, 4.0, 6.0])  # own in, model in, model out, own out
    ranges._clock.mark = lambda: next(marks)
    inner = Ranges.around(lambda: None, own=False)
    Ranges.around(inner)()
    assert ranges.ms() == pytest.approx(3e3)


def test_a_profile_tells_whose_work_it_is():
    """In every stage: what illava runs unpatched models do not, and attention stays the model's."""
    (case,) = all_cases(["qwen2.5-vl-7b"], ["sdpa"], ["picture"], [256], [1], 1, 1)
    settings = replace(SETTINGS, profile=True)
    arms = [Arm(OURS, 0.0), Arm(OURS, 0.889), Arm("FastV", 0.889), Arm(RECYCLE, 0.889)]
    unpatched, trials = run_case(case, arms, Models(settings), settings, lambda what: None)
    less, ours, other, by_attention = (trial.spent for trial in trials)
    assert not less
    assert not other, "not one of illava's arms"
    assert by_attention
    assert {row.owner for row in unpatched.spent} == {"model"}
    names = {owner: {row.what for row in ours if row.owner == owner} for owner in OWNERS}
    assert PYTHON in names["illava"]
    assert {"aten::bmm", "aten::sort"} <= names["illava"]
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in names["model"] - names["illava"]
    for rows in (unpatched.spent, ours):
        assert sum(row.share for row in rows) == pytest.approx(1)
        assert [row.ms for row in rows] == sorted((row.ms for row in rows), reverse=True)
    assert 0.02 < sum(row.share for row in ours if row.owner == "illava") < 0.9


def test_kernels_belong_to_whom_launched_them():
    """As the profiler of a GPU tells: kernels hang on the operations and ranges that launched them."""

    def event(name, parent=None, *kernels, device=torch.autograd.DeviceType.CPU):
        ran = [SimpleNamespace(name=kernel, duration=us) for kernel, us in kernels]
        return SimpleNamespace(name=name, cpu_parent=parent, kernels=ran, device_type=device)

    own = event("illava", None, ("best_match", 3000))  # Triton launches without an operation
    model = event("model", own)
    events = [
        own, model, event("aten::mm", None, ("gemm", 90_000)), event("aten::add", own, ("add", 2000)),
        event("aten::add", model, ("add", 4000)), event("aten::relu", None, ("relu", 10), ("memset", 10)),
        event("gemm", None, device=torch.autograd.DeviceType.CUDA),
    ]  # fmt: skip
    found = [(row.owner, row.what, row.calls, row.ms) for row in spent(events, cuda=True)]
    assert found == [
        ("model", "gemm", 1, 90), ("model", "add", 1, 4), ("illava", "best_match", 1, 3),
        ("illava", "add", 1, 2), ("model", OTHERS, 2, 0.02),
    ]  # fmt: skip


def test_the_peak_by_arithmetic_is_where_cache_and_activations_are_most():
    unpatched = Peak(base=1000, encoder=1200, llm=1000 + 400 + 100 * 2)
    full, kv_full = [100] * 4, [100] * 4  # two bytes a token are a layer's own
    same = peak_arithmetic(unpatched, full, kv_full, 1000, full, kv_full)
    assert same == unpatched.llm
    held, kv = [100, 20, 20, 20], [100, 20, 20, 20]
    assert peak_arithmetic(unpatched, full, kv_full, 1000, held, kv) == 1000 + 100 + 200
    roomy = Peak(base=1000, encoder=1500, llm=1600)
    assert peak_arithmetic(roomy, full, kv_full, 1000, held, kv) == 1500


def test_rectangles_come_near_and_stay_flat():
    for units in (1, 2, 7, 8, 32, 64, 114, 227, 455, 1024, 1819, 16384):
        height, width = rectangle(units)
        assert height <= width <= max(2.5 * height, 3)
        assert math.isclose(height * width, units, rel_tol=0.03 if units > 100 else 0.15)


def test_what_no_gpu_measured_is_said_so():
    (case,) = all_cases(["qwen2.5-vl-7b"], ["sdpa"], ["picture"], [64], [1], 1, 1)
    row = dict.fromkeys(COLUMNS, "") | identity(case, Arm(OURS, 0.889), 16, 0) | {"status": OK}
    row |= {"device": "cpu", "size": "reduced", "threads": "1", "tokens": "64", "final_tokens": "7"}
    rows = [row | figure(name, "ms", [2.0], 4.0, [2.0], 3.0) for name in
            ("ttft_ms", "encoder_ms", "llm_ms", "kv_cache", "own_share", "peak_memory")]  # fmt: skip
    assert markdown(rows, rows).count(f"| {NOT_MEASURED} |") == len(TARGETS)
    gpu = [r | {"device": "cuda", "size": "full", "dtype": "bfloat16", "attn": "flash_attention_2",
                "tokens": "4096"} for r in rows]  # fmt: skip
    filled = markdown(gpu, gpu)
    assert "0.67 at least" in filled
    assert filled.count(f"| {NOT_MEASURED} |") == len(TARGETS) - 3


def test_gpu_script_reports_every_part_and_fails_in_none(tmp_path):
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\ncase "$*" in *pytest*) exit 3;; esac\nexit 0\n')
    fake.chmod(0o755)
    script = ROOT / "benchmarks" / "gpu.sh"
    done = subprocess.run(
        [str(script), str(tmp_path / "out")], capture_output=True, text=True, timeout=60, check=False,
        env=os.environ | {"PYTHON": str(fake)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    status = (tmp_path / "out" / "status.txt").read_text()
    assert "tests          status   3" in status
    assert "times          status   3" in status
    for name in ("environment", "prefill-7b", "rivals-7b", "throughput", "prefill.py"):
        assert name in status
        assert name in done.stdout
    seconds = [
        int(line.split()[2]) for line in script.read_text().splitlines()
        if line.split()[:1] in (["part"], ["speed"]) and line.split()[2].isdigit()
    ]  # fmt: skip
    assert 300 < sum(seconds) <= 590
