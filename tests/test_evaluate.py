"""Answers, agreement and speed as illava.evaluate counts them, against their definitions."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from transformers.video_utils import VideoMetadata

import illava
import tiny_checkpoint
from illava import Plan, evaluate, jobs
from illava.evaluate import agreement, answers, quality, speed, statistics
from illava.evaluate.forcing import speak
from illava.evaluate.prompts import build_inputs, decoded
from illava.evaluate.quality import hold
from illava.evaluate.synthetic import noise_inputs
from illava.evaluate.trials import Trials
from illava.jobs import Item
from readers import tasks

MERGING = Plan((3,), (1, 4), 0.778)
SHAPE = {"vision": {"depth": 8, "fullatt_block_indexes": [3, 7]}, "text": {"num_hidden_layers": 6}}


def photograph(path: Path, width: int, height: int, name: str = "china.jpg") -> Path:
    Image.fromarray(load_sample_image(name)).resize((width, height)).save(path)
    return path


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return evaluate.load(tiny_checkpoint.build(tmp_path_factory.mktemp("tiny"), **SHAPE), device="cpu")


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number, (width, height) in enumerate(((224, 168), (168, 224), (140, 140), (196, 112))):
        photograph(folder / f"{number}.png", width, height, ("china.jpg", "flower.jpg")[number % 2])
    return [decoded(item) for item in jobs.read_items(folder, prompt="What is in this image?")]


# Figures ----------------------------------------------------------------------------------------


def test_intervals_hold_the_truth_as_often_as_they_say():
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(200):
        counts = torch.randint(1, 6, (60,), generator=generator)
        # Tokens of one answer are alike: either all of them differ or none.
        off = (torch.rand(60, generator=generator) < 0.3).float()
        found = statistics.mean_of_items((counts * off).tolist(), counts.tolist())
        held += found.low <= 0.3 <= found.high
    assert 180 <= held <= 199


def test_many_items_are_not_drawn_again_and_the_interval_is_the_same(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    sums, counts = torch.rand(3000, generator=generator).tolist(), [1] * 3000
    drawn = statistics.mean_of_items(sums, counts)
    monkeypatch.setattr(statistics, "MANY", 1000)
    normal = statistics.mean_of_items(sums, counts)
    assert normal.value == drawn.value
    assert normal.low == pytest.approx(drawn.low, abs=1e-3)
    assert normal.high == pytest.approx(drawn.high, abs=1e-3)


def test_a_share_says_what_few_items_are_worth():
    assert statistics.share([True] * 3).low < 0.45
    assert statistics.share([True] * 300).low > 0.98
    assert statistics.middle([3.0, 1.0, 2.0]) == statistics.Estimate(2.0, 1.5, 2.5)
    for empty in (lambda: statistics.share([]), lambda: statistics.middle([])):
        with pytest.raises(ValueError, match="nothing"):
            empty()


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("A red bus.", "red Bus", True),
        ("the  cat", "cat", True),
        ("two", "three", False),
        ("another", "other", False),
    ],
)
def test_answers_are_the_same_but_for_spelling(one, other, same):
    assert (agreement.normalised(one) == agreement.normalised(other)) is same


# Teacher forcing --------------------------------------------------------------------------------


@torch.inference_mode()
def test_forced_distributions_are_those_of_a_forward_over_prompt_and_answer(loaded, items):
    inputs = build_inputs(loaded, items[:1])
    answer = torch.tensor([[300, 17, 340, 3, 99]])
    forced = speak(loaded, inputs, 5, answer=answer)
    assert forced.ids.tolist() == answer.tolist()
    whole = dict(inputs)
    whole["input_ids"] = torch.cat([inputs["input_ids"], answer], dim=1)
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    if "mm_token_type_ids" in inputs:
        whole["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 5))
    logits = loaded.model(**whole).logits[0, -6:-1]  # what predicts each of the five
    torch.testing.assert_close(torch.cat(forced.scores), logits, rtol=1e-4, atol=1e-4)


def test_the_answer_has_no_part_in_choosing_visual_tokens(loaded, items):
    inputs = build_inputs(loaded, items[:1])
    with illava.patch(loaded.model, plan=MERGING):
        one = speak(loaded, inputs, 3, answer=torch.tensor([[300, 17, 340]]))
        other = speak(loaded, inputs, 3, answer=torch.tensor([[300, 17, 99]]))
    for a, b in zip(one.scores, other.scores, strict=True):
        assert torch.equal(a, b)


def test_divergence_is_what_torch_says():
    torch.manual_seed(0)
    a, b = torch.randn(2, 50), torch.randn(2, 50)
    a[:, 3] = b[:, 3] = float("-inf")  # a token that both forbid
    spoken = [agreement.Spoken(torch.zeros(2, 1), [1, 0], [x]) for x in (a, b)]
    found = agreement.divergences(*spoken)
    keep = torch.arange(50) != 3
    p, q = a[:1, keep].log_softmax(-1), b[:1, keep].log_softmax(-1)
    expected = torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True)
    assert found == [pytest.approx(float(expected), rel=1e-5), 0.0]


def test_removing_nothing_changes_nothing_at_all(loaded, items):
    for row in hold(loaded, items, {"0": Plan(reduction=0)}, max_new_tokens=6):
        assert row["0"].exact
        assert row["0"].equal_tokens == row["0"].tokens
        assert row["0"].kl_sum == 0


def test_a_plan_is_held_against_what_it_really_answers(loaded, items):
    """Also where the answer is not generated, because every forced choice was the same."""
    rows = hold(loaded, items, {"mild": Plan((3,), (), 0.1), "strong": MERGING}, max_new_tokens=6)
    assert any(row["strong"].kl_sum > 0 for row in rows)
    for name, plan in (("mild", Plan((3,), (), 0.1)), ("strong", MERGING)):
        # In the same batch: padding changes the last bits.
        for row, said in zip(rows, _said(loaded, items, plan), strict=True):
            held = row[name]
            assert held.patched == said
            assert held.exact or held.equal_tokens < held.tokens
    assert [row["mild"].unpatched for row in rows] == [row["strong"].unpatched for row in rows]


def _said(loaded, items, plan):
    inputs = build_inputs(loaded, items)
    with illava.patch(loaded.model, plan=plan):
        ids = loaded.model.generate(**inputs, max_new_tokens=6, do_sample=False)
    texts = loaded.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def test_fidelity_counts_and_lists_what_changed(loaded, items, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    bad = next(iter(jobs.read_items(tmp_path)))
    found = evaluate.fidelity(
        loaded, [*items, bad], {"0": Plan(reduction=0), "strong": MERGING}, max_new_tokens=6, batch_size=2
    )
    assert found.agreement["0"].exact.value == 1
    assert found.agreement["0"].items == len(items)
    assert [s["source"] for s in found.skipped] == [str(tmp_path / "broken.png")]
    assert "no picture" in found.skipped[0]["reason"]
    strong = found.agreement["strong"]
    assert strong.kl.value > 0
    assert strong.kl.low <= strong.kl.value <= strong.kl.high
    changed = [d for d in found.disagreements if d["plan"] == "strong"]
    assert len(changed) == round((1 - strong.exact.value) * len(items))
    for entry in changed:
        assert entry["unpatched"] != entry["patched"]
        assert Path(entry["images"][0]).is_file()
    assert getattr(loaded.model, "_illava_handle", None) is None
    with pytest.raises(illava.DataError, match="no item could be answered.*broken.png"):
        evaluate.fidelity(loaded, [bad], {"0": Plan(reduction=0)})
    with pytest.raises(illava.PlanError, match="no plan"):
        evaluate.fidelity(loaded, items, {})


@pytest.fixture(scope="module")
def by_tiles():
    return evaluate.load(Path(__file__).parent.parent / "checkpoints" / "internvl", device="cpu")


def film(number: int, frames: int) -> Item:
    pixels = tasks.held_out_item("video", "test", number, frames=frames).video
    about = VideoMetadata(total_num_frames=frames, fps=24.0, frames_indices=list(range(frames)))
    return Item(str(number), (), (), "what appeared first ?", f"{number}.mp4", clips=((pixels, about),))


def test_videos_that_a_processor_refuses_together_are_shown_one_by_one(by_tiles):
    films = [film(1, 8), film(2, 6), film(3, 8)]
    with pytest.raises(illava.DataError, match="one of 1.mp4, 2.mp4, 3.mp4"):
        build_inputs(by_tiles, films)
    plans, strong = {"strong": Plan(reduction=0.9)}, {"max_new_tokens": 4}
    found = evaluate.fidelity(by_tiles, films, plans, **strong, batch_size=3)
    alone = evaluate.fidelity(by_tiles, films, plans, **strong, batch_size=1)
    assert found == alone
    assert found.agreement["strong"].items == 3
    trials = Trials(by_tiles, films, 3, 4)
    assert [batch.items for batch in trials.batches] == [1, 1, 1]
    assert trials.race(Plan(reduction=0)).equal == [True] * 3


def test_an_item_that_is_refused_costs_no_other(loaded, items):
    strip = Image.new("RGB", (2100, 10))  # Qwen's processor takes no picture 200 times as wide as high
    bad = Item("1", (), (), "What is this?", "strip.png", pictures=(strip,))
    found = evaluate.fidelity(loaded, [items[0], bad, items[1]], {"0": Plan(reduction=0)}, max_new_tokens=2)
    assert found.agreement["0"].items == 2
    assert [s["source"] for s in found.skipped] == ["strip.png"]
    assert "refuses strip.png" in found.skipped[0]["reason"]
    with pytest.raises(illava.DataError, match="refuses strip.png"):
        Trials(loaded, [items[0], bad], 2, 2)


# Speed ------------------------------------------------------------------------------------------


def test_a_bench_times_every_plan_beside_the_unpatched_model(loaded, items):
    inputs = [build_inputs(loaded, items[:1]), build_inputs(loaded, items[1:3])]
    plans = {"0": Plan(reduction=0), "strong": MERGING}
    heard: list[str] = []
    result = evaluate.bench(loaded, inputs, plans, rounds=2, new_tokens=3, progress=heard.append)
    assert len(heard) == speed.calls(2, 2, rounds=2, new_tokens=3)
    unpatched, zero, strong = result.rows
    assert [row.status for row in result.rows] == [speed.OK] * 3
    assert unpatched.tokens == unpatched.final_tokens == strong.tokens
    assert strong.final_tokens == pytest.approx(0.222 * strong.tokens, abs=6)
    for name in ("ttft_ms", "encoder_ms", "llm_ms", "decode_tokens_per_s", "kv_bytes"):
        assert unpatched.figures[name].ratio is None
        assert strong.figures[name].ratio.value > 0
    assert zero.figures["kv_bytes"].ratio.value == 1
    assert strong.figures["kv_bytes"].ratio.value > 1.3
    flops = [report_of(loaded, shown).flops for shown in inputs]
    total = sum(f.vision.without + f.language.without for f in flops) / sum(
        f.vision.with_ + f.language.with_ for f in flops
    )
    assert strong.figures["ttft_ms"].bound == pytest.approx(total)
    assert "peak_bytes" not in strong.figures, "nobody counts it on a CPU"


def report_of(loaded, inputs):
    with illava.patch(loaded.model, plan=MERGING) as handle:
        loaded.model(**inputs)
        return handle.report


def test_ctrl_c_keeps_the_rounds_that_were_finished(loaded, items):
    inputs = [build_inputs(loaded, items[:1])]
    calls = []

    def progress(what):
        calls.append(what)
        if len(calls) == speed.calls(1, 1, rounds=2) + 1:  # in the third round
            raise KeyboardInterrupt

    result = evaluate.bench(loaded, inputs, {"strong": MERGING}, rounds=5, progress=progress)
    assert (result.rounds, result.interrupted) == (2, True)
    assert result.rows[1].figures["ttft_ms"].ratio.value > 0

    def at_once(what):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate.bench(loaded, inputs, {"strong": MERGING}, progress=at_once)
    assert getattr(loaded.model, "_illava_handle", None) is None


@pytest.fixture
def narrow(loaded):
    """A model whose last decoder layer has memory for so many tokens and no more."""

    def limit(tokens):
        def forward(module, args, kwargs):
            if args[0].shape[1] > tokens:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        layer = loaded.model.model.language_model.layers[-1]
        undo.append(layer.register_forward_pre_hook(forward, with_kwargs=True, prepend=True))

    undo = []
    yield limit
    for handle in undo:
        handle.remove()


def test_what_does_not_fit_costs_its_row_and_not_the_bench(loaded, items, narrow):
    inputs = [build_inputs(loaded, items[:1])]
    length = inputs[0]["input_ids"].shape[1]
    narrow(length - 20)
    result = evaluate.bench(loaded, inputs, {"0": Plan(reduction=0), "strong": MERGING}, rounds=1)
    assert [row.status for row in result.rows] == [speed.OUT_OF_MEMORY, speed.OUT_OF_MEMORY, speed.OK]
    assert result.rows[2].figures["ttft_ms"].ratio is None, "there is nothing to compare with"
    narrow(1)
    with pytest.raises(illava.OutOfMemoryError, match="does not fit.*higher reduction"):
        evaluate.bench(loaded, inputs, {"strong": MERGING}, rounds=1)


def test_out_of_memory_says_which_plan_would_fit(loaded, items, narrow):
    inputs = build_inputs(loaded, items[:1])
    with illava.patch(loaded.model, reduction=0.889) as handle:
        loaded.model(**inputs)
        gone = handle.report.tokens - handle.report.final_tokens
    narrow(inputs["input_ids"].shape[1] - gone)
    same_plan = "with reduction 0.889 in the same plan the prompt fits"
    with pytest.raises(illava.OutOfMemoryError, match=same_plan):
        evaluate.answer(loaded, items[0], Plan(reduction=0.5), max_new_tokens=2)
    # Plans that merge where it is too late: no reduction of theirs helps, and no other plan's is advised.
    with pytest.raises(illava.OutOfMemoryError, match="does not fit at reduction 0.950 either"):
        evaluate.answer(loaded, items[0], Plan((), (5,), 0.8, encoder_share=0), max_new_tokens=2)
    # A budget that is no reduction: of the default plan, and said so.
    with pytest.raises(
        illava.OutOfMemoryError, match=r"illava.Plan\(reduction=0.889\), which is --reduction"
    ):
        evaluate.answer(loaded, items[0], Plan((), (5,), llm_shares=(0.5,)), max_new_tokens=2)
    narrow(1)
    with pytest.raises(illava.OutOfMemoryError, match="ask without comparing: .*smaller or fewer pictures"):
        evaluate.compare(loaded, items[0], MERGING, max_new_tokens=2)
    assert getattr(loaded.model, "_illava_handle", None) is None


# Answers ----------------------------------------------------------------------------------------


def test_an_answer_streams_and_says_what_was_merged(loaded, items):
    heard: list[str] = []
    said = evaluate.answer(loaded, items[0], MERGING, max_new_tokens=6, on_text=heard.append)
    assert "".join(heard).strip() == said.text
    assert said.text == _said(loaded, items[:1], MERGING)[0]
    assert said.report.reduction == pytest.approx(0.778, abs=0.1)
    plain = evaluate.answer(loaded, items[0], max_new_tokens=6)
    assert plain.report is None
    both = answers.compare(loaded, items[0], MERGING, max_new_tokens=6, rounds=1)
    assert (both.unpatched.text, both.patched.text) == (plain.text, said.text)
    assert both.equal == (plain.text == said.text)


def test_a_job_answers_as_one_does(loaded, items):
    work = evaluate.AnswerWork(loaded, MERGING, 6)
    assert [record["answer"] for record in work(items)] == _said(loaded, items, MERGING)
    assert set(work(items)[0]) == {"prompt", "answer", "new_tokens"}


def test_a_model_without_processor_can_be_timed_but_not_asked(loaded, items):
    bare = dataclasses.replace(loaded, processor=None)
    with pytest.raises(illava.CheckpointError, match="no processor.*preprocessor_config.json"):
        evaluate.answer(bare, items[0])
    inputs, tokens = noise_inputs(bare.model, (140, 200))
    assert evaluate.bench(bare, [inputs], {"strong": MERGING}, rounds=1).rows[1].tokens == tokens == 35


def test_a_plan_may_be_what_it_was_written_as(loaded):
    for written in (MERGING, MERGING.to_json(), MERGING.to_dict()):
        with illava.patch(loaded.model, plan=written) as handle:
            assert handle.plan.settings == MERGING
    with pytest.raises(illava.PlanError, match="reducton"):
        illava.patch(loaded.model, plan='{"reducton": 0.5}')


def test_everything_in_the_namespace_is_there():
    for name in evaluate.__all__:
        assert getattr(evaluate, name).__name__ == name
    assert set(evaluate.__all__) == set(evaluate._HOME)
    with pytest.raises(AttributeError, match="nothing_like_it"):
        evaluate.nothing_like_it  # noqa: B018


RECORD = {"key": "a", "source": "a.png", "prompt": "?", "images": ["a.png"], "videos": [], "answer": "yes"}
HELD = {"answer": "no", "tokens": 2, "equal_tokens": 1, "kl_sum": 0.5}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "Expecting property name"),
        ("[]", "no object"),
        (json.dumps(RECORD), "no plans"),
        (json.dumps(RECORD | {"plans": {"p": {"answer": "no"}}}), "tokens=None"),
        (json.dumps(RECORD | {"plans": {"p": HELD | {"answer": 1}}}), "without its answer"),
        (json.dumps(RECORD | {"plans": {"p": HELD}, "images": None}), "no list of images"),
        (json.dumps({"key": "a", "answer": "yes"}), "no text as 'source'"),
        (json.dumps({"key": "a", "source": "a.png", "failed": None}), "no text as 'failed'"),
        (b"\xff", "can't decode"),
    ],
)
def test_a_damaged_line_of_results_is_named(line, reason, tmp_path):
    whole = json.dumps(RECORD | {"plans": {"p": HELD}}).encode()
    path = tmp_path / "held.jsonl"
    path.write_bytes(whole + b"\n" + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(illava.DataError, match=rf"held.jsonl:2 is no result .*{reason}.*delete the line"):
        evaluate.summarise(evaluate.read_records(path), {"p": MERGING})


def test_results_of_other_plans_are_not_summed_up():
    with pytest.raises(illava.DataError, match="a.png is of the plans p, not of q; give"):
        evaluate.summarise([RECORD | {"plans": {"p": HELD}}], {"q": MERGING})
    with pytest.raises(illava.DataError, match="a record of fidelity is damaged .no plans"):
        evaluate.summarise([RECORD], {"q": MERGING})


def test_half_a_character_in_an_answer_that_changed_is_written(tmp_path):
    found = evaluate.summarise([RECORD | {"plans": {"p": HELD | {"answer": "\ud83d"}}}], {"p": MERGING})
    quality.write_disagreements(found, tmp_path / "d.jsonl")
    assert json.loads((tmp_path / "d.jsonl").read_bytes())["patched"] == "\ud83d"


def test_what_the_page_shows_runs(loaded, tmp_path, monkeypatch, capsys):
    """The Python of docs/command_line.md, with a small model and two questions in place of the reader's."""
    page = (Path(__file__).parent.parent / "docs" / "command_line.md").read_text()
    blocks = re.findall(
        r"^```python\n(.*?)^```", page.partition("## From Python")[2], re.MULTILINE | re.DOTALL
    )
    shown = "\n".join(blocks)
    assert all(f"evaluate.{name}(" in page for name in ("load", "answer", "compare", "bench", "fidelity"))
    for number in range(2):
        photograph(tmp_path / f"{number}.png", 112, 84)
    lines = [json.dumps({"image": f"{number}.png", "prompt": "what is this ?"}) for number in range(2)]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "load", lambda name: loaded, raising=False)
    names: dict = {}
    exec(shown, names)
    assert names["found"].agreement["77.8 %"].items == 2
    assert names["both"].patched.text == names["said"].text
    assert names["timed"].rounds == 3
    assert "Plan(" in capsys.readouterr().out
