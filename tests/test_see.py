"""`illava.visualize`: numbers and words are what the report tells; files, and what cannot be drawn."""

import io
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import illava
import zoo
from contract import tools
from illava import families
from illava.provenance import Provenance, Step
from illava.see import cells, figure, given, paint, show, views
from illava.sparse import one_each
from seen import FAMILIES, VIDEOS, drawn, seen, shown, words

# ---------------------------------------------------------------- words


@pytest.mark.parametrize("family", FAMILIES)
def test_captions_are_the_reports_numbers(family):
    report, pictures = seen(family)
    everything = words(drawn(report, pictures))
    said = [text for text in everything if " left" in text]
    merges = report.provenance[0].merges
    assert len(said) % len(merges) == 0
    for number, step in enumerate(merges):
        own = [text.split() for text in said[number :: len(merges)]]
        left = sum(int(text[0].replace(",", "")) for text in own)
        recycled = sum(int(text[2]) for text in own if len(text) > 2)
        assert left == sum(p.layers[number].tokens_out for p in report.pictures)
        assert recycled == sum(int(p.merges[number].recycled.sum()) for p in report.provenance)
        assert f"after {step.name}" in everything


@pytest.mark.parametrize("family", VIDEOS)
def test_a_video_is_a_strip_of_its_frames(family):
    """One column for each frame the encoder saw, one row for each merge, and the tokens of them all."""
    rows = zoo.FAMILIES[family].KINDS[
        "picture and video" if family == "llava_onevision" else "pictures and video"
    ]
    video = next(x for x in tools.pictures_of(rows) if not hasattr(x, "pil"))
    model = tools.build(family)
    with tools.patch(model, family, trace=True, **tools.DEEP) as handle:
        tools.forward(model, tools.prompt(family, [3, video, 5]))
    report = handle.report
    frames = sum(len(p.frames) for p in report.provenance)
    merges = len(report.provenance[0].merges)
    made = drawn(report, video.array(), frames=99)
    assert len(made.axes) == frames * (1 + merges)
    assert len([w for w in words(made) if w.startswith("frame")]) == frames
    for number, name in enumerate(["as given", *(f"after {s.name}" for s in report.provenance[0].merges)]):
        total = sum(r.layers[number - 1].tokens_out if number else r.encoded_units for r in report.pictures)
        assert f"{name}\n{total:,} tokens" in words(made)
    assert (
        len(drawn(report, list(given.as_pictures(video.array(), video=True)[0]), frames=2, merges=0).axes)
        == 4
    )


def test_groups_of_a_video_span_its_frames():
    """A token that took in patches of another frame has one number in both."""
    report, pictures = seen("qwen2_5_vl", "video")
    made = drawn(report, pictures, merges=-1)
    frames = len(report.provenance[0].frames)
    hubs = [{t.get_text() for t in axes.texts if t.get_bbox_patch()} for axes in made.axes[frames:]]
    members = [{t.get_text() for t in axes.texts if not t.get_bbox_patch()} for axes in made.axes[frames:]]
    assert sum(map(len, hubs)) == len(set.union(*hubs))  # nobody's number is another's
    assert any(members[i] & hubs[j] for i in range(frames) for j in range(frames) if i != j)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_of_a_batch_has_its_own_pictures(family):
    kind = zoo.FAMILIES[family].KINDS["batch"]
    for row, parts in enumerate(kind):
        report, _ = seen(family, "batch")
        if not shown(parts):
            with pytest.raises(illava.PictureError, match=f"row={row} of the last call has no picture; rows"):
                drawn(report, Image.new("RGB", (64, 64)), row=row)
            continue
        made = drawn(report, shown(parts), row=row, merges=0)
        said = [text for text in words(made) if " left" in text]
        left = sum(int(text.split()[0].replace(",", "")) for text in said)
        assert left == sum(p.layers[0].tokens_out for p in report.pictures if p.row == row)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llava_onevision"])
def test_several_pictures_are_rows(family):
    report, pictures = seen(family, "several pictures")
    names = [text for text in words(drawn(report, pictures, merges=0)) if text.startswith("picture ")]
    assert [name.split(",")[0].split()[1] for name in names if "tiles" not in name] == ["1", "2", "3"]


def test_small_units_wrap_the_panels_and_have_no_numbers():
    """A picture of 40 by 40 units: three panels side by side, and each of them as wide as a page allows."""
    number = 40 * 40
    step = _whole(number, (80, 80), recycled=torch.arange(number) < 50)
    own = Provenance("image", 0, "qwen2_5_vl", ((80, 80),), 2, (step,) * 5, step)
    view = views.views([own], [Image.new("RGB", (800, 800))], 1)
    rows = cells.arrange(view, range(5), importance=False, video=False, readable=132)
    assert [len(row.cells) for row in rows] == [3, 3]
    assert [name for row in rows for name in row.above][1:] == ["after encoder block 3"] * 5
    narrow = figure.compose(view * 2, [0, 1, 2, 3, 4], importance=False, title=None, video=False)
    assert not any(axes.texts for axes in narrow.axes)


