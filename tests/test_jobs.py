"""Large jobs: what is read, what is skipped and why, and that results hold every item once."""

import io
import json
import pickle
import sys
import threading
import time
from collections import Counter

import av
import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import illava
from illava import jobs
from illava.jobs.batches import AHEAD_BATCHES, in_batches
from jobs_at_work import Colours, pictures


@pytest.fixture
def folder(tmp_path):
    return pictures(tmp_path / "pictures", 24)


def job(items, factory, results, **options):
    return jobs.run(items, factory, results, console=Console(file=io.StringIO()), **options)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def jsonl(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def clip(path, frames=9):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 20 * i, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


# Reading ----------------------------------------------------------------------------------------


def test_a_folder_is_read_with_the_folders_inside_it(tmp_path):
    for name in ("b.png", "a.JPG", "in/c.webp", ".hidden.png", "in/.cache/d.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    items = jobs.read_items(tmp_path, prompt="what ?")
    assert [item.key for item in items] == ["a.JPG", "b.png", "in/c.webp"]
    assert len(items) == 3
    assert {item.prompt for item in items} == {"what ?"}
    assert [item.images for item in items][2] == (tmp_path / "in" / "c.webp",)


def test_lines_become_items(tmp_path):
    file = jsonl(
        tmp_path / "q.jsonl",
        {"key": "one", "image": "a.png", "prompt": "first ?", "answer": "left alone"},
        {"id": 7, "images": ["a.png", "in/b.png"], "videos": ["c.mp4"]},
        "",
        {"image": "a.png"},
        {"image": "a.png"},
    )
    items = list(jobs.read_items(file, prompt="default ?"))
    assert [item.key for item in items][:2] == ["one", "7"]
    assert items[0] == jobs.Item("one", (tmp_path / "a.png",), (), "first ?", f"{file}:1")
    assert items[1].images == (tmp_path / "a.png", tmp_path / "in" / "b.png")
    assert items[1].videos == (tmp_path / "c.mp4",)
    assert items[2].prompt == "default ?"
    assert items[3].key == items[2].key + "-2"
    assert items[3].source == f"{file}:5"


def test_a_line_keeps_its_key_when_others_come_and_go(tmp_path):
    row = {"image": "a.png", "prompt": "what ?"}
    (before,) = jobs.read_items(jsonl(tmp_path / "q.jsonl", row))
    after = list(jobs.read_items(jsonl(tmp_path / "q.jsonl", {"image": "new.png"}, "broken", row)))
    assert after[-1].key == before.key


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"image": "a.png"', "not JSON"),
        ("[1, 2]", "no JSON object"),
        ("[" * 100_000, "not JSON"),
        ({"prompt": "what ?"}, "names no image or video, only prompt"),
        ({"imgae": "a.png"}, "only imgae"),
        ({}, "nothing at all"),
        ({"image": 3}, "neither a path nor a list"),
        ({"image": ["a.png", None]}, "neither a path nor a list"),
        ({"image": "a.png", "images": ["a.png"]}, "both image and images"),
        ({"image": "https://example.org/a.png"}, "is an address"),
        ({"image": "a.png", "prompt": 3}, "prompt=3 is no text"),
        ({"image": "a.png", "key": ["a"]}, "neither a text nor a whole number"),
        ({"image": "a.png", "key": "good"}, "key 'good' is that of line 1 too"),
        ("\udcff".encode(errors="surrogateescape").decode("latin-1"), "not JSON"),
    ],
)
def test_a_broken_line_is_skipped_with_file_line_and_reason(tmp_path, line, reason):
    file = jsonl(tmp_path / "q.jsonl", {"key": "good", "image": "a.png"}, line, {"image": "b.png"})
    first, broken, last = jobs.read_items(file)
    assert isinstance(first, jobs.Item)
    assert isinstance(last, jobs.Item)
    assert isinstance(broken, jobs.Skipped)
    assert broken.source == f"{file}:2"
    assert reason in broken.reason
    assert len({first.key, broken.key, last.key}) == 3


def test_what_is_no_data_is_refused(tmp_path):
    with pytest.raises(illava.errors.DataError, match="does not exist"):
        jobs.read_items(tmp_path / "none")
    with pytest.raises(illava.errors.DataError, match="holds no picture or video"):
        jobs.read_items(tmp_path)
    with pytest.raises(illava.errors.DataError, match="is empty"):
        jobs.read_items(jsonl(tmp_path / "empty.jsonl", "", " "))
    (tmp_path / "array.json").write_text('[{"image": "a.png"}]')
    with pytest.raises(illava.errors.DataError, match="one object on each line"):
        jobs.read_items(tmp_path / "array.json")


