"""Pictures encoded first, their features handed over later; and packing over rows merged away."""

import inspect

import pytest
import torch

import zoo
from contract import tools
from contract.recorder import options
from illava.families.packing import pack_over_dead
from references.llava import weights
from zoo.common import V5

needs_v5 = pytest.mark.skipif(
    not V5, reason="take features for pixels: 4.57 encodes pictures inside `forward`"
)


def encode(model, inputs: dict) -> tuple[dict, dict]:
    """What `generate` does first: the features of images and videos, and the inputs without pixels."""
    encoded = {}
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if pixels in inputs:
            function = getattr(model.model, f"get_{kind}_features")
            taken = inspect.signature(function).parameters
            given = {name: x for name, x in inputs.items() if name in taken}
            with torch.no_grad():
                encoded[kind] = function(**given, return_dict=True)
    return encoded, {name: x for name, x in inputs.items() if not name.startswith("pixel_values")}


@needs_v5
@pytest.mark.capability("features first")
@tools.each_single_row_with_pictures
@tools.each_rule
def test_features_first_give_what_one_call_gives(family, kind, settings):
    model, inputs = tools.build(family), tools.prompt_of(family, kind)
    with tools.patch(model, family, **settings):
        expected = tools.forward(model, inputs, use_cache=True)
        encoded, rest = encode(model, inputs)
        out = tools.forward(model, rest, mm_encoder_outputs=encoded, use_cache=True)
    torch.testing.assert_close(out.logits, expected.logits, atol=1e-5, rtol=1e-5)
    assert tools.held(out.past_key_values) == tools.held(expected.past_key_values)


@needs_v5
@pytest.mark.capability("features first")
@tools.each_single_row_with_pictures
@tools.each_rule
def test_rows_merged_away_are_marked_and_only_they(family, kind, settings):
    model, inputs = tools.build(family), tools.prompt_of(family, kind)
    with tools.patch(model, family, **settings) as handle:
        encoded, _ = encode(model, inputs)
    features = [f.reshape(-1, f.shape[-1]) for out in encoded.values() for f in out.pooler_output]
    features = torch.cat(features)
    expected = zoo.reference(family).forward(
        model, inputs, *tools.removed_by(handle.plan), **options(handle.plan)
    )
    marked = features.isneginf()
    assert torch.equal(marked.all(-1), marked.any(-1))
    assert torch.equal(marked.any(-1), expected.features.isneginf().any(-1))
    if kind != "video" or "llava" not in family:  # pooled from four patches, of which one mostly lives
        assert marked.any()
    assert not marked.all()
    torch.testing.assert_close(features, expected.features, atol=1e-5, rtol=1e-5)


# Sizes that LLaVA-OneVision's tiles of 27 x 27 are shrunk to, but for the first. At some of them torch leaves
# a source that should have no weight one of up to 8e-6; at others a source should have one as small as 4e-5.
SIZES = [
    ((27, 27), (25, 25)),
    ((66, 135), (56, 115)),
    ((81, 99), (73, 89)),
    ((59, 162), (48, 134)),
    ((89, 162), (60, 109)),
    ((162, 162), (81, 81)),
    ((27, 27), (14, 14)),
]


@pytest.mark.parametrize(("before", "after"), SIZES, ids=str)
def test_a_token_without_a_live_source_is_dead(before, after):
    """And one with a live source is the mean of the live ones, weighted as the interpolation does."""

    def shrink(features):
        grid = features[0].view(*before, -1).permute(2, 0, 1)[None]
        grid = torch.nn.functional.interpolate(grid, size=after, mode="bilinear")
        return [grid[0].permute(1, 2, 0).flatten(0, 1)]

    generator = torch.Generator().manual_seed(0)
    features = torch.randn(before[0] * before[1], 3, generator=generator)
    alive = torch.rand(len(features), generator=generator) < 0.1
    features[~alive] = float("-inf")
    (packed,) = pack_over_dead(shrink, ([features],), {})

    tables = []  # exact fractions, only then rounded
    for length, shorter in zip(before, after, strict=True):
        table = torch.zeros(shorter, length)
        for row, sources in enumerate(weights(length, shorter)):
            for source, share in sources:
                table[row, source] += float(share)
        tables.append(table)
    down, across = tables

    def mix(grid):  # [height, width, channels]
        return torch.einsum("ri,cj,ijk->rck", down, across, grid).flatten(0, 1)

    live = alive.view(*before, 1).float()
    total = mix(live)
    dead = total[:, 0] == 0
    assert dead.any()
    assert torch.equal(packed.isneginf().all(-1), dead)
    expected = mix(features.view(*before, -1).masked_fill(live == 0, 0)) / total
    heavy = ~dead & (total[:, 0] > 1e-3)  # torch's own weights are exact to 1e-6 or so
    torch.testing.assert_close(packed[heavy], expected[heavy], atol=1e-2, rtol=1e-2)