def _whole(number, size, recycled):
    """A merge after which everything is left, a token for each of the first patches."""
    patches = size[0] * size[1]
    stands = one_each(torch.arange(number), patches).float()
    state = torch.full((patches,), 2, dtype=torch.uint8)
    return Step("vit", 3, torch.arange(number), recycled, recycled, stands, stands, state)


def test_tokens_that_read_everything_are_drawn_by_how_much():
    """Those of a resampler stand nowhere: a patch is as bright as the tokens are made of it."""
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0]).repeat(2, 1) / 10
    step = Step(
        "llm", 0, torch.arange(2), torch.zeros(2, dtype=torch.bool), torch.ones(2, dtype=torch.bool),
        sources=weights.repeat_interleave(100, 1).div(100).to_sparse().coalesce(),
        stands=torch.full((2, 400), 1 / 400).to_sparse().coalesce(),
        state=torch.full((400,), 2, dtype=torch.uint8),
    )  # fmt: skip
    own = Provenance("image", 0, "minicpmv", ((4, 100),), 1, (step,), step)
    view = views.View("picture", Image.new("RGB", (400, 16), "white"), (views.Place(own, 0),))
    pixels = paint.paint_step(view, {id(own): step})
    bright = [pixels[i].mean() for i in (2, 7, 12, 18)]
    assert bright == sorted(bright)
    assert bright[0] < 0.6 < bright[-1]
    made = figure.compose([view], [0], importance=False, title=None, video=False)
    assert [text.get_text() for text in made.legends[0].get_texts()] == ["brighter: tokens read more of it"]


# ---------------------------------------------------------------- files and notebooks


def test_files_and_notebooks(tmp_path):
    report, pictures = seen("qwen2_5_vl")
    out = illava.visualize(report, pictures, save=tmp_path / "a.png", title="what is this ?", importance=True)
    assert isinstance(out, Image.Image)
    assert Image.open(io.BytesIO(out._repr_png_())).size == out.size  # what a notebook shows
    with Image.open(tmp_path / "a.png") as saved:
        np.testing.assert_array_equal(np.asarray(saved.convert("RGB")), np.asarray(out))
    illava.visualize(report, pictures, save=str(tmp_path / "a.svg"))
    root = ElementTree.parse(tmp_path / "a.svg").getroot()
    merges = len(report.provenance[0].merges)
    assert len(root.findall(".//{http://www.w3.org/2000/svg}image")) == 1 + merges
    illava.visualize(report, pictures, save=tmp_path / "a.pdf")
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")


def test_the_legend_names_what_is_drawn():
    report, pictures = seen("qwen2_5_vl")
    plain = [text.get_text() for text in drawn(report, pictures).legends[0].get_texts()]
    assert plain == [
        "informative: kept", "recycled: takes in others", "taken in by the token of that number",
        "recycled in an earlier merge", "taken in earlier", "dropped",
    ]  # fmt: skip
    both = [text.get_text() for text in drawn(report, pictures, importance=True).legends[0].get_texts()]
    assert both == [*plain, "most important", "least important"]


@pytest.mark.parametrize(
    ("family", "kind"),
    [("qwen2_5_vl", "one picture"), ("qwen2_5_vl", "several pictures"), ("qwen2_5_vl", "video"),
     ("internvl", "several pictures")],
)  # fmt: skip
def test_no_words_overlap(family, kind):
    report, pictures = seen(family, kind)
    made = drawn(report, pictures, importance=True, title="In which order did the digits appear ?")
    figure.FigureCanvasAgg(made).draw()
    boxes = [t.get_window_extent() for t in made.texts if t.get_text()]
    boxes += [axes.get_window_extent() for axes in made.axes] + [made.legends[0].get_window_extent()]
    page = made.bbox
    for number, box in enumerate(boxes):
        assert page.x0 <= box.x0 < box.x1 <= page.x1
        assert page.y0 <= box.y0 < box.y1 <= page.y1
        for other in boxes[:number]:
            across = min(box.x1, other.x1) - max(box.x0, other.x0)
            down = min(box.y1, other.y1) - max(box.y0, other.y0)
            assert min(across, down) < 1, "these overlap by more than a pixel"


ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("page", ["README.md", "docs/see.md"])
def test_pictures_of_the_documents_are_there_and_small(page):
    text = (ROOT / page).read_text()
    shown_there = [(ROOT / page).parent / name for name in re.findall(r"!\[[^]]*\]\(([^)]*see[^)]*)\)", text)]
    assert shown_there
    for file in shown_there:
        assert file.stat().st_size < 200_000
        with Image.open(file) as picture:
            assert max(picture.size) <= 1400


