"""lmms-eval from the package index, on questions about drawn pictures: its scores are illava's own count."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import illava
from answers import say
from readers import batches, tasks
from zoo import folders
from zoo.common import Image as Pixels

pytest.importorskip("lmms_eval", reason='needs lmms-eval: pip install ".[lmms-eval]"')

from illava.harness import lmms_eval_model  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
READER = ROOT / "checkpoints" / "qwen2_5_vl"
PLAN = {"vit_layers": (1, 3), "llm_layers": (1, 3), "reduction": 0.8}
SAID = "vit_layers=1-3,llm_layers=1-3,reduction=0.8"
COUNTS = {"find": 8, "several": 4, "text": 6}  # of writing, merging loses letters
TOKENS = 8


def test_lmms_eval_finds_the_models():
    from lmms_eval.models import get_model

    for name in (
        "illava",
        "illava_qwen2_5_vl",
        "illava_qwen3_vl",
        "illava_internvl",
        "illava_llava_onevision",
    ):
        assert get_model(name) is lmms_eval_model.PatchedModel


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, {"max_new_tokens": 128, "num_beams": 1, "do_sample": False}),
        ({"max_new_tokens": 8, "temperature": 0, "top_p": 0.5}, {"max_new_tokens": 8, "do_sample": False}),
        ({"temperature": 0.7, "top_p": 0.9}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9}),
        ({"num_beams": 3}, {"num_beams": 3, "do_sample": False}),
    ],
)
def test_settings_of_a_task(asked, expected):
    settings = lmms_eval_model.generation_settings(asked)
    assert settings.items() >= expected.items()
    assert (settings.get("top_p") is None) == (not settings["do_sample"])


def test_stop_strings_cut():
    assert lmms_eval_model.cut("a\n\nb. c", ["\n\n", "."]) == "a\n\nb"
    assert lmms_eval_model.cut("a b", None) == "a b"
    assert lmms_eval_model.cut("a b", " ") == "a"


@pytest.fixture(scope="module")
def items():
    return {
        task: [tasks.held_out_item(task, "test", i) for i in range(count)] for task, count in COUNTS.items()
    }


def write_task(folder, name, pictures, questions, answers):
    """A task of lmms-eval, one of those in `folder/tasks`, of which every YAML file is one.

    Args:
        pictures: PIL images of each question.
    """
    import datasets

    tasks = folder / "tasks"
    tasks.mkdir(exist_ok=True)
    (tasks / "utils.py").write_text(
        "def doc_to_visual(doc):\n    return doc['images']\n\n\n"
        "def doc_to_text(doc):\n    return doc['question']\n"
    )
    features = datasets.Features(
        images=datasets.Sequence(datasets.Image()),
        question=datasets.Value("string"),
        answer=datasets.Value("string"),
    )
    rows = {"images": pictures, "question": questions, "answer": answers}
    data = datasets.DatasetDict(test=datasets.Dataset.from_dict(rows, features=features))
    data.save_to_disk(folder / f"{name}_data")
    (tasks / f"{name}.yaml").write_text(
        f"task: illava_{name}\n"
        f"dataset_path: {folder / f'{name}_data'}\n"
        "dataset_kwargs:\n  load_from_disk: true\n"
        "test_split: test\n"
        "output_type: generate_until\n"
        "doc_to_visual: !function utils.doc_to_visual\n"
        "doc_to_text: !function utils.doc_to_text\n"
        "doc_to_target: answer\n"
        f"generation_kwargs:\n  max_new_tokens: {TOKENS}\n"
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
    )


def write_runs(folder, runs, **common):
    """What `run` runs: for each name, lmms-eval's arguments that differ."""
    common |= {"include_path": str(folder / "tasks"), "device": "cpu", "log_samples": True}
    settled = [common | asked | {"output_path": str(folder / name)} for name, asked in runs.items()]
    (folder / "runs.yaml").write_text(yaml.safe_dump(settled))


@pytest.fixture(scope="module")
def folder(items, tmp_path_factory):
    """Three tasks of lmms-eval over pictures of ours, and a run of both models on them."""
    folder = tmp_path_factory.mktemp("lmms_eval")
    for task, asked in items.items():
        questions = [item.questions[0] for item in asked]
        pictures = [[Image.fromarray(picture) for picture in item.pictures] for item in asked]
        write_task(folder, task, pictures, [q.text for q in questions], [q.answer for q in questions])
    runs = {
        name: {"model_args": f"pretrained={READER},dtype=float32,{plan}"}
        for name, plan in {"unpatched": "reduction=0", "patched": SAID}.items()
    }
    tasks_named = ",".join(f"illava_{task}" for task in items)
    write_runs(folder, runs, model="illava_qwen2_5_vl", tasks=tasks_named, batch_size=4)
    return folder


