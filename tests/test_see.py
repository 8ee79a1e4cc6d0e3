"""`illava.visualize`: what is drawn is what the report tells, in pixels, numbers and words."""

import io
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from PIL import Image

import illava
import zoo
from contract import tools
from illava.provenance import GONE, Provenance, Step
from illava.see import cells, figure, given, paint, show, views
from illava.sparse import one_each

# Windows; tiles and pixel shuffle; packing with padding and pooling; a merger inside the encoder, and slices.
FAMILIES = [
    name for name in ("qwen2_5_vl", "internvl", "llava_onevision", "minicpmv4_6") if name in zoo.FAMILIES
]
VIDEOS = [name for name in FAMILIES if name != "internvl"]  # to which frames are pictures


def shown(rows):
    """What a row's pictures and videos look like."""
    return [x.pil() if hasattr(x, "pil") else x.array() for x in tools.pictures_of([rows])]


_SEEN: dict = {}


def seen(family, kind="one picture", row=0):
    """A report and what its row's pictures look like."""
    if (family, kind) not in _SEEN:
        model = tools.build(family)
        with tools.patch(model, family, trace=True, **tools.DEEP) as handle:
            tools.forward(model, tools.prompt_of(family, kind))
        _SEEN[family, kind] = handle.report
    return _SEEN[family, kind], shown(zoo.FAMILIES[family].KINDS[kind][row])


@pytest.fixture
def drawn(monkeypatch):
    """Called as `illava.visualize`: matplotlib's figure instead of its pixels."""
    monkeypatch.setattr(figure, "image", lambda made: made)
    return illava.visualize


def words(made):
    return [text.get_text() for text in made.texts if text.get_text()]


def views_of(report, pictures, row=0):
    own = [p for p in report.provenance if p.row == row]
    video = all(p.kind == "video" for p in own)
    return views.views(own, given.as_pictures(pictures, video=video), 99)


def patches_of(view, shape):
    """Each patch on a view: its place, its number in the provenance, and its pixels as a pair of slices."""
    for place in view.places:
        own = place.provenance
        rows, columns = own.frames[place.frame]
        first = sum(h * w for h, w in own.frames[: place.frame])
        left, top, right, bottom = place.box
        x = np.linspace(left * shape[1], right * shape[1], columns + 1).round().astype(int)
        y = np.linspace(top * shape[0], bottom * shape[0], rows + 1).round().astype(int)
        for r in range(rows):
            for c in range(columns):
                yield place, first + r * columns + c, (slice(y[r], y[r + 1]), slice(x[c], x[c + 1]))


# ---------------------------------------------------------------- pixels


@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_say_what_became_of_each_patch(family):
    """Against the dense matrix of sources: its own colours, grey, its token's tint, or stripes."""
    report, pictures = seen(family)
    found = dict(kept=0, dropped=0, taken=0, earlier=0)
    for view in views_of(report, pictures):
        before = paint.drawn(view.picture)
        for number in range(len(report.provenance[0].merges)):
            steps = {id(p): p.merges[number] for p in report.provenance}
            pixels, ahead = paint.paint_step(view, steps), paint.numbering(view, steps)
            for place, patch, inside in patches_of(view, pixels.shape):
                step, here = steps[id(place.provenance)], pixels[inside]
                sources = step.sources.to_dense()[:, patch]
                takers = (sources * step.recycled).nonzero().flatten()
                if step.state[patch] != GONE:
                    found["kept"] += 1
                    np.testing.assert_array_equal(here, before[inside])
                elif len(takers):
                    found["taken"] += 1
                    most = sources[takers].max()
                    colours = {
                        paint.colour(ahead[id(place.provenance)] + int(step.recycled[: t + 1].sum()))
                        for t in takers.tolist()
                        if torch.isclose(sources[t], most)
                    }
                    tints = [here - paint.TINT * np.array(to_rgb(colour)) for colour in colours]
                    assert any(np.ptp(left, axis=2).max() < 1e-6 for left in tints)  # the rest is grey
                elif sources.sum() > 0:
                    found["earlier"] += 1
                    assert np.ptp(here, axis=2).max() < 1e-6
                    assert here.min() >= paint.ABSORBED
                else:
                    found["dropped"] += 1
                    assert set(np.unique(here)) <= {paint.DROPPED, paint.STRIPES}
    assert min(found.values()) > 0, f"the case tests nothing: {found}"