@pytest.mark.slow
def test_the_example_draws_them(tmp_path):
    command = [sys.executable, ROOT / "examples" / "see.py", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    committed = sorted(file.name for file in (ROOT / "docs" / "images").glob("see*.jpg"))
    assert sorted(file.name for file in tmp_path.iterdir()) == committed
    assert "which digit is white ? four" in done.stdout


# ---------------------------------------------------------------- what cannot be drawn


def refused(match, *args, **options):
    with pytest.raises(illava.PictureError, match=match):
        illava.visualize(*args, **options)


def test_what_cannot_be_drawn_is_said():
    report, pictures = seen("qwen2_5_vl", "several pictures")
    untraced = illava.Report(report.pictures, report.flops, None)
    refused("trace=True", untraced, pictures)
    refused("trace=True", None, pictures)
    refused("tells of 3 images, and 2 came", report, pictures[:2])
    refused("tells of 3 images, and 4 came", report, [*pictures, pictures[0]])
    refused("another shape; pass those", report, [pictures[1], pictures[0], pictures[2]])
    refused(r"merges=9: this call has merges 0 to \d, so there is no \[9\]", report, pictures, merges=9)
    refused("frames=0: at least one frame", report, pictures, frames=0)
    refused(r"save='a.gif': what is drawn is written as .png, .svg, .pdf", report, pictures, save="a.gif")
    refused("got ndarray of float64 and shape", report, [np.zeros((8, 8, 3))] * 3)
    refused("got str", report, ["picture.png"] * 3)
    refused("one of its frames is itself a list of 3; pass those of one batch row", report, [[pictures]])
    report, (video,) = seen("qwen2_5_vl", "video")
    refused("saw 3 frames or pairs of frames of the video, and 2 came", report, video[:2])
    refused("tells of 0 images, and 1 came", report, Image.new("RGB", (80, 80)))


def test_lists_deeper_than_videos_are_refused():
    """None of what came is left out: a batch of rows of videos has one list too many."""
    picture = Image.new("RGB", (8, 8))
    video = np.zeros((2, 8, 8, 3), dtype=np.uint8)
    for deep in ([[[picture]]], [[video]], [[picture, [picture, picture]]], ([(video, video)],)):
        for of_videos in (False, True):
            with pytest.raises(illava.PictureError, match=r"frames is itself a list of \d"):
                given.as_pictures(deep, video=of_videos)
    for fine in ([[picture, picture], video, picture], [[picture]], [video]):
        for of_videos in (False, True):
            made = given.as_pictures(fine, video=of_videos)
            assert [len(x) if isinstance(x, list) else 1 for x in made] == [
                len(x) if not isinstance(x, Image.Image) else 1 for x in fine
            ]


def test_features_of_the_callers_are_not_drawn():
    step = _whole(4, (1, 4), recycled=torch.zeros(4, dtype=torch.bool))
    own = Provenance("image", 0, "qwen2_5_vl", ((1, 4),), 1, (step,), step, known=False)
    with pytest.raises(illava.PictureError, match="features came from the caller"):
        views.views([own], [Image.new("RGB", (40, 10))], 1)


def test_tiles_of_a_family_that_cuts_nothing_are_refused():
    step = _whole(8, (2, 4), recycled=torch.zeros(8, dtype=torch.bool))
    for unknown in ("qwen2_5_vl", "a family to come"):
        own = Provenance("image", 0, unknown, ((1, 4), (1, 4)), 1, (step,), step)
        with pytest.raises(
            illava.PictureError, match=f"how {unknown} lays 2 tiles on a picture is not known"
        ):
            views.views([own], [Image.new("RGB", (40, 10))], 1)


def test_drawing_knows_of_families_what_their_files_say():
    """None is named here, and all say how their pictures are cut up."""
    named = re.compile("|".join(rf"\b{name}\b" for name in illava.supported_models()))
    for file in Path(views.__file__).parent.glob("*.py"):
        assert not named.search(file.read_text()), file
    for name in illava.supported_models():
        module = families.family_of(name, name)
        assert families.cutting(name) is module.CUTTING[name]
        assert module.CUTTING.keys() == module.ABOUT.keys()


@pytest.mark.skipif("minicpmv4_6" not in zoo.FAMILIES, reason="transformers 4.57 has no MiniCPM-V 4.6")
def test_slices_of_other_pictures_are_refused():
    report, pictures = seen("minicpmv4_6", "several pictures")
    refused("5 pictures and slices of pictures, and they are not those of the 7", report, pictures[:1] * 7)


@pytest.mark.parametrize("package", ["matplotlib.figure", "PIL.Image"])
def test_what_is_missing_is_said(package, monkeypatch):
    report, pictures = seen("qwen2_5_vl")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(illava.MissingExtraError, match=r'pip install "illava\[see\]"'):
        show.visualize(report, pictures)
