"""The report of a call, and its count of operations against one that watches them."""

import dataclasses
import math
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import illava
import tiny
from illava import vision_scores
from illava.flops import Cost, Flops
from illava.report import LayerRecord, PictureRecord

PLAN = dict(vit_layers=(0, 1), llm_layers=(0, 2), reduction=0.7)


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def model(request):
    return tiny.build(request.param)


def report_of(model, *rows, plan=PLAN, **extra):
    with illava.patch(model, **plan) as handle, torch.no_grad():
        model(**tiny.prompt(*rows), **extra)
        return handle.report, handle.plan


# ---------------------------------------------------------------- what it says


def test_a_batch_with_pictures_and_video(model):
    """One record per picture, pictures before videos, each with its row, its grid and its plan."""
    rows = [5, tiny.A, 7], [3, tiny.C, 2, tiny.B, 9], [6], [2, tiny.V, 3]
    report, plan = report_of(model, *rows)
    expected = [("image", 0, tiny.A), ("image", 1, tiny.C), ("image", 1, tiny.B), ("video", 3, tiny.V)]
    assert len(report.pictures) == 4
    for record, (kind, row, picture) in zip(report.pictures, expected, strict=True):
        (schedule,) = plan.schedule([picture.grid])
        assert (record.kind, record.row, record.grid) == (kind, row, picture.grid)
        assert record.tokens == picture.tokens
        layers = [(r.stage, r.layer, r.tokens_in, r.tokens_out) for r in record.layers]
        assert layers == [*(("vit", *x) for x in schedule.vit), *(("llm", *x) for x in schedule.llm)]
        assert [r.tokens_removed for r in record.layers] == [
            r.tokens_in - r.tokens_out for r in record.layers
        ]
        assert record.final_tokens == schedule.final_tokens
        assert record.reduction == pytest.approx(schedule.reduction)
        assert record.asked_reduction == 0.7
        assert record.note == ""
    assert report.tokens == sum(p.tokens for _, _, p in expected)
    assert report.final_tokens == sum(r.final_tokens for r in report.pictures)
    assert report.reduction == pytest.approx(1 - report.final_tokens / report.tokens)
    assert report.reduction == pytest.approx(0.7, abs=0.05)
    assert report.backend == "torch_cpu"


def test_nothing_to_report_before_the_first_picture(model):
    with illava.patch(model, **PLAN) as handle, torch.no_grad():
        assert handle.report is None
        model(**tiny.prompt([6]))
        assert handle.report is None
        model(**tiny.prompt([6, tiny.A, 3]))
        report = handle.report
        model(**tiny.prompt([6]))
        assert handle.report is report, "a call without pictures reports nothing"
    assert handle.report is report, "and the last one can be read after removal"


def test_a_report_is_of_the_last_call_alone(model):
    with illava.patch(model, **PLAN) as handle, torch.no_grad():
        model(**tiny.prompt([6, tiny.A, 3], [2, tiny.B, 5]))
        first = handle.report
        model(**tiny.prompt([6, tiny.C, 3]))
        assert [p.grid for p in handle.report.pictures] == [tiny.C.grid]
        assert len(first.pictures) == 2
        model.generate(**tiny.prompt([6, tiny.V, 3]), max_new_tokens=3, do_sample=False)
        assert [p.grid for p in handle.report.pictures] == [tiny.V.grid]


@pytest.mark.parametrize("before", ["encoder alone", "a call that failed"])
def test_pictures_encoded_for_nobody_are_not_reported(model, before):
    inputs = tiny.prompt([5, tiny.A, 7])
    with illava.patch(model, **PLAN) as handle, torch.no_grad():
        model(**inputs)
        wanted = handle.report
        if before == "encoder alone":
            model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        else:
            broken = inputs | dict(input_ids=inputs["input_ids"].clone())
            broken["input_ids"][0, 8] = 7  # a placeholder is missing
            positions = torch.arange(broken["input_ids"].shape[1]).expand(3, 1, -1)
            with pytest.raises((ValueError, RuntimeError)):
                model(**broken, position_ids=positions)
        model(**inputs)
        assert handle.report == wanted


