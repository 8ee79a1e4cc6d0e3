"""Jobs that are killed, and commands on Ray: every item exactly once, in one process and on two workers."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

import tiny_checkpoint
from illava.cli import app
from jobs_at_work import pictures

TESTS = Path(__file__).parent
pytestmark = pytest.mark.slow


def start(*arguments):
    """The job as a process of its own, its output kept for messages."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, TESTS / "jobs_at_work.py", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finished(path):
    """The lines that are whole."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def wait_for(count, results, process, seconds=120):
    deadline = time.monotonic() + seconds
    while len(finished(results)) < count and process.poll() is None:
        if time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"{len(finished(results))} of {count} results: {process.communicate()[0]}")
        time.sleep(0.005)


def complete(process, seconds=240):
    out, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, out
    return out


def check_each_once(records, data):
    counts = Counter(record["key"] for record in records)
    assert set(counts) == {file.name for file in data.iterdir()}
    assert set(counts.values()) == {1}
    assert {record["key"] for record in records if "skipped" in record} == {"half.png", "text.jpg"}
    assert not [record for record in records if "failed" in record]


def test_a_process_killed_ten_times_at_random_does_each_item_once(tmp_path):
    data, results, chance = pictures(tmp_path / "data", 240), tmp_path / "results.jsonl", random.Random(0)
    kills = 0
    for _ in range(10):
        before = len(finished(results))
        job = start(data, results, "--stuck-after", 5)  # some 20 items of the 242, if it gets so far
        wait_for(before + 1, results, job)
        time.sleep(chance.uniform(0, 0.03))
        job.send_signal(signal.SIGKILL)
        job.wait()
        kills += job.returncode == -signal.SIGKILL
        assert len(finished(results)) > before, "each of them went on where the last had been"
    assert kills == 10
    assert len(finished(results)) < 242
    out = complete(start(data, results))
    check_each_once(finished(results), data)
    assert "were there before" in out
    assert len({record["pid"] for record in finished(results) if "pid" in record}) == 11


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint.build(tmp_path_factory.mktemp("checkpoint") / "tiny")


def test_a_patched_model_killed_and_gone_on_with_says_what_it_says_undisturbed(checkpoint, tmp_path):
    data = pictures(tmp_path / "data", 16)
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    complete(start(data, whole, "--checkpoint", checkpoint))
    job = start(data, killed, "--checkpoint", checkpoint, "--stuck-after", 2)
    wait_for(4, killed, job)
    job.kill()
    job.wait()
    assert 4 <= len(finished(killed)) < 18
    complete(start(data, killed, "--checkpoint", checkpoint))
    check_each_once(finished(killed), data)
    said = [{r["key"]: (r.get("said"), r.get("tokens")) for r in finished(file)} for file in (whole, killed)]
    # What is left forms other batches, and padding rounds differently; tokens are what the plan says.
    assert {key: tokens for key, (_, tokens) in said[0].items()} == {
        key: tokens for key, (_, tokens) in said[1].items()
    }
    agreeing = sum(said[0][key] == said[1][key] for key in said[0])
    assert agreeing >= 16


def test_two_workers_of_a_ray_cluster_one_of_them_killed(checkpoint, tmp_path):
    pytest.importorskip("ray", reason='needs Ray: pip install ".[ray]"')
    data, results = pictures(tmp_path / "data", 100), tmp_path / "results.jsonl"
    job = start(data, results, "--engine", "ray", "--checkpoint", checkpoint, "--seconds", 0.2)
    try:
        deadline = time.monotonic() + 200
        while len({record["pid"] for record in finished(results) if "pid" in record}) < 2:
            assert job.poll() is None, job.communicate()[0]
            assert time.monotonic() < deadline, "no two workers"
            time.sleep(0.05)
        seen = finished(results)
        victim = next(record["pid"] for record in seen if "pid" in record)
        os.kill(victim, signal.SIGKILL)
        out = complete(job)
    finally:
        job.kill()
    assert len(seen) < 102, "it was killed in the middle"
    check_each_once(finished(results), data)
    assert "100 answered, 2 unreadable, 0 failed" in out
    pids = Counter(record["pid"] for record in finished(results) if "pid" in record)
    assert len(pids) >= 2
    assert pids[victim] < 100


def workers_of_ray(pid):
    """The processes of Ray, started by a process, that hold a model."""
    found = set()
    with contextlib.suppress(psutil.NoSuchProcess):  # it or one of them just ended
        for child in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                title = " ".join(child.cmdline())
                if title.startswith("ray::") and "_Worker" in title:
                    found.add(child.pid)
    return found


@pytest.mark.parametrize("command", ["run", "fidelity"])
def test_a_command_on_two_workers_of_a_ray_cluster(command, checkpoint, tmp_path):
    """As users type it: every item once, and what the same command says in one process."""
    pytest.importorskip("ray", reason='needs Ray: pip install ".[ray]"')
    data, results, alone = pictures(tmp_path / "data", 12), tmp_path / "ray.jsonl", tmp_path / "alone.jsonl"
    words = [command, checkpoint, "--data", data, "--prompt", "what is this ?", "--reduction", 0.778]
    words += ["--max-new-tokens", 3, "--batch-size", 1, "--device", "cpu"]
    on_ray = [*words, "--out", results, "--engine", "ray", "--workers", 2]
    path = os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    job = subprocess.Popen(
        [sys.executable, "-m", "illava", *map(str, on_ray)],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    workers, deadline = set(), time.monotonic() + 300
    while job.poll() is None:
        if time.monotonic() > deadline:
            job.kill()
        workers |= workers_of_ray(job.pid)
        time.sleep(0.3)
    complete(job)
    check_each_once(finished(results), data)
    assert len(workers) == 2

    done = CliRunner().invoke(app, [str(word) for word in [*words, "--out", alone]])
    assert done.exit_code == 0, done.output
    one, other = ({record["key"]: said(record) for record in finished(file)} for file in (results, alone))
    assert one == other
    assert len(set(one.values())) > 1


def said(record):
    """Of a record, the answers and how many of their tokens are equal."""
    plans = record.get("plans", {}).values()
    return record.get("answer"), tuple((plan["answer"], plan["equal_tokens"]) for plan in plans)