@pytest.mark.parametrize("family", FAMILIES)
def test_importance_is_drawn_by_rank(family):
    """Colours of the map grow with what the merge ranked by; what was not ranked is striped."""
    report, pictures = seen(family)
    steps = {id(p): p.merges[0] for p in report.provenance}
    colours = np.array([colormaps[paint.HEAT](i)[:3] for i in range(256)])
    for view in views_of(report, pictures):
        pixels, grey = paint.paint_importance(view, steps), paint.drawn(view.picture).mean(2, keepdims=True)
        levels: dict = {}
        for place, patch, inside in patches_of(view, pixels.shape):
            importance = steps[id(place.provenance)].importance[patch].item()
            heat = (pixels[inside] - (1 - paint.HEAT_COVER) * grey[inside]) / paint.HEAT_COVER
            assert np.ptp(heat.reshape(-1, 3), axis=0).max() < 1e-6
            distance = np.abs(colours - heat.reshape(-1, 3)[0]).max(1)
            assert distance.min() < 1e-6
            levels.setdefault(id(place.provenance), []).append((importance, int(distance.argmin())))
        for pairs in levels.values():
            ranked = [level for _, level in sorted(pairs)]
            assert ranked == sorted(ranked)
            assert ranked[-1] > ranked[0]
    last = {id(p): p.merges[-1] for p in report.provenance}
    unranked = sum(step.importance.isnan().sum() for step in last.values())
    assert unranked > 0
    for view in views_of(report, pictures):
        pixels = paint.paint_importance(view, last)
        for place, patch, inside in patches_of(view, pixels.shape):
            if last[id(place.provenance)].importance[patch].isnan():
                assert set(np.unique(pixels[inside])) <= {paint.DROPPED, paint.STRIPES}


def test_the_picture_that_comes_out_shows_it():
    """Pixels of the PIL image itself, where its panels lie."""
    report, pictures = seen("qwen2_5_vl")
    out = np.asarray(illava.visualize(report, pictures, merges=0)) / 255
    made = figure.compose(views_of(report, pictures), [0], importance=False, title=None, video=False)
    view, steps = views_of(report, pictures)[0], {id(report.provenance[0]): report.provenance[0].merges[0]}
    left, bottom, width, height = made.axes[1].get_position().bounds
    rows, columns = report.provenance[0].frames[0]
    expected = paint.paint_step(view, steps)
    middle = []
    for r in range(rows):
        for c in range(columns):
            # a quarter into the patch, away from outlines at its edge and numbers in its unit's middle
            x, y = (c + (0.3, 0.7)[c % 2]) / columns, (r + (0.3, 0.7)[r % 2]) / rows
            there = out[
                int((1 - bottom - height * (1 - y)) * out.shape[0]), int((left + width * x) * out.shape[1])
            ]
            wanted = expected[int(y * expected.shape[0]), int(x * expected.shape[1])]
            middle.append(np.abs(there - wanted).max() < 0.35)
    assert np.mean(middle) > 0.8  # numbers and rescaling blur some


@pytest.mark.parametrize("family", FAMILIES)
def test_a_group_has_one_colour_and_one_number(family, drawn):
    """Around the token that took others in, in the circle on it, and on what it took in."""
    report, pictures = seen(family)
    made = drawn(report, pictures, merges=0)
    panels = iter(made.axes)
    for view in views_of(report, pictures):
        next(panels)
        axes = next(panels)
        steps = {id(p): p.merges[0] for p in report.provenance}
        ahead, shape = paint.numbering(view, steps), paint.drawn(view.picture).shape
        circled, plain = {}, {}
        for text in axes.texts:
            (circled if text.get_bbox_patch() else plain).setdefault(int(text.get_text()), []).append(text)
        outlines = [tuple(c.get_colors()[0][:3]) for c in axes.collections if len(c.get_colors())]
        hubs: dict = {}
        members: dict = {}
        for place, patch, inside in patches_of(view, shape):
            own, taken = paint.groups(steps[id(place.provenance)])
            for number, where in ((own[patch], hubs), (taken[patch], members)):
                if number:
                    where.setdefault(ahead[id(place.provenance)] + int(number), []).append(inside)
        assert circled.keys() == hubs.keys()
        assert plain.keys() == members.keys()
        assert members.keys() <= {*range(1, sum(int(s.recycled.sum()) for s in steps.values()) + 1)}
        for texts, where in ((circled, hubs), (plain, members)):
            for number, written in texts.items():
                for text in written:
                    x, y = text.get_position()
                    assert any(
                        rows.start <= y <= rows.stop and columns.start <= x <= columns.stop
                        for rows, columns in where[number]
                    )
        for number, written in circled.items():
            colour = to_rgb(paint.colour(number))
            assert colour in outlines
            assert {text.get_bbox_patch().get_facecolor()[:3] for text in written} == {colour}