def test_items_are_read_one_by_one(tmp_path):
    """A file of many lines costs as much memory as its keys."""
    import tracemalloc

    file = tmp_path / "q.jsonl"
    with file.open("w") as out:
        for i in range(20_000):
            out.write(json.dumps({"key": i, "image": "a.png", "prompt": "x" * 500}) + "\n")
    jobs.read_items(file)  # what is loaded once is loaded now
    tracemalloc.start()
    count = sum(1 for _ in jobs.read_items(file))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == len(jobs.read_items(file)) == 20_000
    assert peak < file.stat().st_size / 2


def test_pictures_come_upright_and_in_rgb(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("L", (30, 20), 200).save(tmp_path / "turned.jpg", exif=exif)
    (item,) = jobs.read_items(tmp_path / "turned.jpg")
    (picture,) = jobs.decode(item).pictures
    assert (picture.mode, picture.size) == ("RGB", (20, 30))


@pytest.mark.parametrize("suffix", ["mp4", "webm.mkv"])
def test_frames_of_a_video_are_spread_over_it(tmp_path, suffix):
    clip(tmp_path / f"clip.{suffix}")
    (item,) = jobs.read_items(tmp_path)
    ((frames, metadata),) = jobs.decode(item, frames=3).clips
    assert frames.shape == (3, 48, 64, 3)
    assert np.abs(frames.reshape(3, -1).mean(1) - (0, 80, 160)).max() < 12
    assert list(metadata.frames_indices) == [0, 4, 8]
    assert metadata.total_num_frames == 9
    ((whole, _),) = jobs.decode(item, frames=100).clips
    assert len(whole) == 9


def test_what_cannot_be_decoded_says_why(tmp_path, monkeypatch):
    clip(tmp_path / "whole.mp4")
    content = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "broken.mp4").write_bytes(content[: len(content) // 3])
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    for name, reason in {
        "broken.mp4": "cannot be read",
        "text.jpg": "no picture that PIL can read",
        "gone.png": "does not exist",
        "gone.mp4": "does not exist",
        "folder.png": "is a folder",
        "large.png": "decompression bomb",
    }.items():
        kind = "video" if name.endswith("mp4") else "image"
        (item,) = jobs.read_items(jsonl(tmp_path / "q.jsonl", {kind: name}))
        skipped = jobs.decode(item)
        assert isinstance(skipped, jobs.Skipped)
        assert reason in skipped.reason
        assert name in skipped.reason
        assert (skipped.key, skipped.source) == (item.key, item.source)


# Running ----------------------------------------------------------------------------------------


def test_every_item_once_and_the_unreadable_recorded(folder, tmp_path):
    results = tmp_path / "out" / "results.jsonl"
    summary = job(jobs.read_items(folder), Colours(), results, batch_size=5)
    assert (summary.answered, summary.skipped, summary.failed, summary.before) == (24, 2, 0, 0)
    records = {record["key"]: record for record in lines(results)}
    assert len(records) == len(lines(results)) == 26
    assert "no picture" in records["text.jpg"]["skipped"]
    assert "half.png" in records["half.png"]["skipped"]
    for i in range(24):
        record = records[f"{i:03}.png"]
        with Image.open(record["source"]) as opened:
            expected = opened.convert("RGB").resize((1, 1)).getpixel((0, 0))
        assert record["colour"] == list(expected)


def test_a_finished_job_does_nothing_and_a_new_item_is_added(folder, tmp_path):
    results = tmp_path / "results.jsonl"
    job(jobs.read_items(folder), Colours(), results)
    before = results.read_bytes()
    summary = job(jobs.read_items(folder), pytest.fail, results)  # no model is loaded for nothing
    assert (summary.items, summary.before) == (0, 26)
    assert results.read_bytes() == before
    Image.new("RGB", (50, 50)).save(folder / "new.png")
    assert job(jobs.read_items(folder), Colours(), results).answered == 1
    assert results.read_bytes().startswith(before)
    assert lines(results)[-1]["key"] == "new.png"


@pytest.mark.parametrize("cut", [1, 7, 60])
def test_a_line_that_a_kill_cut_off_is_done_again(folder, tmp_path, cut):
    results = tmp_path / "results.jsonl"
    job(jobs.read_items(folder), Colours(), results)
    whole = results.read_bytes()
    results.write_bytes(whole[: -len(whole.splitlines()[-1]) - 1] + whole.splitlines()[-1][:cut])
    assert job(jobs.read_items(folder), Colours(), results).answered == 1
    assert sorted(results.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_an_interruption_keeps_what_is_finished(folder, tmp_path):
    results = tmp_path / "results.jsonl"
    calls = []

    def work(items):
        calls.append(items)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return [{} for _ in items]

    with pytest.raises(KeyboardInterrupt):
        job(jobs.read_items(folder), lambda: work, results, batch_size=4)
    assert len(lines(results)) == 8
    assert job(jobs.read_items(folder), Colours(), results).before == 8
    assert Counter(Counter(r["key"] for r in lines(results)).values()) == {1: 26}


def test_batches_hold_pictures_of_like_size_and_few_are_held_decoded(folder):
    read = in_batches(jobs.read_items(folder), (), batch_size=4, readers=2, frames=4)
    batches = [[item for item in batch if isinstance(item, jobs.Item)] for batch in read]
    pixels = [[item.pictures[0].width * item.pictures[0].height for item in batch] for batch in batches]
    flat = [count for batch in pixels for count in batch]
    assert flat == sorted(flat)
    assert max(map(len, pixels)) == 4


def test_reading_keeps_a_bounded_distance_ahead(folder, monkeypatch):
    decoded = []
    original = jobs.decode

    def counted(item, frames):
        decoded.append(item.key)
        return original(item, frames)

    monkeypatch.setattr("illava.jobs.batches.decode", counted)
    batches = in_batches(jobs.read_items(folder), (), batch_size=4, readers=2, frames=4)
    next(batches)
    deadline = time.monotonic() + 10
    while len(decoded) < 4 * (1 + AHEAD_BATCHES) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(decoded) == 4 * (1 + AHEAD_BATCHES)
    batches.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("illava-read") and t.daemon]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_a_batch_that_does_not_fit_is_halved(error, folder, tmp_path, caplog):
    sizes = []

    def work(items):
        sizes.append(len(items))
        if len(items) > 2 or "005.png" in (item.key for item in items):
            raise error
        return [{} for _ in items]

    results = tmp_path / "results.jsonl"
    summary = job(jobs.read_items(folder), lambda: work, results, batch_size=8)
    assert (summary.answered, summary.failed) == (23, 1)
    assert set(sizes) >= {1, 2, 4, 8}
    assert "a batch of 8 does not fit in memory; doing it in parts of 4 and 4" in caplog.text
    (failed,) = (record for record in lines(results) if "failed" in record)
    assert failed["key"] == "005.png"
    assert "out of memory with this item alone" in failed["failed"]


def test_out_of_memory_is_told_as_the_work_tells_it_and_promises_nothing(folder, tmp_path):
    """That a stronger plan helps is not true of every work: fidelity needs the unpatched model."""

    def work(items):
        if items[0].key == "005.png":
            raise illava.OutOfMemoryError("with reduction 0.889 in the same plan the prompt fits")
        if items[0].key == "006.png":
            raise MemoryError
        return [{} for _ in items]

    results = tmp_path / "results.jsonl"
    job(jobs.read_items(folder), lambda: work, results, batch_size=1)
    reasons = {r["key"]: r["failed"] for r in lines(results) if "failed" in r}
    assert reasons["005.png"].endswith("item alone; with reduction 0.889 in the same plan the prompt fits")
    assert "smaller or fewer pictures" in reasons["006.png"]
    assert "reduction" not in reasons["006.png"]


def test_an_item_that_fails_is_recorded_and_its_neighbours_are_not(folder, tmp_path):
    def work(items):
        if any(item.key in ("003.png", "011.png") for item in items):
            raise ValueError("too odd")
        return [{"n": len(items)} for _ in items]

    results = tmp_path / "results.jsonl"
    summary = job(jobs.read_items(folder), lambda: work, results, batch_size=6)
    assert (summary.answered, summary.failed) == (22, 2)
    failed = {record["key"]: record["failed"] for record in lines(results) if "failed" in record}
    assert failed == {"003.png": "ValueError: too odd", "011.png": "ValueError: too odd"}


def test_work_that_never_succeeds_stops_the_job_and_writes_no_failure(folder, tmp_path):
    def work(items):
        raise RuntimeError("no such layer")

    results = tmp_path / "results.jsonl"
    with pytest.raises(illava.errors.JobError, match="2. items failed.*no such layer"):
        job(jobs.read_items(folder), lambda: work, results, batch_size=4)
    assert not [record for record in lines(results) if "failed" in record]
    assert job(jobs.read_items(folder), Colours(), results).answered == 24
    (only,) = jobs.read_items(folder / "000.png")
    with pytest.raises(illava.errors.JobError, match="1 items failed"):
        job([only], lambda: work, tmp_path / "other.jsonl")


@pytest.mark.parametrize("returned", [[], [{}] * 9, "text", [1, 2, 3, 4]])
def test_work_that_breaks_its_word_is_an_error(folder, tmp_path, returned):
    with pytest.raises(illava.errors.JobError, match="one for each item"):
        job(jobs.read_items(folder), lambda: lambda items: returned, tmp_path / "r.jsonl", batch_size=4)


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, torch.ones(1)])
def test_a_result_that_is_not_json_is_an_error(folder, tmp_path, value):
    with pytest.raises(illava.errors.JobError, match="cannot be written as JSON"):
        job(
            jobs.read_items(folder), lambda: lambda items: [{"x": value} for _ in items], tmp_path / "r.jsonl"
        )


