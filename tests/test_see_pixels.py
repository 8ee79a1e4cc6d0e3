"""`illava.visualize`: pixels are what the report tells, and lie where the processor cut the picture."""

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from PIL import Image

import illava
import zoo
from illava.provenance import GONE, Provenance
from illava.see import figure, paint, views
from seen import FAMILIES, drawn, patches_of, seen, views_of


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
def test_a_group_has_one_colour_and_one_number(family):
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
