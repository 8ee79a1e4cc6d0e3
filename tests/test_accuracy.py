"""The accuracy that the README prints, measured again on a sample of items from the shipped checkpoints."""

import csv
from pathlib import Path

import accuracy
import pytest
import torch
from accuracy_ablations import GROUPS, PLANS
from accuracy_measure import Cell, load, measure, pack, prepared, ready, unpack
from accuracy_page import TITLES, notes, page, readme_block, weak
from accuracy_show import kept, read

from readers import tasks

ROOT = Path(__file__).parent.parent
SAMPLE = 24  # items of each row that are answered again
PREFILLS = read(accuracy.RESULTS / "accuracy_prefill.csv")
STALE = "run accuracy.py --show --readme"
METHODS = ("unpatched", "illava", "illava later", "illava bipartite", "FastV")


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
    assert readme_block(rows, PREFILLS) in (ROOT / "README.md").read_text(), STALE


READERS = ("internvl", "qwen2_5_vl")
PICTURES, VIDEOS = (2 / 3, 7 / 9, 8 / 9), (0.9, 0.95)


def measured(budget, reduction, reader):
    """Rows of the test split by method, one for each of the unpatched model's tasks, and that model's."""
    found = {}
    for row in accuracy.done(accuracy.RESULTS / "accuracy.csv").values():
        if row["split"] == "test" and row["reader"] == reader:
            found.setdefault((row["budget"], row["reduction"], row["method"]), {})[row["task"]] = row
    about = [
        task for task in found["tokens", "0.0000", "unpatched"] if (task == "video") is (reduction in VIDEOS)
    ]
    rows = {
        method: [row[task] for task in about]
        for (own, of, method), row in found.items()
        if (own, of) == (budget, f"{reduction:.4f}") and set(about) <= set(row)
    }
    return rows, [found["tokens", "0.0000", "unpatched"][task] for task in about]


def shares(budget, reduction, reader):
    """What each method keeps, with its interval; methods that cannot are left out. The best first."""
    rows, base = measured(budget, reduction, reader)
    found = {method: share for method, own in rows.items() if (share := kept(own, base))}
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))


def leads(budget, reduction, reader, methods):
    """How much more `illava bipartite` keeps than each, of the items that both answered, at the least."""
    rows, base = measured(budget, reduction, reader)
    return {method: kept(rows["illava bipartite"], base, beyond=rows[method])[1] for method in methods}


def percent(*values):
    return " and ".join(f"{100 * value:.1f}" for value in values) + " %"


@pytest.fixture(scope="module")
def said():
    return " ".join((ROOT / "README.md").read_text().split())


def test_what_the_readme_says_of_pictures_at_equal_compute(said):
    """Ahead by more than the interval of the difference everywhere but in one case."""
    ours = {}
    for reader in READERS:
        for reduction in (7 / 9, 8 / 9):
            own = shares("compute", reduction, reader)
            others = [method for method in own if not method.startswith("illava")]
            ahead = leads("compute", reduction, reader, others)
            rows, base = measured("compute", reduction, reader)
            for row in (*base, *rows["illava bipartite"], *rows[others[0]]):
                assert int(row["items"]) >= 1000
            ours[reader, reduction] = own["illava bipartite"][0]
            if (reader, reduction) == ("qwen2_5_vl", 7 / 9):
                first = ["VisionZip", "illava later"]
                assert list(own)[:3] == [*first, "illava bipartite"]
                for method in first:
                    assert kept(rows[method], base, beyond=rows["illava bipartite"])[1] <= 0
                assert f"`illava later` keep {percent(*(own[method][0] for method in first))}" in said
            else:
                assert next(iter(own)) == "illava bipartite"
                assert min(ahead.values()) > 0
    internvl, qwen = (ours[reader, 8 / 9] for reader in READERS)
    assert f"{percent(internvl)} on the InternVL and {percent(qwen)} on the Qwen2.5-VL, ahead" in said
    assert f"At 77.8 % it keeps {percent(*(ours[reader, 7 / 9] for reader in READERS))}" in said


def test_what_the_readme_says_of_pictures_at_a_third(said):
    """And for equal final tokens: the intervals overlap with the first's."""
    for budget, reductions in (("compute", (2 / 3,)), ("tokens", PICTURES)):
        for reduction in reductions:
            assert next(iter(shares(budget, reduction, "internvl"))) == "illava bipartite"
            own = shares(budget, reduction, "qwen2_5_vl")
            assert own["VisionZip"][0] == max(share for share, *_ in own.values())
            assert own["VisionZip"][1] < own["illava bipartite"][2]
    assert "VisionZip is first on the Qwen2.5-VL, its interval overlapping" in said


def test_what_the_readme_says_of_videos(said):
    by_share = {reader: [shares("compute", share, reader) for share in VIDEOS] for reader in READERS}
    ours = {reader: percent(*(own["illava bipartite"][0] for own in by_share[reader])) for reader in READERS}
    assert f"{ours['internvl']} on the InternVL, where ToMe keeps" in said
    assert f"keeps {percent(*(own['ToMe'][0] for own in by_share['internvl']))}, and" in said
    assert f"{ours['qwen2_5_vl']} on the Qwen2.5-VL, where the next" in said
    for own in by_share["internvl"]:
        assert set(list(own)[:2]) == {"ToMe", "illava bipartite"}
    for own in by_share["qwen2_5_vl"]:
        assert next(iter(own)) == "illava bipartite"
    assert percent(*(list(own.values())[1][0] for own in by_share["qwen2_5_vl"])) in said


