"""Plans as harnesses' command lines say them, and conversations as their models are given them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

import illava
import tiny_checkpoint
from illava import Plan, jobs
from illava.evaluate.loading import Loaded
from illava.evaluate.prompts import build_inputs
from illava.harness.answering import Answerer
from illava.harness.arguments import plan_for, plan_from_arguments


@pytest.mark.parametrize(
    ("arguments", "plan"),
    [
        ({}, Plan()),
        (
            {"vit_layers": "5-9-13", "llm_layers": "2-8-14", "reduction": 0.778},
            Plan((5, 9, 13), (2, 8, 14), 0.778),
        ),
        ({"vit_layers": 3, "llm_layers": "none"}, Plan((3,), ())),
        ({"vit_layers": "0.25-0.5", "llm_layers": 0.25}, Plan((0.25, 0.5), (0.25,))),
        ({"vit_layers": "output", "llm_layers": None}, Plan(("output",))),
        ({"llm_layers": "2", "llm_shares": 0.25, "vit_layers": ()}, Plan((), (2,), llm_shares=(0.25,))),
        (
            {"llm_layers": "2-4", "llm_shares": "0.5-0.25", "vit_layers": "none"},
            Plan((), (2, 4), llm_shares=(0.5, 0.25)),
        ),
        ({"plan": "paper", "reduction": 0.889}, Plan.paper(0.889)),
        ({"plan": "paper", "llm_layers": "4"}, Plan.paper(llm_layers=(4,))),
        ({"plan": "release"}, Plan.release()),
    ],
)
def test_a_plan_from_arguments(arguments, plan):
    assert plan_from_arguments(arguments) == plan


def test_a_plan_from_a_file(tmp_path):
    (tmp_path / "plan.json").write_text(Plan((3,), (2, 5), 0.5).to_json())
    said = {"plan": str(tmp_path / "plan.json"), "reduction": 0.7}
    assert plan_from_arguments(said) == Plan((3,), (2, 5), 0.7)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"vit_layers": "5,9"}, "join numbers by -"),
        ({"reductoin": 0.5}, "did you mean 'reduction'"),
        ({"plan": "paper", "reductoin": 0.5}, "did you mean 'reduction'"),
        ({"plan": "newspaper"}, "neither 'paper'"),
        ({"reduction": "much"}, "outside"),
    ],
)
def test_arguments_that_say_no_plan(arguments, says):
    with pytest.raises(illava.PlanError, match=says):
        plan_from_arguments(arguments)


def test_a_plan_from_a_function_of_ones_own(checkpoint):
    """The rivals, for example: their plans depend on the model."""
    from rivals import at_harness

    assert set(at_harness.__all__) == {"fastervlm", "fastv", "pyramiddrop", "sparsevlm", "visionzip"}
    for name in at_harness.__all__:
        made = plan_for({"plan": f"rivals.at_harness:{name}", "reduction": 0.75})
        answerer = Answerer.load(str(checkpoint), made)
        answerer.answer([turn({"type": "image", "image": photograph(112, 112)})], max_new_tokens=1)
        (picture,) = answerer.handle.report.pictures
        assert (picture.tokens, picture.final_tokens) == (16, 4)


@pytest.mark.parametrize("plan", ["rivals.at_harness:nobody", "no.such.module:plan"])
def test_a_function_that_is_not_there(plan):
    with pytest.raises(illava.PlanError, match="names no function.*PYTHONPATH"):
        plan_for({"plan": plan})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint.build(tmp_path_factory.mktemp("checkpoint") / "tiny")


def photograph(width, height):
    return Image.fromarray(load_sample_image("china.jpg")).resize((width, height))


def turn(*parts):
    return [{"role": "user", "content": list(parts)}]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_batch_of_conversations_is_answered_as_each_alone(checkpoint, dtype, tmp_path):
    answerer = Answerer.load(str(checkpoint), Plan(reduction=0.778), dtype=dtype)
    assert answerer.model.dtype == getattr(torch, dtype)
    photograph(160, 120).convert("L").save(tmp_path / "grey.png")
    conversations = [
        turn({"type": "image", "image": photograph(120, 120)}, {"type": "text", "text": "what is this?"}),
        turn(
            {"type": "text", "text": "first"},
            {"type": "image", "image": str(tmp_path / "grey.png")},
            {"type": "text", "text": "then"},
            {"type": "image", "image": photograph(90, 200)},
        ),
        [
            {"role": "system", "content": "be brief"},
            *turn({"type": "image", "image": photograph(64, 64)}),
            {"role": "assistant", "content": [{"type": "text", "text": "a house"}]},
            *turn({"type": "text", "text": "and now?"}),
        ],
    ]
    if dtype == "bfloat16":
        assert all(len(answerer.answer([c], max_new_tokens=3)) == 1 for c in conversations)
        return
    together = answerer.answer(conversations, max_new_tokens=6, do_sample=False)
    assert len(answerer.handle.report.pictures) == 4
    assert together == [answerer.answer([c], max_new_tokens=6, do_sample=False)[0] for c in conversations]
    assert all(tokens <= 6 for _, tokens in together)


def test_a_conversation_is_the_processors_own_prompt(checkpoint):
    """What goes into the model is what transformers' chat template makes of the same messages."""
    answerer = Answerer.load(str(checkpoint), Plan(reduction=0))
    messages = turn({"type": "image", "image": photograph(120, 120)}, {"type": "text", "text": "what ?"})
    expected = answerer.processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    inputs = answerer.inputs([messages])
    for name in ("input_ids", "pixel_values", "image_grid_thw"):
        assert torch.equal(inputs[name], expected[name])


