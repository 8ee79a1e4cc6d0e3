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

from illava.schedule import scale_layers
from readers import tasks

ROOT = Path(__file__).parent.parent
SAMPLE = 24  # items of each row that are answered again
PREFILLS = read(accuracy.RESULTS / "accuracy_prefill.csv")
STALE = "run accuracy.py --show --readme"
METHODS = ("unpatched", "illava", "illava later", "illava bipartite", "illava middle", "FastV")
SHARES = {f"{share:.4f}": share for share in (0.0, 7 / 9, 8 / 9)}


def committed():
    """Rows of the CSV that are measured again: a few methods at one reduction of each budget, each reader."""
    rows = accuracy.done(accuracy.RESULTS / "accuracy.csv").values()
    return [
        row
        for row in rows
        if row["method"] in METHODS
        and row["task"] in ("find", "spatial", "text")
        and row["reduction"] in ("0.0000", {"tokens": "0.7778", "compute": "0.8889"}[row["budget"]])
        and int(row["items"]) >= SAMPLE
    ]


def name(row):
    return "-".join(row[column] for column in ("reader", "method", "reduction", "budget", "task", "split"))


@pytest.fixture(scope="module")
def readers():
    folders = ROOT.glob("checkpoints/*/config.json")
    return {path.parent.name: load(path.parent, torch.device("cpu")) for path in folders}


@pytest.mark.parametrize("row", committed(), ids=name)
def test_committed_accuracy_did_not_move(row, readers):
    reader = readers[row["reader"]]
    assert row["weights"] == reader.fingerprint, "the CSV was measured on another checkpoint: measure again"
    reduction = SHARES[row["reduction"]]
    cell = Cell(row["reader"], row["method"], reduction, row["budget"], row["task"], row["split"])
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


NAMES = {"internvl": "InternVL", "qwen2_5_vl": "Qwen2.5-VL"}
READERS = tuple(NAMES)
PICTURES, VIDEOS = (2 / 3, 7 / 9, 8 / 9), (0.9, 0.95)


def measured(budget, reduction, reader):
    """Rows of the test split by method, one for each task that was measured so, and the unpatched model's."""
    found = {}
    for row in accuracy.done(accuracy.RESULTS / "accuracy.csv").values():
        if row["split"] == "test" and row["reader"] == reader:
            found.setdefault((row["budget"], row["reduction"], row["method"]), {})[row["task"]] = row
    unpatched = found.pop(("tokens", "0.0000", "unpatched"))
    found = {key[2]: row for key, row in found.items() if key[:2] == (budget, f"{reduction:.4f}")}
    about = [task for task in unpatched if any(task in row for row in found.values())]
    rows = {method: [row[task] for task in about] for method, row in found.items() if set(about) <= set(row)}
    return rows, [unpatched[task] for task in about]


def shares(budget, reduction, reader):
    """What each method keeps, with its interval; methods that cannot are left out. The best first."""
    rows, base = measured(budget, reduction, reader)
    found = {method: share for method, own in rows.items() if (share := kept(own, base))}
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))


def leads(budget, reduction, reader, ours, methods):
    """How much more one method keeps than each other, of the items that both answered, at the least."""
    rows, base = measured(budget, reduction, reader)
    return {method: kept(rows[ours], base, beyond=rows[method])[1] for method in methods}


def rivals_of(found):
    """Those that are not illava's own, the best first."""
    return [method for method in found if not method.startswith("illava")]


def percent(*values):
    return " and ".join(f"{100 * value:.1f}" for value in values) + " %"


@pytest.fixture(scope="module")
def said():
    return " ".join((ROOT / "README.md").read_text().split())


def share_of(row):
    return int(row["right"]) / int(row["items"])


def right_of(task, reader, reduction, method="unpatched"):
    """Share of a task's answers that are right at equal compute."""
    rows, base = measured("compute", reduction, reader)
    number = [row["task"] for row in base].index(task)
    return share_of((base if method == "unpatched" else rows[method])[number])


@pytest.mark.parametrize("reader", READERS)
def test_what_the_readme_says_of_small_writing(said, reader):
    """A row of its table for each reader; and only `illava middle` of all methods keeps so much."""
    shown = ("unpatched", "illava", "illava bipartite", "ToMe", "DivPrune", "illava middle")
    cells = " | ".join(percent(right_of("text", reader, 8 / 9, method)) for method in shown)
    assert f"| {NAMES[reader]} | {cells} |" in said
    rows, base = measured("compute", 8 / 9, reader)
    text = [row["task"] for row in base].index("text")
    read_by = {method: share_of(row[text]) for method, row in rows.items() if not row[text]["note"]}
    assert max(read_by, key=read_by.get) == "illava middle"


