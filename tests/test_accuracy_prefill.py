"""Operations and times beside the accuracies: how they are taken, and that committed ones still hold."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import accuracy
import accuracy_prefill
import pytest
import torch
from accuracy_ablations import PLANS
from accuracy_measure import Cell, load, ready
from accuracy_page import readme_block, timed_with
from accuracy_prefill import arms, compare, groups
from accuracy_show import lines, read

from readers import tasks

ROOT = Path(__file__).parent.parent
COMMITTED = read(accuracy.RESULTS / "accuracy_prefill.csv")


@dataclass
class Clocked:
    """An arm whose every call takes as long as it is told."""

    cost: float
    times: list = field(default_factory=list)
    called: list = field(default_factory=list)

    def operations(self):
        return self.cost

    def ms(self):
        self.called.append(self)
        return self.times.pop(0)


def test_a_ratio_is_of_one_round():
    """The machine is four times as slow in the second round, on both sides."""
    found = {
        "unpatched": Clocked(10.0, [90, 110, 400, 400, 100, 100]),
        "fast": Clocked(5.0, [50, 200, 40]),
        "none": Clocked(10.0, [100, 400, 110]),
    }
    calls = []
    fast, none = compare(found, 3, lambda: calls.append(1))
    assert (fast["method"], fast["operations"], fast["speedup"]) == ("fast", "0.5000", "2.0000")
    assert (fast["p25"], fast["p75"]) == ("2.0000", "2.2500")
    assert none["speedup"] == "1.0000"
    assert fast["time_unpatched_ms"] == "100.0"
    assert len(calls) == 3 + 3 * (3 + 1), "as many as the bar is told"
    assert not any(arm.times for arm in found.values())


def test_only_what_is_lacking_is_timed(tmp_path, monkeypatch):
    """A method added later stands beside the rows there are; what cannot be is not asked of a clock."""
    out, able, timed = tmp_path / "prefill.csv", ["illava", "ToMe"], []
    monkeypatch.setattr(accuracy_prefill, "load", lambda folder, device: folder.name)
    monkeypatch.setattr(accuracy_prefill, "groups", lambda readers: [("internvl", "tokens", 8 / 9, "find")])

    def some(reader, reduction, budget, task, methods):
        return {
            name: Clocked(1.0, [1.0] * 9) for name in ("unpatched", *able) if name in (*methods, "unpatched")
        }

    def clocked(found, rounds, progress):
        timed.append(list(found))
        return compare(found, rounds, progress)

    monkeypatch.setattr(accuracy_prefill, "arms", some)
    monkeypatch.setattr(accuracy_prefill, "compare", clocked)
    monkeypatch.setattr(sys, "argv", ["accuracy_prefill.py", "--out", str(out)])
    for _ in range(2):
        accuracy_prefill.main()
    able.append("FastV")
    accuracy_prefill.main()
    assert timed == [["unpatched", "illava", "ToMe"], ["unpatched", "FastV"]]
    assert [row["method"] for row in read(out)] == ["illava", "ToMe", "FastV"]


@pytest.fixture(scope="module")
def reader():
    return load(ROOT / "checkpoints" / "internvl", torch.device("cpu"))


def test_operations_are_those_of_the_method_at_the_strength_it_was_asked_at(reader):
    """And of committed rows, which no clock can move."""
    found = arms(reader, 7 / 9, "compute", "find")
    assert next(iter(found)) == "unpatched"
    item = tasks.held_out_item("find", "test", 0)
    cannot = Cell("internvl", "FastV", 7 / 9, "compute", "find", "test")
    assert isinstance(ready(reader, cannot, item, PLANS), str)
    assert "FastV" not in found
    whole = found["unpatched"].operations()
    committed = {
        row["method"]: row["operations"]
        for row in COMMITTED
        if (row["reader"], row["budget"], row["task"]) == ("internvl", "compute", "find")
        and row["reduction"] == f"{7 / 9:.4f}"
    }
    assert set(committed) == set(found) - {"unpatched"}
    for name in ("illava", "illava recycle", "ToMe"):
        share = found[name].operations() / whole
        assert 0.4 < share < 0.8
        assert committed[name] == f"{share:.4f}", "measure again: python benchmarks/accuracy_prefill.py"


def test_a_smaller_picture_counts_what_the_unpatched_model_does_with_it(reader):
    found = arms(reader, 7 / 9, "tokens", "find")
    share = found["smaller picture"].operations() / found["unpatched"].operations()
    # One tile instead of five, all else but a few words of the prompt the same.
    assert 0.2 < share < 0.25


def test_every_table_of_the_test_split_is_timed():
    """Of whatever could be measured, nothing is left out, and nothing else is there."""
    rows = accuracy.done(accuracy.RESULTS / "accuracy.csv").values()
    asked = {
        (row["reader"], row["budget"], row["reduction"], row["method"])
        for row in rows
        if row["split"] == "test" and row["task"] in ("find", "video") and not row["note"]
        and row["method"] != "unpatched"
    }  # fmt: skip
    timed = {(row["reader"], row["budget"], row["reduction"], row["method"]) for row in COMMITTED}
    assert timed == asked
    assert len({(row["threads"], row["device"], row["torch"]) for row in COMMITTED}) == 1, "of one machine"
    assert {key[:3] for key in timed} == {
        (reader, budget, f"{reduction:.4f}")
        for reader, budget, reduction, _ in groups(["internvl", "qwen2_5_vl"])
    }


def row_of(**values):
    about = {"reader": "r", "split": "test", "budget": "compute", "reduction": "0.7778", "task": "find"}
    measured = {"method": "FastV", "items": "2", "right": "1", "bits": "80", "note": ""}
    return about | measured | {"final_ratio": "0.25", "area": "0.5"} | values


def test_columns_of_a_table():
    rows = [row_of(method="unpatched", budget="tokens", reduction="0.0000"), row_of(), row_of(method="AIM")]
    rows.append(row_of(method="FEATHER", note="computes too much"))
    versions = {"torch": "1", "transformers": "2", "device": "CPU"}
    saved = {
        "reader": "r", "method": "FastV", "reduction": "0.7778", "budget": "compute", "task": "find",
        "operations": "0.7514", "speedup": "1.4", "batch": "8", "rounds": "3", "threads": "1",
    }  # fmt: skip
    ((_, header, body),) = lines(rows, [saved])
    assert header[-2:] == ["operations", "first token"]
    cells = {row[0]: row[-2:] for row in body}
    assert cells == {"unpatched": ["1.00", "1.00x"], "FastV": ["0.75", "1.40x"], "AIM": ["", ""]}
    assert all(len(row) == len(header) for row in body)
    ((_, plain, _),) = lines(rows)
    assert plain[-2:] == ["left", "compute"]
    assert [row[-4:-2] for row in body] == [["1.00", "1.00"], ["0.25", "0.50"], ["0.25", "0.50"]]
    ((_, other, _),) = lines([row | {"split": "validation"} for row in rows], [saved])
    assert other == plain, "the times are of the test split"
    (said, _) = timed_with([saved])
    assert "the median of 3 rounds in turns (8 items of find a batch, 1 thread, float32" in said
    assert said in readme_block([row | versions for row in rows], [saved])
    assert "first token" not in readme_block([row | versions for row in rows])
