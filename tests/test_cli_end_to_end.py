"""Every command as its users run it: a process of its own, a trained checkpoint, pictures and clips."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

import illava
from illava import evaluate, jobs
from questions import write_questions

ROOT = Path(__file__).resolve().parent.parent
READER = ROOT / "checkpoints" / "qwen2_5_vl"
ITEMS = 18  # of each task; fewer than the 40 in all that a search halves
STRONG = [
    "--vit-layers",
    "1",
    "--llm-layers",
    "none",
    "--reduction",
    "0.9",
]  # changes many answers of this reader
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Questions about small pictures."""
    folder = tmp_path_factory.mktemp("data")
    return write_questions(folder, ("find", "count"), ITEMS, side=96)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return write_questions(tmp_path_factory.mktemp("clips"), ("video",), 1)


@pytest.fixture(scope="module")
def loaded():
    return evaluate.load(READER, device="cpu")


@pytest.fixture
def start(tmp_path):
    """Start `illava` in an empty folder."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }

    def start(*arguments):
        return subprocess.Popen(
            [sys.executable, "-m", "illava", *map(str, arguments)],
            cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            # A shell that runs tests in the background has them ignore Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip

    return start


@pytest.fixture
def says(start):
    """Run a command to its end: its stdout and stderr."""

    def says(*arguments, status=0):
        job = start(*arguments)
        out, error = job.communicate(timeout=300)
        assert job.returncode == status, error
        assert "Traceback" not in error
        return out, error

    return says


def lines(path):
    """What whole lines hold."""
    if not path.exists():
        return []
    whole = (line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n"))
    return [json.loads(line) for line in whole]


def wait_for(count, path, job):
    """Until a job has so many results."""
    deadline = time.monotonic() + 120
    while len(lines(path)) < count:
        assert job.poll() is None, job.communicate()[1]
        assert time.monotonic() < deadline, f"{len(lines(path))} of {count} results"
        time.sleep(0.005)


def asked(data, number=0):
    line = lines(data)[number]
    return data.parent / line.get("image", line.get("video")), line["prompt"], line["answer"]


def test_run_answers_a_picture_and_says_what_was_merged(says, data):
    picture, prompt, answer = asked(data)
    out, report = says("run", READER, "--image", picture, "--prompt", prompt, "--reduction", 0.3)
    assert out.strip() == answer
    assert "36 visual tokens" in report


def test_run_compares_answers_about_a_clip(says, clips):
    clip, prompt, answer = asked(clips)
    options = ["--video", clip, "--prompt", prompt, "--reduction", 0.5, "--compare"]
    found = json.loads(says("run", READER, *options, "--json")[0])
    assert found["unpatched"]["answer"] == answer
    assert found["unpatched"]["visual_tokens"] is None
    tokens = found["patched"]["visual_tokens"]
    assert tokens["before"] == 4 * 36, "8 frames of 96 x 96 pixels"
    assert tokens["after"] == pytest.approx(72, abs=4)
    assert found["equal"] == (found["patched"]["answer"] == answer)
    assert [row["name"] for row in found["speed"]["rows"]] == ["unpatched", "patched"]
    assert found["speed"]["rows"][1]["figures"]["kv_bytes"]["ratio"]["value"] > 1.2


def test_run_over_data_killed_and_gone_on_with(start, says, data, tmp_path):
    pictures, out = tmp_path / "pictures", tmp_path / "answers.jsonl"
    shutil.copytree(data.parent, pictures)
    (pictures / "broken.png").write_bytes(b"no picture")
    with (pictures / data.name).open("a") as file:
        file.write('{"key": "broken", "image": "broken.png"}\n{"image": \n')
    command = ["run", READER, "--data", pictures / data.name, "--out", out, "--batch-size", 1]
    command += ["--reduction", 0.3]
    job = start(*command)
    wait_for(3, out, job)
    job.kill()
    job.communicate()
    before = lines(out)
    assert 3 <= len(before) < 2 * ITEMS
    summary = json.loads(says(*command, "--json")[0])
    assert summary["before"] == len(before)
    after = {record["key"]: record for record in lines(out)}
    assert set(Counter(record["key"] for record in lines(out)).values()) == {1}
    assert len(after) == 2 * ITEMS + 2
    assert "broken.png is no picture" in after["broken"]["skipped"]
    (line,) = [r["skipped"] for r in after.values() if "skipped" in r and r["key"] != "broken"]
    assert "is not JSON" in line
    right = [after[line["key"]]["answer"] == line["answer"] for line in lines(data)]
    assert sum(right) >= 0.8 * len(right)


def test_bench_prints_a_table_and_draws_it(says, data, tmp_path):
    options = ["--image", data.parent, "--limit", 2, "--reduction", 0, 0.8, "--rounds", 2, "--new-tokens", 3]
    out, notes = says("bench", READER, *options, "--plot", tmp_path / "speed.png")
    for words in ("unpatched", "80 %", "72 to 1[2-6] ", "median of 2 rounds", "decoding"):
        assert re.search(words, out), out
    assert "drawn in" in notes
    assert Image.open(tmp_path / "speed.png").size[0] > 300


def test_bench_needs_no_weights(says, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(READER / "config.json", bare)
    options = ["--random-weights", "--size", "192x256", "--reduction", 0.889, "--rounds", 2]
    found = json.loads(says("bench", bare, *options, "--json")[0])
    assert found["environment"]["random_weights"] is True
    unpatched, patched = found["rows"]
    assert unpatched["tokens"] == unpatched["final_tokens"] == 12 * 16
    assert patched["final_tokens"] == pytest.approx(0.111 * 192, abs=1)
    assert patched["figures"]["ttft_ms"]["bound"] > 1.5
    assert patched["figures"]["ttft_ms"]["ratio"]["value"] > 0
    assert patched["figures"]["kv_bytes"]["ratio"]["value"] > 1.5
    assert Image.open(found["plot"] if Path(found["plot"]).is_absolute() else tmp_path / found["plot"])


def test_fidelity_stopped_with_ctrl_c_and_gone_on_with(start, says, data, loaded, tmp_path):
    out = tmp_path / "held.jsonl"
    command = ["fidelity", READER, "--data", data, *STRONG, "--reduction", 0, "--out", out, "--batch-size", 2]
    job = start(*command, "--json")
    wait_for(2, out, job)
    job.send_signal(signal.SIGINT)
    shown, error = job.communicate(timeout=60)
    assert job.returncode == 130, error
    assert "the same command goes on" in error
    assert "Traceback" not in error
    kept = lines(out)
    assert 2 <= len(kept) < 2 * ITEMS
    assert json.loads(shown)["agreement"]["90 %"]["items"] == len(kept), "what was finished is shown"

    found = json.loads(says(*command, "--json")[0])
    assert [record["key"] for record in lines(out)][: len(kept)] == [record["key"] for record in kept]
    assert len(lines(out)) == 2 * ITEMS
    assert found["agreement"]["0 %"]["exact"]["value"] == 1
    assert found["agreement"]["0 %"]["kl"]["value"] == 0
    plan = illava.Plan((1,), (), 0.9)
    ours = evaluate.fidelity(loaded, jobs.read_items(data), {"90 %": plan}, batch_size=2)
    assert found["agreement"]["90 %"]["exact"]["value"] == ours.agreement["90 %"].exact.value < 1
    differing = lines(tmp_path / "held.disagreements.jsonl")
    assert len(differing) == found["disagreements"] == len(ours.disagreements) > 0
    for entry in differing:
        assert entry["unpatched"] != entry["patched"]
        assert Path(entry["images"][0]).is_file()
    assert [entry["kl"] for entry in differing] == sorted((e["kl"] for e in differing), reverse=True)


def test_plan_prints_what_patching_reads_back(says, data, loaded, tmp_path):
    file = tmp_path / "plan.json"
    out, _ = says("plan", READER, "--data", data, "--min-agreement", 0.9, "--out", file, "--rounds", 1)
    (printed,) = [line for line in out.splitlines() if line.startswith("{")]
    (python,) = [line for line in out.splitlines() if line.startswith("illava.Plan(")]
    assert json.loads(printed) == json.loads(file.read_text())
    with illava.patch(loaded.model, plan=printed) as handle:
        assert handle.plan.settings == eval(python, {"illava": illava}) == illava.Plan.from_json(printed)
    held = evaluate.fidelity(loaded, jobs.read_items(data), {"found": illava.Plan.from_json(printed)})
    exact = held.agreement["found"].exact
    assert exact.value >= 0.9
    assert f"{exact.value:.1%} ({exact.low:.1%} to {exact.high:.1%})" in out
    assert "times faster than the default at equal agreement" in out
    # And the other commands take the file.
    picture, prompt, _ = asked(data)
    assert says("run", READER, "--image", picture, "--prompt", prompt, "--plan", file)[0].strip()


def test_models_and_help(says):
    assert "qwen2_5_vl" in says("models")[0]
    found = json.loads(says("models", READER, "--json")[0])
    assert (found["model_type"], found["vit_layers"]) == ("qwen2_5_vl", [2, 3, 4, 5, 6])
    assert (found["merge"], found["encoder_share"]) == ("bipartite", 0.6)
    assert "bipartite; the encoder removes 60% of what goes" in says("models", READER)[0]
    shown = says("--help")[0]
    for command in ("run", "bench", "fidelity", "plan", "models"):
        assert f"illava {command}" in shown or f" {command} " in shown


def test_bad_input_is_a_sentence(says, data, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    out, error = says("run", READER, "--image", tmp_path / "bad.png", status=1)
    assert out == ""
    assert error.startswith(f"illava: {tmp_path / 'bad.png'} ")
    assert says("run", READER, status=2)[0] == ""
    _, error = says(
        "plan", READER, "--data", data, "--max-tokens", 1000, "--limit", 2, "--max-new-tokens", 2, status=3
    )
    assert "asks for nothing" in error