# ---------------------------------------------------------------- words


@pytest.mark.parametrize("family", FAMILIES)
def test_captions_are_the_reports_numbers(family, drawn):
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
def test_a_video_is_a_strip_of_its_frames(family, drawn):
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


def test_groups_of_a_video_span_its_frames(drawn):
    """A token that took in patches of another frame has one number in both."""
    report, pictures = seen("qwen2_5_vl", "video")
    made = drawn(report, pictures, merges=-1)
    frames = len(report.provenance[0].frames)
    hubs = [{t.get_text() for t in axes.texts if t.get_bbox_patch()} for axes in made.axes[frames:]]
    members = [{t.get_text() for t in axes.texts if not t.get_bbox_patch()} for axes in made.axes[frames:]]
    assert sum(map(len, hubs)) == len(set.union(*hubs))  # nobody's number is another's
    assert any(members[i] & hubs[j] for i in range(frames) for j in range(frames) if i != j)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_of_a_batch_has_its_own_pictures(family, drawn):
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
def test_several_pictures_are_rows(family, drawn):
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


def test_the_legend_names_what_is_drawn(drawn):
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
def test_no_words_overlap(family, kind, drawn):
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


# ---------------------------------------------------------------- where tiles lie


@pytest.mark.parametrize("family", ["internvl", "llava_onevision", "llava_next"])
@pytest.mark.parametrize("size", [(112, 224), (224, 336), (340, 120), (120, 100), (60, 180), (90, 91)])
def test_tiles_lie_where_the_processor_cut_them(family, size):
    """The pixels that the model was given, against the drawn picture at the tile's place."""
    height, width = size
    smooth = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    picture = Image.fromarray(smooth).resize((width, height), Image.Resampling.BICUBIC)
    processor = zoo.FAMILIES[family].processor()
    inputs = processor.image_processor(images=[picture], return_tensors="pt")
    tiles = inputs["pixel_values"].flatten(0, -4)
    side = tiles.shape[-1] // getattr(zoo.FAMILIES[family], "PATCH", tiles.shape[-1])
    own = Provenance("image", 0, family, ((side, side),) * len(tiles), 1, (), None)
    places = [(view.picture, place) for view in views.views([own], [picture], 1) for place in view.places]
    assert sorted(place.frame for _, place in places) == list(range(len(tiles)))
    for shown_at, place in places:
        left, top, right, bottom = place.box
        box = left * shown_at.width, top * shown_at.height, right * shown_at.width, bottom * shown_at.height
        crop = shown_at.resize((16, 16), Image.Resampling.BILINEAR, box=box)
        tile = torch.nn.functional.interpolate(tiles[place.frame][None], (16, 16), mode="area")[0]
        seen_there, there = tile.flatten(1).numpy(), np.asarray(crop, float).reshape(-1, 3).T
        for channel in range(3):
            assert np.corrcoef(seen_there[channel], there[channel])[0, 1] > 0.9


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
    report, (video,) = seen("qwen2_5_vl", "video")
    refused("saw 3 frames or pairs of frames of the video, and 2 came", report, video[:2])
    refused("tells of 0 images, and 1 came", report, Image.new("RGB", (80, 80)))


def test_features_of_the_callers_are_not_drawn():
    step = _whole(4, (1, 4), recycled=torch.zeros(4, dtype=torch.bool))
    own = Provenance("image", 0, "qwen2_5_vl", ((1, 4),), 1, (step,), step, known=False)
    with pytest.raises(illava.PictureError, match="features came from the caller"):
        views.views([own], [Image.new("RGB", (40, 10))], 1)


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