def test_what_the_readme_says_of_the_middle(said):
    """Its layers at a 7B's depth, and what it leaves at the defaults' compute."""
    assert scale_layers((2, 3, 4, 5), 8, 32) == (8, 12, 16, 20)
    assert scale_layers((4,), 8, 28) == (14,)
    assert "vit_layers=(8, 12, 16, 20), llm_layers=(14,), vit_merge=" in said
    rows, _ = measured("compute", 8 / 9, "internvl")
    left = {name: float(rows[name][0]["final_ratio"]) for name in ("illava middle", "illava")}
    assert (
        f"leaves {left['illava middle']:.0%} of the tokens instead of {left['illava']:.0%},"
        in said.replace(" %", "%")
    )


ITEMS = {"internvl": 1000, "qwen2_5_vl": 500}  # of each task, of the methods that lead


@pytest.mark.parametrize("reader", READERS)
def test_the_middle_leads_at_equal_compute(reader):
    """At 88.9 % by more than the interval of the difference; at 77.8 % DivPrune is within it."""
    for reduction in (7 / 9, 8 / 9):
        rows, base = measured("compute", reduction, reader)
        for row in (*base, *rows["illava middle"], *rows["ToMe"], *rows["DivPrune"]):
            assert int(row["items"]) >= ITEMS[reader]
    found = shares("compute", 8 / 9, reader)
    assert next(iter(found)) == "illava middle"
    assert min(leads("compute", 8 / 9, reader, "illava middle", rivals_of(found)).values()) > 0
    rows, base = measured("compute", 7 / 9, reader)
    low, high = kept(rows["illava middle"], base, beyond=rows["DivPrune"])[1:]
    assert low <= 0 <= high


def test_what_the_readme_says_of_equal_compute(said):
    own = {(r, share): shares("compute", share, r) for r in READERS for share in (7 / 9, 8 / 9)}
    words = []
    for reader in READERS:
        found = own[reader, 8 / 9]
        best = rivals_of(found)[0]
        words.append((percent(found["illava middle"][0]), best, percent(found[best][0])))
    (ours, best, theirs), other = words
    assert f"{ours} on the InternVL, where {best} keeps {theirs}" in said
    assert f"{other[0]} on the Qwen2.5-VL, where {other[1]} keeps {other[2]}" in said
    for reader in READERS:
        both = [percent(own[reader, 7 / 9][name][0]) for name in ("illava middle", "DivPrune")]
        assert f"{both[0]} against {both[1]} on the {NAMES[reader]}" in said
    counts = [percent(right_of("count", reader, 8 / 9, "illava middle")) for reader in READERS]
    whole = [percent(right_of("count", reader, 8 / 9)) for reader in READERS]
    suffer = f"at 88.9 % {' and '.join(counts)} of them are right, unpatched {' and '.join(whole)}"
    assert suffer in said


def test_what_the_readme_says_of_videos(said):
    words = []
    for reader in READERS:
        found = [shares("compute", share, reader) for share in VIDEOS]
        names = ("illava middle", "ToMe", "illava bipartite")
        words.append([percent(*(own[name][0] for own in found)) for name in names])
        for own in found:
            assert list(own)[:2] == ["illava middle", "ToMe"]
    (middle, tome, bipartite), other = words
    assert (
        f"`illava middle` keeps {middle} on the InternVL at 90 and 95 % removed, ToMe {tome}, "
        f"`illava bipartite` {bipartite}; on the Qwen2.5-VL `illava middle` keeps {other[0]}, "
        f"ToMe {other[1]}, `illava bipartite` {other[2]}."
    ) in said


def test_what_the_readme_says_of_the_others(said):
    pictures = {reader: shares("compute", 7 / 9, reader) for reader in READERS}
    theirs = [percent(pictures[reader]["FasterVLM"][0]) for reader in reversed(READERS)]
    assert f"FasterVLM keeps {theirs[0]} on the Qwen2.5-VL and {theirs[1]} on the InternVL" in said
    for reader in READERS:
        order = list(shares("compute", 8 / 9, reader))
        behind = min(order.index(f"illava {name}") for name in ("bipartite", "later"))
        assert behind > max(order.index(method) for method in ("illava middle", "DivPrune", "ToMe"))


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


def test_the_middle_was_chosen_as_ours_says():
    """Of the group "middle" it keeps most of the InternVL's pictures, and all of its videos."""
    found = accuracy.done(accuracy.RESULTS / "accuracy.csv")
    rows = {
        (method, task): int(row["right"])
        for (reader, method, _, budget, task, split), row in found.items()
        if (reader, split) == ("internvl", "validation") and (budget == "compute" or method == "unpatched")
    }
    kept_by = {
        method: sum(rows[method, t] / rows["unpatched", t] for t in ("text", "find", "count", "several"))
        for method in GROUPS["middle"]
    }
    chosen = "bipartite, encoder 2, 3, 4, 5, LLM 4"
    assert max(kept_by, key=kept_by.get) == chosen
    assert rows[chosen, "video"] >= rows["unpatched", "video"]
    early, late = "bipartite, encoder share 0.8", "bipartite, LLM 4"
    assert rows[early, "text"] < 0.75 * rows[late, "text"], "the same, but in the first layers of the LLM"


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
