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


def shares(budget, reduction, reader="qwen2_5_vl"):
    """What each method keeps, with its interval, on the test split; methods that cannot are left out."""
    rows = accuracy.done(accuracy.RESULTS / "accuracy.csv").values()
    found = {}
    for row in rows:
        if row["split"] == "test" and row["reader"] == reader:
            found.setdefault((row["budget"], row["reduction"], row["method"]), {})[row["task"]] = row
    base = found["tokens", "0.0000", "unpatched"]
    video = reduction in (0.9, 0.95)
    base = {task: row for task, row in base.items() if (task == "video") is video}
    kept_by = {
        method: kept([row[t] for t in tasks.TASKS if t in row], [base[t] for t in tasks.TASKS if t in row])
        for (own, of, method), row in found.items()
        if (own, of) == (budget, f"{reduction:.4f}") and set(row) == set(base)
    }
    return {method: share for method, share in kept_by.items() if share}


def best(budget, reduction, among=("VisionZip", "FasterVLM", "illava later"), reader="qwen2_5_vl"):
    own = shares(budget, reduction, reader)
    return sorted((m for m in among if m in own), key=lambda method: -own[method][0])


def others(budget, reduction, reader="qwen2_5_vl"):
    """All methods but the one the README speaks of first, and the paper's plan, much as the default."""
    own = shares(budget, reduction, reader)
    return best(budget, reduction, set(own) - {"illava bipartite", "illava paper"}, reader)


def test_what_the_readme_says_of_the_best():
    said = " ".join((ROOT / "README.md").read_text().split())
    kept_of = {"pictures": {}, "videos": {}}
    for reader in ("internvl", "qwen2_5_vl"):
        for budget in ("tokens", "compute"):
            for reduction in (2 / 3, 7 / 9, 8 / 9, 0.9, 0.95):
                own = shares(budget, reduction, reader)
                place = best(budget, reduction, own, reader).index("illava bipartite")
                videos = reduction in (0.9, 0.95)
                kept_of["videos" if videos else "pictures"].setdefault(reader, []).append(
                    own["illava bipartite"][0]
                )
                if videos:
                    assert place < 2
                elif reader == "internvl":
                    assert place == 0
                else:
                    assert own["illava bipartite"][0] < own["VisionZip"][0]
                    assert own["VisionZip"][1] < own["illava bipartite"][2]
    pictures, videos = kept_of["pictures"], [x for own in kept_of["videos"].values() for x in own]

    def between(values):
        return f"{100 * min(values):.1f} to {100 * max(values):.1f} %"

    assert f"for equal compute, {between(pictures['internvl'])}" in said
    assert f"on the Qwen2.5-VL {between(pictures['qwen2_5_vl'])}" in said
    assert f"Of videos it keeps {between(videos)}" in said
    last = shares("compute", 0.95)
    assert f"{100 * last[others('compute', 0.95)[0]][0]:.0f} %" == "74 %"
    # It computes as much as the defaults, whatever is held against what.
    rows = accuracy.done(accuracy.RESULTS / "accuracy.csv")
    for key, row in rows.items():
        if row["method"] == "illava bipartite" and row["split"] == "test":
            plain = rows[(key[0], "illava", *key[2:])]
            assert float(row["area"]) == pytest.approx(float(plain["area"]), abs=1e-3)


def test_what_the_readme_says_of_the_tables():
    said = " ".join((ROOT / "README.md").read_text().split())
    assert "their intervals overlap at every reduction" in said
    for budget in ("tokens", "compute"):
        for reduction, second in ((2 / 3, "FasterVLM"), (7 / 9, "FasterVLM"), (8 / 9, "illava later")):
            assert best(budget, reduction)[:2] == ["VisionZip", second]
            own = [shares(budget, reduction)[method] for method in best(budget, reduction)]
            assert max(low for _, low, _ in own) <= min(high for *_, high in own)
    assert others("tokens", 0.95)[:2] == others("compute", 0.9)[:2] == ["FasterVLM", "illava later"]
    assert others("tokens", 0.9)[:3] == ["FasterVLM", "VisionZip", "illava later"]
    most = set(others("compute", 0.95)[:2])
    assert most == {"FasterVLM", "VisionZip"}
    assert shares("compute", 0.95)["FasterVLM"] == shares("compute", 0.95)["VisionZip"]
    assert "illava later" not in shares("compute", 0.95)


def test_what_the_readme_says_of_the_second_reader():
    said = " ".join((ROOT / "README.md").read_text().split())
    assert "what is best on one model may be last on the other" in said

    for budget, reduction, ahead in (
        ("compute", 2 / 3, ["AIM", "ToMe"]), ("compute", 7 / 9, []), ("compute", 8 / 9, []),
        ("tokens", 2 / 3, []), ("tokens", 7 / 9, ["PyramidDrop", "AIM"]), ("tokens", 8 / 9, []),
    ):  # fmt: skip
        found, own = others(budget, reduction, "internvl"), shares(budget, reduction, "internvl")
        assert found[: len(ahead) + 1] == [*ahead, "illava later"]
        assert set(found[-4:]) >= {"VisionZip", "FasterVLM"}
        assert all(own[method][1] < own["illava later"][2] for method in ahead)
        assert all(own["illava later"][1] < own[method][2] for method in ahead)
        assert "VisionZip" in found[-3:]
    assert [others("compute", share, "internvl")[:2] for share in (0.9, 0.95)] == [["ToMe", "illava"]] * 2
    for reduction, first, place in ((0.9, "DivPrune", 5), (0.95, "FEATHER", 3)):
        found = others("tokens", reduction, "internvl")
        assert found[0] == first
        assert found[place - 1] == "illava"


def test_plans_were_chosen_as_ours_says():
    """As rivals/ours.py says, on the validation split."""
    rows = accuracy.done(accuracy.RESULTS / "accuracy.csv")
    own = {
        m: rows[("qwen2_5_vl", m, f"{7 / 9:.4f}", "tokens", "find", "validation")] for m in GROUPS["layers"]
    }
    unpatched = rows[("qwen2_5_vl", "unpatched", "0.0000", "tokens", "find", "validation")]
    whole = [method for method, row in own.items() if row["right"] == unpatched["right"]]
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