def test_weights_on_the_hub_that_are_pickles_are_refused_with_our_reason(monkeypatch):
    """transformers advises to leave its own lock open."""
    said = "a/b has no file named model.safetensors. Please do not set `use_safetensors=True`."

    def refuses(name, use_safetensors, **_):
        assert use_safetensors is True
        raise OSError(said)

    monkeypatch.setattr("transformers.AutoModelForImageTextToText.from_pretrained", refuses)
    with pytest.raises(illava.errors.CheckpointError, match="a/b has no weights in .*then save_pretrained"):
        Answerer.load("a/b", Plan())


@pytest.fixture
def clip(tmp_path):
    """Eight frames, four a second."""
    import av

    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 84, 84, "yuv420p"
        for i in range(8):
            frame = np.full((84, 84, 3), 30 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_videos_are_read_and_broken_ones_said(checkpoint, clip, tmp_path):
    answerer = Answerer.load(str(checkpoint), Plan(reduction=0.5), frames=4)
    ((_, tokens),) = answerer.answer(
        [turn({"type": "video", "video": str(clip)})], max_new_tokens=3, do_sample=False
    )
    assert tokens <= 3
    (picture,) = answerer.handle.report.pictures
    assert (picture.kind, picture.grid[0]) == ("video", 2)
    (tmp_path / "broken.mp4").write_text(json.dumps({}))
    with pytest.raises(illava.errors.DataError, match="broken.mp4 cannot be read"):
        answerer.answer([turn({"type": "video", "video": str(tmp_path / "broken.mp4")})])


@pytest.mark.parametrize("frames", [8, 4])
def test_frames_stand_at_their_times(checkpoint, clip, frames):
    """Of two seconds: 8 frames are 4 a second, 4 are 2, and two of them become one."""
    answerer = Answerer.load(str(checkpoint), Plan(reduction=0), frames=frames)
    item = jobs.decode(jobs.Item("a", (), (clip,), "what?", "here"), frames)
    loaded = Loaded(answerer.model, answerer.processor)
    for inputs in (
        answerer.inputs([turn({"type": "video", "video": str(clip)})]),
        build_inputs(loaded, [item]),
    ):
        assert inputs["second_per_grid_ts"].tolist() == [2 / (frames / 2)]
