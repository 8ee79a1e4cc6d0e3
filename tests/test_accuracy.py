"""The accuracy that the README prints, measured again on a sample of items from the shipped checkpoints."""

import csv
from pathlib import Path

import accuracy
import pytest
import torch
from accuracy_ablations import GROUPS, PLANS
from accuracy_measure import Cell, load, measure, pack, ready, unpack
from accuracy_page import TITLES, page, readme_block

from readers import tasks

ROOT = Path(__file__).parent.parent
SAMPLE = 24  # items of each row that are answered again
METHODS = ("unpatched", "illava", "illava later", "FastV")


def committed():
    """Rows of the CSV that are measured again: one reduction of a few methods, each reader and task."""
    rows = accuracy.done(accuracy.RESULTS / "accuracy.csv").values()
    return [
        row
        for row in rows
        if row["method"] in METHODS
        and row["task"] in ("find", "spatial")
        and row["budget"] == "tokens"
        and row["reduction"] in ("0.0000", "0.7778")
        and int(row["items"]) >= SAMPLE
    ]


def name(row):
    return "-".join(row[column] for column in ("reader", "method", "reduction", "task", "split"))


@pytest.fixture(scope="module")
def readers():
    folders = ROOT.glob("checkpoints/*/config.json")
    return {path.parent.name: load(path.parent, torch.device("cpu")) for path in folders}


@pytest.mark.parametrize("row", committed(), ids=name)
def test_committed_accuracy_did_not_move(row, readers):
    reader = readers[row["reader"]]
    assert row["weights"] == reader.fingerprint, "the CSV was measured on another checkpoint: measure again"
    cell = Cell(row["reader"], row["method"], float(row["reduction"]), "tokens", row["task"], row["split"])
    method = ready(reader, cell, tasks.held_out_item(cell.task, cell.split, 0), PLANS)
    right = measure(reader, method, cell, range(SAMPLE), lambda count: None)
    before = unpack(row["bits"], int(row["items"]))[:SAMPLE].tolist()
    # Other kernels round otherwise, which may tip an answer that hangs in the balance.
    assert sum(a != b for a, b in zip(right, before, strict=True)) <= 1


def test_rows_hold_what_their_bits_say():
    path = accuracy.RESULTS / "accuracy.csv"
    if not path.exists():
        pytest.skip("nothing was measured yet: python benchmarks/accuracy.py")
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if not row["note"]:
                assert int(row["right"]) == unpack(row["bits"], int(row["items"])).sum()


def test_the_readme_has_the_tables_of_the_csv():
    rows = list(accuracy.done(accuracy.RESULTS / "accuracy.csv").values())
    assert readme_block(rows) in (ROOT / "README.md").read_text(), "run accuracy.py --show --readme"


def test_the_page_has_every_table_of_the_csv():
    rows = list(accuracy.done(accuracy.RESULTS / "accuracy.csv").values())
    assert page(rows) == (ROOT / "docs/accuracy.md").read_text(), "run accuracy.py --show --readme"
    assert set(TITLES) == set(GROUPS)


def test_packing_and_going_on(tmp_path):
    right = [True, False, False, True, True] * 3
    assert unpack(pack(right), len(right)).tolist() == right
    out = tmp_path / "a.csv"
    row = dict(zip(accuracy.COLUMNS[:6], ("r", "m", "0.5000", "tokens", "find", "test"), strict=True))
    accuracy.append(out, row | {"items": 10, "right": 3})
    accuracy.append(out, row | {"items": 20, "right": 9})
    (found,) = accuracy.done(out).values()
    assert found["right"] == "9"


def test_unknown_method_is_named():
    with pytest.raises(SystemExit, match="'fastvv' is not known"):
        accuracy.methods(["fastvv"])