@pytest.fixture(scope="module")
def ours(items):
    """Answers of the reader by transformers and illava alone, one question at a time."""
    model = AutoModelForImageTextToText.from_pretrained(READER, dtype=torch.float32).eval()
    composer = batches.Composer(model, AutoProcessor.from_pretrained(READER))

    def answers():
        return {task: [say(model, composer, item) for item in asked] for task, asked in items.items()}

    with torch.inference_mode():
        plain = answers()
        with illava.patch(model, **PLAN):
            return {"unpatched": plain, "patched": answers()}


def run(folder, *command):
    done = subprocess.run(
        [sys.executable, "-m", *command, "--config", str(folder / "runs.yaml")],
        cwd=folder, capture_output=True, text=True, timeout=500, check=False,
        env=os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
            "WANDB_MODE": "offline", "HF_HOME": str(folder / "cache"),
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def newest(folder, pattern):
    found = sorted(folder.rglob(pattern))
    assert found, f"no {pattern}: {[str(p) for p in folder.rglob('*')]}"
    return found[-1]


def results_of(folder, task):
    """lmms-eval's score of a task, and what it was answered, in the order of its questions."""
    results = json.loads(newest(folder, "*results.json").read_text())["results"]
    samples = map(json.loads, newest(folder, f"*samples_illava_{task}.jsonl").read_text().splitlines())
    said = {row["doc_id"]: row["filtered_resps"].strip() for row in samples}
    return results[f"illava_{task}"]["exact_match,none"], [said[i] for i in range(len(said))]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_scores_are_our_own_count(folder, items, ours, processes):
    """Patched and unpatched in one command; with two processes, each answers half."""
    launch = ["accelerate.commands.launch", "--cpu", f"--num_processes={processes}", "--num_machines=1",
              "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0", "-m"]  # fmt: skip
    out = run(folder, *([] if processes == 1 else launch), "lmms_eval")
    for name, answered in ours.items():
        for task, asked in items.items():
            score, said = results_of(folder / name, task)
            assert said == [text.strip() for text in answered[task]]
            right = [text == item.questions[0].answer for text, item in zip(said, asked, strict=True)]
            assert score == pytest.approx(np.mean(right))
        for file in (folder / name).rglob("*"):
            if file.is_file():
                file.unlink()  # the next number of processes writes its own
    assert ours["patched"] != ours["unpatched"]
    assert "encoder blocks (1, 3)" in out or "1, 3" in out


def asked_alone(checkpoint, pictures, question, plan):
    """The answer of a model patched by hand, its prompt made by transformers alone."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    processor = AutoProcessor.from_pretrained(checkpoint)
    content = [{"type": "image", "image": picture} for picture in pictures]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [*content, {"type": "text", "text": question}]}],
        tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    with torch.inference_mode(), illava.patch(model, **plan):
        ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.slow
def test_scores_of_other_families_are_our_own_count(tmp_path):
    """InternVL and LLaVA-OneVision, patched; every second answer to be given is what the model should say."""
    shown = [
        [picture.pil() for picture in row]
        for row in ([Pixels(90, 200)], [Pixels(60, 150), Pixels(200, 100)], [Pixels(112, 112)])
    ]
    questions = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9"]
    plan, runs, expected = {"vit_layers": (0, 2), "llm_layers": (1,), "reduction": 0.6}, {}, {}
    for family in ("internvl", "llava_onevision"):
        checkpoint = folders.write(family, tmp_path / "checkpoints" / family)
        expected[family] = [
            asked_alone(checkpoint, pictures, question, plan)
            for pictures, question in zip(shown, questions, strict=True)
        ]
        assert len(set(expected[family])) == 3
        right = [said if place % 2 == 0 else "nothing" for place, said in enumerate(expected[family])]
        write_task(tmp_path, family, shown, questions, right)
        runs[family] = {
            "model": f"illava_{family}", "tasks": f"illava_{family}",
            "model_args": f"pretrained={checkpoint},vit_layers=0-2,llm_layers=1,reduction=0.6",
        }  # fmt: skip
    write_runs(tmp_path, runs, batch_size=1)
    run(tmp_path, "lmms_eval")
    for family, said in expected.items():
        assert results_of(tmp_path / family, family) == (pytest.approx(2 / 3), said)


def test_a_setting_that_does_not_exist_is_said_before_anything_is_loaded():
    with pytest.raises(illava.PlanError, match="did you mean 'reduction'"):
        lmms_eval_model.PatchedModel.create_from_arg_string(
            "pretrained=nowhere,reductoin=0.5", {"device": "cpu"}
        )
