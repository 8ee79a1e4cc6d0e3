"""VLMEvalKit on questions about drawn pictures: its predictions and scores are the model's own.

In one process: its several use NCCL, and with that a GPU each.
"""

import base64
import csv
import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import illava
from answers import say
from readers import batches, tasks

pytest.importorskip("vlmeval", reason="needs VLMEvalKit: pip install ms-vlmeval")

ROOT = Path(__file__).resolve().parent.parent
READER = ROOT / "checkpoints" / "qwen2_5_vl"
PLAN = {"vit_layers": (1, 3), "llm_layers": (1, 3), "reduction": 0.8}
COUNTS = {"find": 5, "text": 5}  # of writing, merging loses letters
SCRIPT = f"""
import sys
from illava.harness import vlmevalkit

common = dict(pretrained={str(READER)!r}, dtype="float32", max_new_tokens=8)
vlmevalkit.register("plain", reduction=0, **common)
vlmevalkit.register("merged", vit_layers="1-3", llm_layers="1-3", reduction=0.8, **common)

from vlmeval.run import main
common = ["run", "--model", "plain", "merged", "--work-dir", "out"]
sys.argv = [*common, "--data", "drawn", "--mode", "infer"]  # it scores no free answers to tables of one's own
main()
sys.argv = [*common, "--data", "choices", "--judge", "exact_matching"]
main()
"""
# It asks like this; the reader, which never saw such a question, says something all the same.
CHOICES = {"A": "triangle", "B": "zero", "C": "one", "D": "circle"}
CHOOSE = (
    "Question: {}\nOptions:\n"
    + "".join(f"{letter}. {word}\n" for letter, word in CHOICES.items())
    + "Please select the correct answer from the options above. \n"
)


@pytest.fixture(scope="module")
def items():
    return [tasks.held_out_item(task, "test", i) for task, count in COUNTS.items() for i in range(count)]


def answers(items, form="{}"):
    """By transformers and illava alone."""
    model = AutoModelForImageTextToText.from_pretrained(READER, dtype=torch.float32).eval()
    composer = batches.Composer(model, AutoProcessor.from_pretrained(READER))
    asked = []
    for item in items:
        (question,) = item.questions
        asked.append(replace(item, questions=(replace(question, text=form.format(question.text)),)))
    with torch.inference_mode():
        plain = [say(model, composer, item).strip() for item in asked]
        with illava.patch(model, **PLAN):
            return {"plain": plain, "merged": [say(model, composer, item).strip() for item in asked]}


def write_data(file, items, right, **columns):
    """A table of VLMEvalKit: pictures, questions and the answers to be given."""
    with file.open("w", newline="") as opened:
        writer = csv.writer(opened, delimiter="\t")
        writer.writerow(["index", "image", "question", "answer", *columns])
        for i, (item, answer) in enumerate(zip(items, right, strict=True)):
            png = io.BytesIO()
            Image.fromarray(item.pictures[0]).save(png, "png")
            encoded = base64.b64encode(png.getvalue()).decode()
            writer.writerow([i, encoded, item.questions[0].text, answer, *columns.values()])


@pytest.mark.slow
def test_predictions_and_scores_are_the_models_own(items, tmp_path):
    import pandas

    expected, chosen = answers(items), answers(items, CHOOSE)
    letter_of = {word: letter for letter, word in CHOICES.items()}
    # What the unpatched model says where that is a choice, and D elsewhere: some are right, and some are not.
    right = [letter_of.get(word, "D") for word in chosen["plain"]]
    (tmp_path / "data").mkdir()
    write_data(tmp_path / "data" / "drawn.tsv", items, [item.questions[0].answer for item in items])
    write_data(tmp_path / "data" / "choices.tsv", items, right, **CHOICES)
    (tmp_path / "run.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "run.py"], cwd=tmp_path, capture_output=True, text=True, timeout=500, check=False,
        env=os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "LMUData": str(tmp_path / "data"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
            "PRED_FORMAT": "tsv",
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for name in expected:
        for data, said in (("drawn", expected[name]), ("choices", chosen[name])):
            (file,) = {path.resolve() for path in (tmp_path / "out" / name).rglob(f"{name}_{data}.tsv")}
            table = pandas.read_csv(file, sep="\t", keep_default_na=False).sort_values("index")
            # VLMEvalKit keeps a picture as a JPEG or PNG of its own: the answers say that nothing was lost.
            assert [str(text).strip() for text in table["prediction"]] == said
        (file,) = {path.resolve() for path in (tmp_path / "out" / name).rglob(f"{name}_choices*_acc.csv")}
        ours = [letter_of.get(word) == letter for word, letter in zip(chosen[name], right, strict=True)]
        assert 0 < sum(ours) < len(ours)
        assert pandas.read_csv(file)["Overall"].tolist() == pytest.approx([sum(ours) / len(ours)])
    assert expected["plain"] != expected["merged"]
    assert chosen["plain"] != chosen["merged"]


def test_turns_of_a_conversation():
    from illava.harness.vlmevalkit import PatchedModel

    model = PatchedModel.__new__(PatchedModel)
    model.system_prompt = "be brief"
    message = [
        {"type": "image", "value": "a.png"},
        {"type": "text", "value": "what ?"},
        {"type": "text", "value": "a house", "role": "assistant"},
        {"type": "text", "value": "and now ?", "role": "user"},
    ]
    assert model.conversation(message) == [
        {"role": "system", "content": [{"type": "text", "text": "be brief"}]},
        {
            "role": "user",
            "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "what ?"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "a house"}]},
        {"role": "user", "content": [{"type": "text", "text": "and now ?"}]},
    ]
    with pytest.raises(illava.errors.DataError, match="audio cannot be shown"):
        model.conversation([{"type": "audio", "value": "a.wav"}])


def test_one_of_vlmevalkits_own_models_is_patched(tmp_path, monkeypatch):
    import tiny_checkpoint
    from illava.harness import vlmevalkit

    folder = tiny_checkpoint.build(tmp_path / "tiny")

    class Own(vlmevalkit.BaseModel):
        def __init__(self):
            super().__init__()
            self.model = AutoModelForImageTextToText.from_pretrained(folder)

    monkeypatch.setitem(vlmevalkit.supported_VLM, "own", Own)
    monkeypatch.setitem(vlmevalkit.supported_VLM, "strange", lambda: object())
    vlmevalkit.register_patched("own-merged", "own", vit_layers="5-9-13", llm_layers="1", reduction=0.5)
    made = vlmevalkit.supported_VLM["own-merged"]()
    assert isinstance(made, Own)
    assert made.illava_handle.active
    assert made.illava_handle.plan.vit_layers == (5, 9, 13)
    with pytest.raises(illava.errors.DataError, match="has no model 'nobody'"):
        vlmevalkit.register_patched("merged", "nobody")
    vlmevalkit.register_patched("strange-merged", "strange", reduction=0.5)
    with pytest.raises(illava.errors.DataError, match="elsewhere than in .model"):
        vlmevalkit.supported_VLM["strange-merged"]()


def test_a_plan_that_cannot_be_is_refused_when_it_is_registered():
    from illava.harness import vlmevalkit

    with pytest.raises(illava.PlanError, match="did you mean 'reduction'"):
        vlmevalkit.register("wrong", pretrained="nowhere", reductoin=0.5)