def test_beams_count_as_rows(model):
    with illava.patch(model, **PLAN) as handle:
        inputs = tiny.prompt([5, tiny.A, 7], [3, tiny.C, 4])
        model.generate(**inputs, max_new_tokens=2, do_sample=False, num_beams=2)
    pictures = handle.report.pictures
    assert {p.grid for p in pictures} == {tiny.A.grid, tiny.C.grid}
    assert {p.row for p in pictures} == set(range(len(pictures)))


def test_beams_of_pictures_of_one_size_keep_their_own_grid(model):
    with illava.patch(model, **PLAN) as handle:
        inputs = tiny.prompt([5, tiny.A, 7], [3, tiny.B, 4])
        model.generate(**inputs, max_new_tokens=2, do_sample=False, num_beams=2)
    assert [p.row for p in handle.report.pictures] == [0, 1, 2, 3]
    assert [p.grid for p in handle.report.pictures] == [tiny.A.grid] * 2 + [tiny.B.grid] * 2


def test_pictures_of_one_size_and_different_shapes_keep_their_own_grid(model):
    """8 x 12, 12 x 8 and 4 x 24 patches are all 24 tokens."""
    pictures = [tiny.A, tiny.B, tiny.Image(4, 24)]
    report, _ = report_of(model, [2, *pictures, 3])
    assert [p.grid for p in report.pictures] == [p.grid for p in pictures]


def test_a_picture_too_small_for_the_plan_says_so(model):
    report, _ = report_of(model, [5, tiny.Image(2, 4), 3, tiny.A, 4], plan=PLAN | dict(reduction=0.9))
    small, large = report.pictures
    assert (small.tokens, small.final_tokens) == (2, 1), "of 0.2 tokens asked for the last one stays"
    assert small.note == "too small for the plan: merged less"
    assert large.note == ""
    assert str(report).count("too small") == 1


