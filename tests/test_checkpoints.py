"""A folder of each family, asked by illava and by transformers alone: the same answers, token for token."""

from __future__ import annotations

import json
from types import SimpleNamespace

import av
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.video_utils import VideoMetadata
from typer.testing import CliRunner

import illava
import zoo
from illava import evaluate, jobs
from illava.cli import app
from illava.errors import DataError
from illava.harness.answering import Answerer
from zoo import folders
from zoo.common import Image, Video

PLAN = illava.Plan(reduction=0.8)
TOKENS = 4
CLIP = Video(4, 90, 120)
# Of several sizes and shapes; the second prompt has two, which LLaVA-OneVision then does not cut into tiles.
ASKED = {
    "wide": ([Image(90, 200, 1)], "w3 w4 w5"),
    "two": ([Image(60, 150, 2), Image(200, 100, 3)], "w7 w8 w9 w10 w11"),
    "square": ([Image(112, 112, 4)], "w12"),
}


# Qwen2.5-VL is what the other tests of commands, jobs and harnesses run on.
@pytest.fixture(scope="module", params=[name for name in zoo.FAMILIES if name != "qwen2_5_vl"])
def saved(request, tmp_path_factory):
    """A family's folder, its data, and what transformers alone makes of them."""
    folder = folders.write(request.param, tmp_path_factory.mktemp("checkpoint") / request.param)
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="sdpa").eval()
    processor = AutoProcessor.from_pretrained(folder)
    data = tmp_path_factory.mktemp("data") / "questions.jsonl"
    asked = dict(ASKED)
    if getattr(processor, "video_processor", None) is not None:
        asked["clip"] = ([CLIP], "w20 w21")
    lines = [line(data.parent, key, *item) for key, item in asked.items()]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return SimpleNamespace(folder=str(folder), model=model, processor=processor, data=data, asked=asked)


def line(folder, key, shown, prompt):
    """Write an item's pictures or clip; its line."""
    if shown == [CLIP]:
        with av.open(str(folder / "clip.mkv"), "w") as file:
            stream = file.add_stream("ffv1", rate=2)  # without loss
            stream.width, stream.height, stream.pix_fmt = CLIP.width, CLIP.height, "bgr0"
            for frame in CLIP.array():
                file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            file.mux(stream.encode())
        return {"key": key, "video": "clip.mkv", "prompt": prompt}
    names = [f"{key}{place}.png" for place in range(len(shown))]
    for name, picture in zip(names, shown, strict=True):
        picture.pil().save(folder / name)
    return {"key": key, "image": names, "prompt": prompt}


def turn(shown, prompt):
    """A conversation in transformers' form."""
    parts = [
        {"type": "video", "video": part.array()} if part is CLIP else {"type": "image", "image": part.pil()}
        for part in shown
    ]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}]


def plain_inputs(saved, conversations):
    """By transformers alone: its own way from messages to inputs."""
    clips = {}
    if any(part["type"] == "video" for (message,) in conversations for part in message["content"]):
        about = VideoMetadata(CLIP.frames, fps=2.0, frames_indices=list(range(CLIP.frames)))
        clips = {"video_metadata": [about], "do_sample_frames": False}
    return saved.processor.apply_chat_template(
        conversations, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt",
        padding=True, padding_side="left", **clips,
    )  # fmt: skip


@torch.inference_mode()
def plain(saved, conversations, plan=None):
    """Answers of transformers' `generate`, patched by nothing but `illava.patch`, or not at all."""
    inputs = plain_inputs(saved, conversations)
    handle = None if plan is None else illava.patch(saved.model, plan=plan)
    try:
        ids = saved.model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    finally:
        if handle is not None:
            handle.remove()
    new = ids[:, inputs["input_ids"].shape[1] :]
    return saved.processor.tokenizer.batch_decode(new, skip_special_tokens=True)


