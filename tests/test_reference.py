"""The package against an independent reference: same choices, same features, same logits."""

import pytest
import torch

import illava
import tiny
from illava.language import LanguageCall
from illava.vision import VisionCall
from references import qwen2_vl as reference

LAYERS = dict(vit_layers=(0, 1, 2), llm_layers=(0, 2))
PLANS = {
    "paper": dict(reduction=0.667),
    "deep": dict(reduction=0.889, recycled=0.3, members=3),
    "prune": dict(reduction=0.778, merge="prune"),
    "linear": dict(reduction=0.778, merge="linear"),
    "lse": dict(reduction=0.667, score="lse"),
    "all queries": dict(reduction=0.667, queries="all", recycled=0.2),
    "visual queries": dict(reduction=0.667, queries="visual"),
    "last query": dict(reduction=0.667, queries="last"),
    "whole picture": dict(reduction=0.667, window_score="picture", recycled=0.4),
    "release": dict(vit_keep_ratio=0.85, llm_keep_ratio=0.9),
    "first version": dict(vit_tokens_removed=3, llm_tokens_removed=4, merge="linear"),
}
SINGLE = {name: rows for name, rows in tiny.PROMPTS.items() if name not in ("batch", "text only")}


class Recorder:
    """What the package decided, read off its own state while it runs."""

    def __init__(self, monkeypatch):
        self.vision, self.language = [], []
        see, read = VisionCall.merge, LanguageCall.merge

        def vision_merge(call, block, hidden):
            features = see(call, block, hidden)
            stage, frames = call.stages[-1], call.stages[0].frame_counts
            starts = torch.tensor([0, *frames]).cumsum(0).tolist()
            kept = [
                [u - a for u in stage.units.tolist() if a <= u < b]
                for a, b in zip(starts[:-1], starts[1:], strict=True)
            ]
            self.vision.append((call, block, kept, features, stage.frame_counts))
            return features

        def language_merge(call, layer, hidden):
            out = read(call, layer, hidden)
            stage = call.stages[-1]
            self.language.append((call, layer, stage.positions, out))
            return out

        monkeypatch.setattr(VisionCall, "merge", vision_merge)
        monkeypatch.setattr(LanguageCall, "merge", language_merge)


def reference_arguments(model, inputs, parts, handle):
    pictures = [p for p in parts if not isinstance(p, int)]
    images = [p for p in pictures if not p.video]
    videos = [p for p in pictures if p.video]
    extra = {"mm_token_type_ids": inputs["mm_token_type_ids"]} if tiny.V5 else {}
    positions, _ = model.model.get_rope_index(
        inputs["input_ids"],
        image_grid_thw=inputs.get("image_grid_thw"),
        video_grid_thw=inputs.get("video_grid_thw"),
        attention_mask=inputs["attention_mask"],
        **extra,
    )
    plan = handle.plan

    def removed_in_encoder(group):
        frames = [p.tokens // p.frames for p in group for _ in range(p.frames)]
        per_frame = [plan.vit_removed(n) for n in frames]
        return {layer: [r[i] for r in per_frame] for i, layer in enumerate(plan.vit_layers)}

    schedules = [plan.schedule([p.grid])[0] for p in pictures]
    llm = [plan.llm_removed(s.tokens, s.encoder_tokens) for s in schedules]
    return dict(
        input_ids=inputs["input_ids"][0],
        images=[(p.pixels(), p.grid) for p in images],
        videos=[(p.pixels(), p.grid) for p in videos],
        position_ids=positions[:, 0],
        vit_removed_images=removed_in_encoder(images),
        vit_removed_videos=removed_in_encoder(videos),
        llm_removed={layer: [r[i] for r in llm] for i, layer in enumerate(plan.llm_layers)},
    )


def options(settings):
    names = ("recycled", "members", "score", "merge", "queries", "window_score")
    return {name: settings[name] for name in names if name in settings}


# Every prompt with SDPA; eager attention differs in the kernel alone, which one prompt shows.
CASES = [*((name, "sdpa") for name in SINGLE), ("several pictures", "eager")]


@pytest.mark.parametrize("settings", PLANS.values(), ids=PLANS.keys())
@pytest.mark.parametrize(("name", "attention"), CASES)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_same_choices_features_and_logits(family, name, settings, attention, monkeypatch):
    (parts,) = SINGLE[name]
    model, inputs = tiny.build(family, attention=attention), tiny.prompt(parts)
    handle = illava.patch(model, **LAYERS, **settings)
    arguments = reference_arguments(model, inputs, parts, handle)
    recorder = Recorder(monkeypatch)
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    handle.remove()
    expected = reference.forward(model, **arguments, **options(settings))
    assert expected.merges, "the reference merged nothing: the case tests nothing"

    torch.testing.assert_close(logits, expected.logits, atol=1e-5, rtol=1e-5)
    assert not torch.equal(logits, torch.zeros_like(logits))
    compare_encoder(recorder, expected)
    compare_language(recorder, expected, inputs)


def compare_encoder(recorder, expected):
    sources = list(dict.fromkeys(id(call) for call, *_ in recorder.vision))
    # The model encodes pictures first, then videos, each kind in one call.
    kinds = list(dict.fromkeys(m.source for m in expected.merges if m.stage == "vit"))
    assert len(sources) == len(kinds)
    for call, block, kept, features, counts in recorder.vision:
        kind = kinds[sources.index(id(call))]
        merges = [m for m in expected.merges if (m.stage, m.source, m.layer) == ("vit", kind, block)]
        assert merges
        rows = features.split([n * 4 for n in counts])
        for m in merges:
            assert kept[m.segment] == m.kept
            torch.testing.assert_close(rows[m.segment], m.features, atol=1e-5, rtol=1e-5)


def compare_language(recorder, expected, inputs):
    ids = inputs["input_ids"][0]
    visual = (ids == tiny.IMAGE) | (ids == tiny.VIDEO)
    starts = ((ids == tiny.START).nonzero().flatten() + 1).tolist()
    for _, layer, positions, out in recorder.language:
        alive = torch.zeros_like(visual)
        alive[positions[0]] = True
        for m in (m for m in expected.merges if m.stage == "llm" and m.layer == layer):
            start = starts[m.segment]
            end = start + int(visual[start:].long().cumprod(0).sum())
            assert (alive[start:end].nonzero().flatten()).tolist() == m.kept
            own = [i for i, p in enumerate(positions[0].tolist()) if start <= p < end]
            torch.testing.assert_close(out[0, own], m.features, atol=1e-5, rtol=1e-5)
        assert alive.tolist() == [a for a in expected.alive[layer + 1]]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_same_generated_tokens(family):
    (parts,) = tiny.PROMPTS["pictures and video"]
    model, inputs = tiny.build(family), tiny.prompt(parts)
    handle = illava.patch(model, **LAYERS, reduction=0.778)
    arguments = reference_arguments(model, inputs, parts, handle)
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    handle.remove()
    assert ids.tolist() == reference.generate(model, **arguments, new_tokens=8)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_features_of_the_encoder(family):
    """What leaves the encoder: full length, survivors as the reference has them, the rest -inf."""
    parts = [3, tiny.A, 2, tiny.B]
    model, inputs = tiny.build(family), tiny.prompt(parts)
    handle = illava.patch(model, **LAYERS, reduction=0.778)
    arguments = reference_arguments(model, inputs, parts, handle)
    with torch.no_grad():
        features = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    handle.remove()
    features = torch.cat(list(getattr(features, "pooler_output", features)))
    torch.testing.assert_close(features, reference.forward(model, **arguments).features, atol=1e-5, rtol=1e-5)