@pytest.mark.parametrize(
    ("tokens", "final", "frames", "asked", "noted"),
    [
        (100, 33, 1, 2 / 3, False),
        (100, 34, 1, 2 / 3, True),
        (9, 5, 1, 0.5, False),  # rounding: half a token
        (64, 24, 16, 0.75, False),  # half a token of every frame
        (64, 25, 16, 0.75, True),
        (9, 1, 1, 0.889, False),
        (9, 9, 1, 0.889, True),
        (2, 1, 1, 0.9, True),
        (2, 2, 1, 0.2, True),
        (9, 9, 1, 0, False),
        (9, 9, 1, None, False),
    ],
)
def test_when_a_picture_counts_as_too_small(tokens, final, frames, asked, noted):
    grid, layer = (frames, 2, tokens // frames * 2), LayerRecord("llm", 0, tokens, final)
    record = PictureRecord("video", 0, grid, 1, tokens, tokens, tokens, (layer,), asked)
    assert record.frames == frames
    assert bool(record.note) is noted


@pytest.mark.parametrize("budget", [dict(vit_keep_ratio=0.5, llm_keep_ratio=0.5), dict(llm_tokens_removed=4)])
def test_other_budgets_ask_for_no_total(model, budget):
    report, plan = report_of(model, [5, tiny.A, 3], plan=budget)
    (record,) = report.pictures
    assert record.asked_reduction is None
    assert record.note == ""
    assert record.final_tokens == plan.schedule([tiny.A.grid])[0].final_tokens < tiny.A.tokens


def test_a_plan_without_encoder_layers_reports_no_kernel(model):
    report, _ = report_of(model, [5, tiny.A, 3], plan=PLAN | dict(vit_layers=()))
    assert report.backend is None
    assert [r.stage for r in report.pictures[0].layers] == ["llm", "llm"]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_eager_attention_is_counted_in_blocks(family):
    report, _ = report_of(tiny.build(family, attention="eager"), [5, tiny.A, 3])
    assert report.backend == "blocks"


@pytest.mark.skipif(not tiny.V5, reason="transformers 4.57 takes no mm_encoder_outputs")
@pytest.mark.parametrize("when", ["patched", "unpatched"])
def test_features_handed_in_by_the_caller(model, when):
    """Encoded under another plan or none, they have no encoder layers and no grid; what the LLM did stays."""
    inputs = tiny.prompt([3, tiny.A, 4, tiny.C, 2])
    with torch.no_grad():
        if when == "unpatched":
            encoded = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        with illava.patch(model, **PLAN) as handle:
            if when == "patched":
                encoded = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
            del inputs["pixel_values"]
            model(**inputs, mm_encoder_outputs={"image": encoded})
    report = handle.report
    assert [p.tokens for p in report.pictures] == [tiny.A.tokens, tiny.C.tokens]
    stages = [[r.stage for r in p.layers] for p in report.pictures]
    if when == "patched":
        assert [p.grid for p in report.pictures] == [tiny.A.grid, tiny.C.grid]
        assert stages == [["vit", "vit", "llm", "llm"]] * 2
        assert report.backend == "torch_cpu"
    else:
        assert [p.grid for p in report.pictures] == [None, None]
        assert stages == [["llm", "llm"]] * 2
        assert report.backend is None
        assert report.flops.vision == Cost(0, 0)
    assert report.reduction == pytest.approx(0.7, abs=0.05)
    assert ("?" in str(report)) is (when == "unpatched")


def test_printed(model):
    """Every number of the report is in its text, and the text fits a terminal without colour."""
    rows = [5, tiny.A, 7], [3, tiny.V, 9]
    report, _ = report_of(model, *rows)
    text = str(report)
    assert f"{report.tokens} visual tokens to {report.final_tokens} ({report.reduction:.1%} gone)" in text
    for column in ("vit 0", "vit 1", "llm 0", "llm 2"):
        assert column in text
    for picture in report.pictures:
        (line,) = (x for x in text.splitlines() if "x".join(map(str, picture.grid)) in x)
        found = re.findall(r"[\w.%]+", line)
        numbers = [picture.row, picture.kind, "x".join(map(str, picture.grid)), picture.tokens]
        numbers += [r.tokens_out for r in picture.layers] + [f"{picture.reduction:.1%}"]
        assert found == [str(n) for n in numbers]
    for cost in (report.flops.vision, report.flops.language):
        assert f"{cost.without / 1e12:.4g} -> {cost.with_ / 1e12:.4g}" in text
    assert f"speed-up at most {report.flops.speedup_bound:.2f}x" in text
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 140


def test_records_are_frozen(model):
    report, _ = report_of(model, [5, tiny.A, 3])
    for thing in (report, report.pictures[0], report.pictures[0].layers[0], report.flops):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(thing, dataclasses.fields(thing)[0].name, 1)


# ---------------------------------------------------------------- operations


def watched(model, *rows):
    """Operations of one prefill as torch counts them, by stage."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**tiny.prompt(*rows))
    per_module = counter.get_flop_counts()

    def total(suffix):
        # torch's names of modules, the class of the outermost in front.
        (name,) = (n for n in per_module if re.fullmatch(rf"\w+\.{suffix}", n))
        return sum(per_module[name].values())

    tokens = tiny.prompt(*rows)["input_ids"].shape[1]
    head = total("lm_head") / tokens  # a prefill asks for the last token's logits alone
    return total(r"model\.visual"), total(r"model\.language_model") + head


def causal_half(model, lengths):
    """torch counts every pair of a causal mask, illava those that attend: the difference, per layer."""
    config = model.config.get_text_config()
    return sum(4 * config.hidden_size * n * (n - 1) / 2 for n in lengths)


def llm_lengths(plan, text, pictures):
    """Tokens each decoder layer is given."""
    schedules = plan.schedule([p.grid for p in pictures])
    lengths = []
    for layer in range(plan.llm_depth):
        visual = 0
        for schedule in schedules:
            done = [out for merged, _, out in schedule.llm if merged < layer]
            visual += done[-1] if done else schedule.encoder_tokens
        lengths.append(text + visual)
    return lengths


# One picture of whole windows of 4 x 4 patches, one that fills half of some, and a video.
PICTURES = {
    "whole windows": [tiny.Image(16, 16)],
    "a video": [tiny.Video(3, 8, 8)],
    "two": [tiny.Image(8, 12), tiny.Image(16, 8)],
}


@pytest.fixture
def plain(model, monkeypatch):
    """torch counts the CPU's flash kernel wrongly or not at all; a matrix product per span it counts."""
    for part in (model.model.visual, model.model.language_model):
        monkeypatch.setattr(part.config, "_attn_implementation_internal", "eager")
    return model


@pytest.mark.parametrize("name", PICTURES)
def test_unmerged_operations_are_those_torch_counts(plain, name):
    pictures = PICTURES[name]
    report, _ = report_of(plain, [20, *pictures, 30])
    vision, language = watched(plain, [20, *pictures, 30])
    text = 50 + 2 * len(pictures)
    language -= causal_half(plain, [text + report.tokens] * 4)
    assert report.flops.vision.without == pytest.approx(vision, rel=1e-6)
    assert report.flops.language.without == pytest.approx(language, rel=0.005)  # rotary angles


@pytest.mark.parametrize("settings", [PLAN, PLAN | dict(vit_layers=()), PLAN | dict(llm_layers=())], ids=str)
@pytest.mark.parametrize("name", PICTURES)
def test_merged_operations_are_about_those_torch_counts(plain, name, settings, monkeypatch):
    """Merging itself is not counted; here it takes next to no products: pruning, by what is known."""
    monkeypatch.setattr(vision_scores, "varlen_attention_received", lambda q, k, lse, *_, **__: lse.mean(1))
    pictures = PICTURES[name]
    rows = [20, *pictures, 30]
    with illava.patch(plain, **settings, merge="prune", queries="last") as handle:
        vision, language = watched(plain, rows)
        report, plan = handle.report, handle.plan
    lengths = llm_lengths(plan, 50 + 2 * len(pictures), pictures)
    language -= causal_half(plain, lengths)
    # Windows need not lose tokens evenly, as the count takes them to, and spans are padded to each other.
    assert report.flops.vision.with_ == pytest.approx(vision, rel=0.05)
    assert report.flops.language.with_ == pytest.approx(language, rel=0.005)  # rotary angles


@pytest.mark.parametrize("name", PICTURES)
def test_the_bound_on_the_speed_up(model, name):
    bounds = []
    for reduction in (0.3, 0.667, 0.889):
        report, _ = report_of(model, [20, *PICTURES[name], 30], plan=PLAN | dict(reduction=reduction))
        flops = report.flops
        assert flops.vision.with_ < flops.vision.without
        assert flops.language.with_ < flops.language.without
        total = flops.vision + flops.language
        assert flops.speedup_bound == pytest.approx(total.without / total.with_)
        bounds.append(flops.speedup_bound)
    assert bounds[0] > 1
    assert bounds == sorted(set(bounds))


def test_a_batch_costs_what_its_rows_cost(model):
    one, _ = report_of(model, [20, tiny.A, 30])
    two, _ = report_of(model, [20, tiny.A, 30], [20, tiny.A, 30])
    assert two.flops.vision.with_ == pytest.approx(2 * one.flops.vision.with_)
    assert two.flops.language.without == pytest.approx(2 * one.flops.language.without)
    assert two.flops.speedup_bound == pytest.approx(one.flops.speedup_bound)


def test_a_plan_that_merges_nothing_gains_nothing(model):
    nothing = dict(vit_tokens_removed=0, llm_tokens_removed=0)
    report, _ = report_of(model, [20, tiny.A, 30], plan=nothing)
    assert report.reduction == 0
    assert report.flops.speedup_bound == pytest.approx(1)
    assert math.isclose(report.flops.vision.without, report.flops.vision.with_)


def test_no_operations_at_all():
    assert Flops(Cost(0, 0), Cost(0, 0)).speedup_bound == 1
    assert Cost(1, 2) + Cost(10, 20) == Cost(11, 22)