def test_conversations_are_answered_as_by_transformers(saved):
    """What harnesses and the server call, on a batch."""
    answerer = Answerer.load(saved.folder, PLAN, dtype="float32", frames=CLIP.frames)
    asked = [turn(*item) for item in saved.asked.values()]
    files = [turn(shown, prompt) for shown, prompt in saved.asked.values()]
    for (message,) in files:
        for part in message["content"]:
            if part["type"] == "video":
                part["video"] = saved.data.parent / "clip.mkv"
    inputs, expected = answerer.inputs(files), plain_inputs(saved, asked)
    tensors = {name: value for name, value in expected.items() if isinstance(value, torch.Tensor)}
    assert set(inputs) == set(tensors)
    for name, value in tensors.items():
        if name == "batch_num_images":
            value = value[value > 0]  # 4.57 counts prompts without pictures too, which nothing reads
        assert torch.equal(inputs[name], value), name
    answers = answerer.answer(files, max_new_tokens=TOKENS, do_sample=False)
    assert answers == [(text, TOKENS) for text in plain(saved, asked, PLAN)]
    assert [text for text, _ in answers] != plain(saved, asked)
    report = answerer.handle.report
    assert {picture.row for picture in report.pictures} == set(range(len(asked)))
    assert report.final_tokens == pytest.approx(0.2 * report.tokens, rel=0.15)  # of each picture, rounded


def test_items_are_answered_and_held_against_each_other_as_by_transformers(saved):
    """What the command line and notebooks call: one by one, and a batch whose answers are compared."""
    loaded = evaluate.load(saved.folder, device="cpu")
    items = list(jobs.read_items(saved.data))
    asked = [turn(*item) for item in saved.asked.values()]
    for plan in (None, PLAN):
        said = evaluate.answer(loaded, items[1], plan, max_new_tokens=TOKENS)
        assert [said.text] == [text.strip() for text in plain(saved, [asked[1]], plan)]
    plans = {"60 %": PLAN, "0 %": illava.Plan(reduction=0)}
    found = evaluate.fidelity(loaded, items, plans, max_new_tokens=TOKENS)
    texts = [[text.strip() for text in plain(saved, asked, plan)] for plan in (None, PLAN)]
    pairs = dict(zip(saved.asked, zip(*texts, strict=True), strict=True))
    differing = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
    assert {
        entry["key"]: (entry["unpatched"], entry["patched"]) for entry in found.disagreements
    } == differing
    assert differing
    assert found.agreement["60 %"].exact.value == pytest.approx(1 - len(differing) / len(pairs))
    same = found.agreement["0 %"]
    assert (same.exact.value, same.equal_tokens.value, same.kl.value) == (1, 1, 0)


def test_a_job_of_the_command_line_answers_as_transformers(saved, tmp_path):
    out = tmp_path / "answers.jsonl"
    command = ["run", saved.folder, "--data", saved.data, "--out", out, "--reduction", PLAN.reduction]
    command += ["--max-new-tokens", TOKENS, "--batch-size", 1, "--device", "cpu"]
    done = CliRunner().invoke(app, [str(word) for word in command])
    assert done.exit_code == 0, done.output
    said = {record["key"]: record["answer"] for record in map(json.loads, out.read_text().splitlines())}
    expected = {key: plain(saved, [turn(*item)], PLAN)[0].strip() for key, item in saved.asked.items()}
    assert said == expected


def test_what_takes_no_videos_says_so(tmp_path):
    folder = folders.write("llava_next", tmp_path / "llava_next")
    clip = tmp_path / line(tmp_path, "clip", [CLIP], "w1")["video"]
    with pytest.raises(DataError, match="takes pictures only; leave .*clip.mkv out"):
        evaluate.answer(
            evaluate.load(folder), jobs.Item("clip", (), (clip,), "w1", str(clip)), max_new_tokens=1
        )
    answerer = Answerer.load(str(folder), PLAN)
    with pytest.raises(DataError, match="takes pictures only; leave .*clip.mkv out"):
        answerer.answer([[{"role": "user", "content": [{"type": "video", "video": clip}]}]])
