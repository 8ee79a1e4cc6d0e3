"""`illava.visualize`: pixels are what the report tells, and lie where the processor cut the picture."""

from collections import Counter
from dataclasses import replace

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


def says_what_became(view, steps, pixels):
    """Fails where a patch's pixels are not what its step makes of it: its own colours, grey, a tint, stripes.

    Returns:
        How many patches were which.
    """
    found = dict(kept=0, dropped=0, taken=0, earlier=0)
    before, ahead = paint.drawn(view.picture), paint.numbering(view, steps)
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
    return found


def steps_of(report, number):
    return {id(p): p.merges[number] for p in report.provenance}


@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_say_what_became_of_each_patch(family):
    """Against the dense matrix of sources."""
    report, pictures = seen(family)
    found = Counter(kept=0, dropped=0, taken=0, earlier=0)
    for view in views_of(report, pictures):
        for number in range(len(report.provenance[0].merges)):
            steps = steps_of(report, number)
            found.update(says_what_became(view, steps, paint.paint_step(view, steps)))
    assert min(found.values()) > 0, f"the case tests nothing: {found}"


WRONG = {
    "another merge": lambda view, report: paint.paint_step(view, steps_of(report, 0)),
    "the picture as it is": lambda view, report: paint.drawn(view.picture),
    "left and right swapped": lambda view, report: paint.paint_step(view, steps_of(report, -1))[:, ::-1],
    "another picture": lambda view, report: paint.paint_step(
        replace(view, picture=view.picture.rotate(180)), steps_of(report, -1)
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_pixels_are_noticed(family, wrong):
    """The check above fails on them, view by view."""
    report, pictures = seen(family)
    for view in views_of(report, pictures):
        with pytest.raises(AssertionError):
            says_what_became(view, steps_of(report, -1), WRONG[wrong](view, report))


def test_one_wrong_patch_is_noticed():
    """Any patch that is grey, tinted or striped in its own colours, any other striped."""
    report, pictures = seen("qwen2_5_vl")
    view, steps = views_of(report, pictures)[0], steps_of(report, -1)
    right, own = paint.paint_step(view, steps), paint.drawn(view.picture)
    says_what_became(view, steps, right)
    for place, patch, inside in patches_of(view, right.shape):
        gone, wrong = steps[id(place.provenance)].state[patch] == GONE, right.copy()
        wrong[inside] = own[inside] if gone else paint.DROPPED
        with pytest.raises(AssertionError):
            says_what_became(view, steps, wrong)


def ranks_shown(view, steps, pixels):
    """Fails where colours of the map do not grow with what the merge ranked by, or stripes are ranked.

    Returns:
        How many patches were not ranked.
    """
    colours = np.array([colormaps[paint.HEAT](i)[:3] for i in range(256)])
    grey = paint.drawn(view.picture).mean(2, keepdims=True)
    levels, unranked = {}, 0
    for place, patch, inside in patches_of(view, pixels.shape):
        importance = steps[id(place.provenance)].importance[patch].item()
        if np.isnan(importance):
            unranked += 1
            assert set(np.unique(pixels[inside])) <= {paint.DROPPED, paint.STRIPES}
            continue
        heat = (pixels[inside] - (1 - paint.HEAT_COVER) * grey[inside]) / paint.HEAT_COVER
        assert np.ptp(heat.reshape(-1, 3), axis=0).max() < 1e-6
        distance = np.abs(colours - heat.reshape(-1, 3)[0]).max(1)
        assert distance.min() < 1e-6
        levels.setdefault(id(place.provenance), []).append((importance, int(distance.argmin())))
    for pairs in levels.values():
        ranked = [level for _, level in sorted(pairs)]
        assert ranked == sorted(ranked)
        assert ranked[-1] > ranked[0] or len({x for x, _ in pairs}) == 1
    return unranked


@pytest.mark.parametrize("family", FAMILIES)
def test_importance_is_drawn_by_rank(family):
    """In every merge; what was not ranked is striped."""
    report, pictures = seen(family)
    unranked = 0
    for view in views_of(report, pictures):
        for number in (0, -1):
            steps = steps_of(report, number)
            unranked += ranks_shown(view, steps, paint.paint_importance(view, steps))
    assert unranked > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_importance_is_noticed(family):
    """Another merge's, the least important as the most, and what is left instead."""
    report, pictures = seen(family)
    first = steps_of(report, 0)
    least = {key: replace(step, importance=-step.importance) for key, step in first.items()}
    for view in views_of(report, pictures):
        for wrong in (
            paint.paint_importance(view, steps_of(report, -1)),
            paint.paint_importance(view, least),
            paint.paint_step(view, first),
        ):
            with pytest.raises(AssertionError):
                ranks_shown(view, first, wrong)


def agreement(out, panel, wanted):
    """The share of patches whose pixels on a page are about those that are wanted.

    Args:
        out: the page, `[height, width, 3]`.
        panel: left, bottom, width and height of the picture on it, as shares.
        wanted: `[height, width, 3]` of the picture, and its patches down and across.
    """
    (left, bottom, width, height), (pixels, rows, columns) = panel, wanted
    agree = []
    for r in range(rows):
        for c in range(columns):
            # a third into the patch, away from outlines at its edge and numbers in its unit's middle
            x, y = (c + (0.3, 0.7)[c % 2]) / columns, (r + (0.3, 0.7)[r % 2]) / rows
            there = out[
                int((1 - bottom - height * (1 - y)) * out.shape[0]), int((left + width * x) * out.shape[1])
            ]
            expected = pixels[int(y * pixels.shape[0]), int(x * pixels.shape[1])]
            agree.append(np.abs(there - expected).max() < 0.35)
    return np.mean(agree)


def test_the_picture_that_comes_out_shows_it():
    """Pixels of the PIL image itself, where its panels lie; neither another merge nor the bare picture."""
    report, pictures = seen("qwen2_5_vl")
    view, size = views_of(report, pictures)[0], report.provenance[0].frames[0]
    merges = range(len(report.provenance[0].merges))
    could_be = [paint.paint_step(view, steps_of(report, number)) for number in merges]
    could_be.append(paint.drawn(view.picture))
    for number in merges:
        out = np.asarray(illava.visualize(report, pictures, merges=number)) / 255
        made = figure.compose([view], [number], importance=False, title=None, video=False)
        panel = made.axes[1].get_position().bounds
        own, *others = [
            agreement(out, panel, (pixels, *size)) for pixels in could_be[number:] + could_be[:number]
        ]
        assert own > 0.97  # numbers and rescaling blur some
        assert max(others) < 0.95


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
    """The pixels that the model was given, against the drawn picture at the tile's place and at others'."""
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
    for _, place in places:
        for other in places:
            alike = likeness(*other, tiles[place.frame])
            assert (alike > 0.9) == (other[1] is place), f"tile {place.frame} at {other[1].box}: {alike}"


def likeness(shown, place, tile):
    """How a tile's pixels go with those of a drawn picture at a place, in the channel where they do least."""
    left, top, right, bottom = place.box
    box = left * shown.width, top * shown.height, right * shown.width, bottom * shown.height
    there = np.asarray(shown.resize((16, 16), Image.Resampling.BILINEAR, box=box), float).reshape(-1, 3).T
    seen_there = torch.nn.functional.interpolate(tile[None], (16, 16), mode="area")[0].flatten(1).numpy()
    return min(np.corrcoef(seen_there[channel], there[channel])[0, 1] for channel in range(3))