def test_work_cannot_rename_an_item(folder, tmp_path):
    results = tmp_path / "r.jsonl"
    (item,) = jobs.read_items(folder / "000.png")
    job([item], lambda: lambda items: [{"key": "mine", "said": "ä\ud800"}], results)
    assert lines(results)[0]["key"] == "000.png"


def test_two_jobs_do_not_write_to_one_file(tmp_path):
    with jobs.Results(tmp_path / "r.jsonl") as results:
        results.append([{"key": "a", "source": "s"}])
        with pytest.raises(illava.errors.JobError, match="another job is writing"):
            jobs.Results(tmp_path / "r.jsonl").__enter__()
    with jobs.Results(tmp_path / "r.jsonl") as results:
        assert results.keys == {"a"}
        assert results.append([{"key": "a", "source": "s"}, {"key": "b", "source": "s"}]) == 1


def test_results_of_something_else_are_refused(folder, tmp_path):
    with pytest.raises(illava.errors.DataError, match="is no result of a job"):
        job(jobs.read_items(folder), Colours(), jsonl(tmp_path / "other.jsonl", {"no": "key"}))
    with pytest.raises(illava.errors.DataError, match="is a folder"):
        job(jobs.read_items(folder), Colours(), tmp_path)


def test_results_of_other_settings_are_refused(folder, tmp_path):
    results, items = tmp_path / "r.jsonl", jobs.read_items(folder)
    job(items, Colours(), results, settings={"model": "a", "plan": {"reduction": 0.5}})
    job(items, Colours(), results, settings={"model": "a", "plan": {"reduction": 0.5}})
    with pytest.raises(illava.errors.DataError, match=r"plan was \{'reduction': 0.5\} and is now"):
        job(items, Colours(), results, settings={"model": "a", "plan": {"reduction": 0.8}})