def test_what_the_readme_says_of_the_others(said):
    assert "what is best on one model may be last on the other" in said
    for budget in accuracy.BUDGETS:
        for reduction in PICTURES:
            assert "VisionZip" in list(shares(budget, reduction, "internvl"))[-4:]
            assert shares(budget, reduction, "qwen2_5_vl")["VisionZip"][0] > 0.9


def test_bipartite_computes_as_much_as_the_defaults():
    """Whatever is held against what."""
    rows = accuracy.done(accuracy.RESULTS / "accuracy.csv")
    for key, row in rows.items():
        if row["method"] == "illava bipartite" and row["split"] == "test":
            plain = rows[(key[0], "illava", *key[2:])]
            assert float(row["area"]) == pytest.approx(float(plain["area"]), abs=1e-3)


def test_a_lead_is_of_the_items_that_both_answered():
    def row(task, bits, items):
        right = [bit == "1" for bit in bits]
        return row_of(task=task, bits=pack(right), items=str(items), right=str(sum(right)))

    base = [row("find", "1111111111", 10)]
    ours, theirs = [row("find", "1111111110", 10)], [row("find", "0111", 4)]
    assert kept(ours, base)[0] == pytest.approx(0.9)
    assert kept(ours, base, beyond=theirs)[0] == pytest.approx(0.25), "of the first four"
    assert kept(ours, base, beyond=ours) == (0, 0, 0)
    assert kept(ours, base, beyond=[row("find", "1", 1) | {"note": "cannot"}]) is None


def test_plans_were_chosen_as_ours_says():
    """As rivals/ours.py says, on the validation split."""
    rows = accuracy.done(accuracy.RESULTS / "accuracy.csv")
    own = {
        m: rows[("qwen2_5_vl", m, f"{7 / 9:.4f}", "tokens", "find", "validation")] for m in GROUPS["layers"]
    }
    unpatched = rows[("qwen2_5_vl", "unpatched", "0.0000", "tokens", "find", "validation")]
    before = unpack(unpatched["bits"], int(unpatched["items"]))
    whole = [m for m, row in own.items() if int(row["right"]) == before[: int(row["items"])].sum()]
    cheapest = sorted(whole, key=lambda method: float(own[method]["area"]))
    assert cheapest[:2] == ["encoder 2", "encoder 3"]
    assert "encoder 2, 4, 6" in whole
    for reader, tasks_of in (("qwen2_5_vl", ("find",)), ("internvl", ("find", "several"))):
        for task, reduction in (*((task, 8 / 9) for task in tasks_of), ("video", 0.9)):
            about = f"{reduction:.4f}", "tokens", task, "validation"
            of = {
                rule: int(rows[(reader, f"rule: {rule}", *about)]["right"])
                for rule in ("recycle", "prune", "linear", "random", "k-means", "bipartite in the encoder")
            }
            assert max(of, key=of.get) == "bipartite in the encoder"


def test_the_page_has_every_table_of_the_csv():
    rows = list(accuracy.done(accuracy.RESULTS / "accuracy.csv").values())
    assert page(rows, PREFILLS) == (ROOT / "docs/accuracy.md").read_text(), STALE
    assert set(TITLES) == set(GROUPS)


def row_of(**values):
    return {
        "reader": "r",
        "method": "unpatched",
        "task": "find",
        "items": "100",
        "right": "90",
        "note": "",
    } | values


def test_tasks_that_the_reader_itself_is_weak_at_are_named_above_the_tables():
    rows = [row_of(), row_of(task="count", right="79"), row_of(task="text", right="80")]
    rows += [row_of(method="FastV", right="1")]  # that is what the table is about
    assert "weak at** count (r: 79% right unpatched)." in weak(rows)[0]
    assert "find" not in weak(rows)[0]
    assert "text" not in weak(rows)[0]
    assert weak(rows[:1]) == []


def test_what_cannot_be_stands_once_for_each_reason():
    said = "computes 63% even with one token left"
    rows = [row_of(method="FastV", note=f"{said}; asked {asked}") for asked in ("60%", "51%", "60%")]
    rows += [row_of(method="FastV", note="needs text"), row_of(method="AIM", note=said), row_of()]
    assert notes(rows) == [f"- AIM: {said}", f"- FastV: {said}; asked 51%, 60%", "- FastV: needs text"]


@pytest.mark.parametrize(
    ("reader", "task", "reduction", "shown"),
    [
        ("qwen2_5_vl", "find", 7 / 9, 30 / 144),  # 6 x 5 units of 12 x 12
        ("internvl", "find", 7 / 9, 0.2),  # one tile of four and a thumbnail
        ("internvl", "find", 8 / 9, None),  # no fewer than that
        ("internvl", "several", 7 / 9, None),  # each is a tile already
        ("internvl", "video", 0.9, None),
    ],
)
def test_a_smaller_picture_counts_the_tokens_it_really_has(readers, reader, task, reduction, shown):
    item = tasks.held_out_item(task, "test", 0)
    method = ready(
        readers[reader], Cell(reader, "smaller picture", reduction, "tokens", task, "test"), item, PLANS
    )
    if shown is None:
        assert "tiles" in method
        return
    assert method.final_ratio == method.area == pytest.approx(shown, abs=1e-4)
    seen = readers[reader].composer.prompt(prepared(item, method), "?")["input_ids"]
    whole = readers[reader].composer.prompt(item, "?")["input_ids"]
    holder = readers[reader].model.config.image_token_id
    assert (seen == holder).sum() / (whole == holder).sum() == pytest.approx(shown, abs=1e-4)


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
