"""Real pictures and video through a real processor, and the example scripts as a reader runs them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from transformers import AutoModelForImageTextToText, AutoProcessor

import illava
import tiny_checkpoint

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen2_vl"])
def loaded(request, tmp_path_factory):
    folder = tiny_checkpoint.build(tmp_path_factory.mktemp("checkpoint") / request.param, request.param)
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def photograph(width, height):
    return Image.fromarray(load_sample_image("china.jpg")).resize((width, height))


def clip(frames, width, height):
    """A pan over a photograph."""
    picture = np.asarray(
        Image.fromarray(load_sample_image("flower.jpg")).resize((width + 4 * frames, height))
    )
    return np.stack([picture[:, 4 * i : 4 * i + width] for i in range(frames)])


def ask(processor, *contents, images=None, videos=None):
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        for content in contents
    ]
    options = {"do_sample_frames": False} if videos is not None else {}
    return processor(text=texts, images=images, videos=videos, padding=True, padding_side="left",
                     return_tensors="pt", **options)  # fmt: skip


def test_a_photograph_and_a_video_in_one_prompt(loaded):
    model, processor = loaded
    question = {"type": "text", "text": "what is in the picture, and what moves in the video?"}
    inputs = ask(
        processor, [{"type": "image"}, {"type": "video"}, question],
        images=[photograph(224, 168)], videos=[clip(8, 112, 84)],
    )  # fmt: skip
    plain = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    with illava.patch(model, reduction=0.778) as handle:
        merged = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        report = handle.report
    assert merged.shape == plain.shape
    assert [p.kind for p in report.pictures] == ["image", "video"]
    grids = [tuple(inputs["image_grid_thw"][0].tolist()), tuple(inputs["video_grid_thw"][0].tolist())]
    assert [p.grid for p in report.pictures] == grids
    for picture, expected in zip(report.pictures, handle.plan.schedule(grids), strict=True):
        assert picture.tokens == expected.tokens
        assert picture.final_tokens == expected.final_tokens
        assert [(r.layer, r.tokens_in, r.tokens_out) for r in picture.layers] == [
            *expected.vit,
            *expected.llm,
        ]
        assert abs(picture.reduction - 0.778) < 0.05
    assert report.flops.speedup_bound > 1.2
    assert torch.equal(plain, model.generate(**inputs, max_new_tokens=6, do_sample=False))


def test_a_batch_of_different_photographs(loaded):
    model, processor = loaded
    pictures = [photograph(224, 168), photograph(140, 196)]
    question = [{"type": "image"}, {"type": "text", "text": "what is this?"}]
    longer = [
        {"type": "image"},
        {"type": "text", "text": "what is this, and who is the person to the left of it?"},
    ]
    with illava.patch(model, reduction=0.667):
        both = model.generate(
            **ask(processor, question, longer, images=pictures), max_new_tokens=8, do_sample=False
        )
        for row, (content, picture) in enumerate(zip((question, longer), pictures, strict=True)):
            alone = model.generate(
                **ask(processor, content, images=[picture]), max_new_tokens=8, do_sample=False
            )
            assert processor.decode(both[row, -8:]) == processor.decode(alone[0, -8:])


@pytest.mark.slow
def test_compare_runs_as_the_readme_says(tmp_path):
    """The first command of the README: finishes, shows both sides, and the counts of the plan."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "compare.py"), "--runs", "1", "--max-new-tokens", "4"],
        cwd=tmp_path, capture_output=True, text=True, timeout=570, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for text in ("unpatched", "patched", "345", "random", "language model", "encoder"):
        assert text in done.stdout
    assert not list(tmp_path.iterdir())


def test_compare_says_what_is_wrong_with_its_options(tmp_path):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "compare.py"), "--image", str(tmp_path / "none.jpg")],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode in (1, 2)
    assert "none.jpg" in done.stderr


def test_answers_asks_the_shipped_reader():
    """Run as the README says, on one question of each task: a table of answers, right ones counted."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / "answers.py", "--items", "1"],
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    for task in ("find", "spatial", "count", "text", "several", "video"):
        assert f"{task}: right of 1" in done.stdout
    assert "77.8% of the visual tokens removed" in done.stdout