@pytest.mark.parametrize("torn", ["", '{"model": "a', "[1]", "\x00\x00"])
def test_settings_that_a_crash_tore_are_said(folder, tmp_path, torn):
    results, items = tmp_path / "r.jsonl", jobs.read_items(folder)
    beside = tmp_path / "r.jsonl.settings.json"
    job(items, Colours(), results, settings={"model": "a"})
    whole, done = beside.read_text(), results.read_bytes()
    beside.write_text(torn)
    with pytest.raises(
        illava.errors.DataError, match=r"r\.jsonl\.settings\.json cannot be read .*delete it and run"
    ):
        job(items, Colours(), results, settings={"model": "a"})
    assert results.read_bytes() == done
    beside.unlink()
    job(items, Colours(), results, settings={"model": "a"})
    assert (beside.read_text(), results.read_bytes()) == (whole, done), "as the message advises"


def test_settings_are_there_as_a_whole_or_not_at_all(folder, tmp_path, monkeypatch):
    """Killed before the new file takes its place, the old one stands; one that is right is left alone."""
    results, beside = tmp_path / "r.jsonl", tmp_path / "r.jsonl.settings.json"
    beside.write_text('{"model": "of a job without results"}')

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            job(jobs.read_items(folder), Colours(), results, settings={"model": "b"})
        assert json.loads(beside.read_text()) == {"model": "of a job without results"}
    job(jobs.read_items(folder), Colours(), results, settings={"model": "b"})
    assert json.loads(beside.read_text()) == {"model": "b"}
    monkeypatch.setattr("os.replace", killed)
    job(jobs.read_items(folder), Colours(), results, settings={"model": "b"})


@pytest.mark.parametrize(
    ("options", "says"),
    [({"batch_size": 0}, "no batch"), ({"engine": "spark"}, "choose"), ({"workers": 2}, "engine='ray'")],
)
def test_odd_options_are_refused(folder, tmp_path, options, says):
    with pytest.raises(illava.errors.JobError, match=says):
        job(jobs.read_items(folder), Colours(), tmp_path / "r.jsonl", **options)


def test_a_missing_package_says_which_extra_brings_it(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(illava.errors.MissingExtraError, match=r'pip install "illava\[ray\]"'):
        job(jobs.read_items(folder), Colours(), tmp_path / "r.jsonl", engine="ray")


def test_items_travel(folder):
    (item,) = jobs.read_items(folder / "000.png")
    decoded = pickle.loads(pickle.dumps(jobs.decode(item)))
    assert decoded.pictures[0].tobytes() == jobs.decode(item).pictures[0].tobytes()
