"""What `illava` says to bad input: a sentence with the value, the reason, the remedy, and an exit status."""

import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from sklearn.datasets import load_sample_image
from transformers.utils import logging
from typer.testing import CliRunner

import illava
import tiny_checkpoint
from illava import families
from illava.cli import app, console
from illava.cli.options import Rule, plan_of, plans_of, spread
from illava.evaluate.found import describe
from questions import write_questions

ROOT = Path(__file__).parent.parent
READER = ROOT / "checkpoints" / "qwen2_5_vl"


@pytest.fixture(autouse=True)
def _libraries_speak_again():
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    yield
    logging.set_verbosity(verbosity)
    if bars:
        logging.enable_progress_bar()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint.build(tmp_path_factory.mktemp("tiny") / "tiny-qwen")


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "china.jpg"
    Image.fromarray(load_sample_image("china.jpg")).resize((140, 112)).save(path)
    return path


@pytest.fixture
def illava_says(tmp_path, monkeypatch):
    """Run a command in this process, in an empty folder: its exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        result = CliRunner().invoke(app, spread([str(a) for a in arguments]))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception  # a traceback is what a user would have seen
        return result.exit_code, result.stdout, result.stderr

    return run


# Bad input --------------------------------------------------------------------------------------


def test_pictures_that_are_missing_or_broken(checkpoint, illava_says, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"not a picture")
    for path, reason in ((tmp_path / "no.jpg", "does not exist"), (broken, "no picture that PIL can read")):
        status, said, error = illava_says("run", checkpoint, "--image", path)
        assert (status, said) == (1, "")
        assert error.startswith(f"illava: {path} ")
        assert reason in error


def test_folders_and_files_without_items(checkpoint, illava_says, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for command in ("fidelity", "plan", "run"):
        target = ["--min-agreement", 0.9] if command == "plan" else []
        status, said, error = illava_says(command, checkpoint, "--data", empty, *target)
        assert (status, said) == (1, "")
        assert "holds no picture or video" in error
    status, _, error = illava_says("bench", checkpoint, "--image", tmp_path / "nowhere")
    assert status == 1
    assert "nowhere does not exist" in error


def test_a_broken_line_is_named_and_left_out(checkpoint, picture, illava_says, tmp_path):
    data = tmp_path / "questions.jsonl"
    good = json.dumps({"key": "one", "image": str(picture), "prompt": "what is this?"})
    data.write_text(good + '\n{"image": \n' + json.dumps({"image": "gone.png"}) + "\n")
    status, said, error = illava_says(
        "fidelity", checkpoint, "--data", data, "--reduction", 0.5, "--max-new-tokens", 2, "--json"
    )
    assert status == 0
    found = json.loads(said)
    assert found["agreement"]["50 %"]["items"] == 1
    reasons = {Path(s["source"]).name: s["reason"] for s in found["skipped"]}
    assert reasons.keys() == {"questions.jsonl:2", "questions.jsonl:3"}
    assert "is not JSON" in reasons["questions.jsonl:2"]
    assert "gone.png does not exist" in reasons["questions.jsonl:3"]
    # And where there is nothing else.
    data.write_text('{"image": \n')
    status, said, error = illava_says("plan", checkpoint, "--data", data, "--speedup", 1.2)
    assert (status, said) == (1, "")
    assert f"{data}:1" in error
    assert "is not JSON" in error


def test_results_of_another_question_are_not_gone_on_with(checkpoint, picture, illava_says):
    for command, name in (("run", "answers"), ("fidelity", "fidelity")):
        line = [command, checkpoint, "--data", picture, "--max-new-tokens", 2, "--out", f"{name}.jsonl"]
        assert illava_says(*line, "--prompt", "what is this?")[0] == 0
        assert illava_says(*line, "--prompt", "what is this?")[0] == 0
        status, said, error = illava_says(*line, "--prompt", "and this?")
        assert (status, said) == (1, "")
        assert _matches("prompt was 'what is this\\?' and is now 'and this\\?'. Give another file", error)
        assert _matches("frames was 16", illava_says(*line, "--prompt", "what is this?", "--frames", 4)[2])


def test_folders_that_are_no_checkpoint(checkpoint, picture, illava_says, tmp_path):
    bare, other, torn, pickled = (tmp_path / name for name in ("bare", "other", "torn", "pickled"))
    (tmp_path / "nothing").mkdir()
    for folder in (bare, other, torn, pickled):
        shutil.copytree(checkpoint, folder)
    (bare / "model.safetensors").unlink()
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:1000])
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    config = json.loads((other / "config.json").read_text()) | {"model_type": "bert"}
    (other / "config.json").write_text(json.dumps(config))
    for folder, reason in (
        (tmp_path / "missing", "does not exist; give the folder of a checkpoint"),
        (tmp_path / "nothing", "no config.json, so it is no checkpoint"),
        (checkpoint / "config.json", "is a file; give the folder"),
        (bare, "a config but no weights.*--random-weights"),
        (torn, "broken weights.*again"),
        (pickled, "its weights in pytorch_model.bin; illava loads safetensors only.*save_pretrained"),
        (other, "a model of type 'bert', which illava does not know.*qwen2_5_vl"),
    ):
        status, said, error = illava_says("run", folder, "--image", picture)
        assert (status, said) == (1, ""), folder
        assert _matches(reason, error), error
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text("{")
    assert "cannot be read" in illava_says("models", tmp_path / "bad")[2]


def _matches(pattern, text):
    return re.search(pattern, " ".join(text.split())) is not None


def test_plans_that_cannot_be_carried_out(checkpoint, picture, illava_says, tmp_path):
    deep = tmp_path / "deep.json"
    deep.write_text(illava.Plan((7, 15, 31), (2, 30), 0.5).to_json())
    words = tmp_path / "words.json"
    words.write_text("reduction: 0.5")
    for options, reason in (
        (["--plan", deep], r"this model has 16 vit layers.*\[31\] are out of range"),
        (["--plan", words], "words.json: .*JSON"),
        (["--plan", tmp_path / "no.json"], "no.json cannot be read: No such file"),
        (["--plan", deep, "--reduction", 0.5], "says everything already; leave out --reduction"),
        (["--reduction", 1.5], "reduction=1.5 is outside"),
        (["--vit-layers", "five"], "'five' is no layer; give for example"),
        (["--device", "gpu"], "device 'gpu' is not known; give cpu"),
        (["--dtype", "int8"], "dtype 'int8' is not known; choose one of float32"),
    ):
        status, said, error = illava_says("run", checkpoint, "--image", picture, *options)
        assert (status, said) == (1, ""), options
        assert _matches(reason, error), error


def test_command_lines_that_make_no_sense(checkpoint, picture, illava_says):
    for arguments, reason in (
        (["run", checkpoint], "give --image or --video, or else --data"),
        (["run", checkpoint, "--data", picture, "--compare"], "--compare is for one prompt"),
        (["plan", checkpoint, "--data", picture], "exactly one of --min-agreement"),
        (["bench"], "Missing argument"),
        (["fidelity", checkpoint], "Missing option '--data'"),
        (["bench", checkpoint, "--rounds", 0], "Invalid value for '--rounds'"),
    ):
        status, said, error = illava_says(*arguments)
        assert (status, said) == (2, ""), arguments
        assert _matches(reason, error.replace("│", " ")), error
    for value, reason in ((1.5, "min_agreement=1.5 is out of range"), (0, "min_agreement=0")):
        status, _, error = illava_says("plan", checkpoint, "--data", picture, "--min-agreement", value)
        assert status == 1
        assert reason in error
    assert "give for example 896x1344" in illava_says("bench", checkpoint, "--size", "big")[2]


def test_where_results_cannot_go(checkpoint, picture, illava_says, tmp_path):
    (tmp_path / "file").write_text("")
    for path, reason in (
        (tmp_path, "is a folder; give a file in it"),
        (tmp_path / "file/plan.json", "cannot"),
    ):
        plan = ["plan", checkpoint, "--data", picture, "--speedup", 1.2, "--out", path]
        for command in (plan, ["bench", checkpoint, "--plot", path]):
            status, said, error = illava_says(*command)
            assert (status, said) == (1, ""), command
            assert reason in error
            assert str(path) in error
    status, said, error = illava_says("bench", checkpoint, "--plot", tmp_path / "plot")
    assert (status, said) == (1, "")
    assert "give a path in .png" in error


def test_a_plan_out_of_reach_has_a_status_of_its_own(checkpoint, picture, illava_says):
    status, said, error = illava_says(
        "plan", checkpoint, "--data", picture, "--max-tokens", 100_000, "--max-new-tokens", 2
    )
    assert (status, said) == (console.NOT_REACHED, "")
    assert _matches("no prompt has more than 20 visual tokens, so 100000 asks for nothing", error)


def test_errors_nobody_expects_are_a_sentence_too(checkpoint, picture, illava_says, monkeypatch):
    def fails(*_, **__):
        raise KeyError("something odd")

    monkeypatch.setattr("illava.evaluate.loading.load", fails)
    status, said, error = illava_says("run", checkpoint, "--image", picture)
    assert (status, said) == (1, "")
    assert error.startswith("illava: KeyError: 'something odd'")
    assert "ILLAVA_DEBUG=1" in error
    assert "Traceback" not in error
    monkeypatch.setenv("ILLAVA_DEBUG", "1")
    assert "Traceback" in illava_says("run", checkpoint, "--image", picture)[2]

    def too_large(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("illava.evaluate.loading.load", too_large)
    assert (
        "where the model itself does not fit, --dtype bfloat16"
        in illava_says("run", checkpoint, "--image", picture)[2]
    )

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("illava.evaluate.loading.load", interrupted)
    status, said, error = illava_says("bench", checkpoint)
    assert (status, said, error) == (console.STOPPED, "", "stopped\n")


def test_without_its_extra_a_plot_is_a_note(checkpoint, illava_says, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, said, error = illava_says(
        "bench", checkpoint, "--size", "56x56", "--reduction", 0.5, "--rounds", 1
    )
    assert status == 0
    assert "50 %" in said
    assert 'pip install "illava[evaluate]"' in error


def test_whatever_may_take_long_says_so_meanwhile(checkpoint, picture, illava_says, tmp_path, monkeypatch):
    """On a terminal: what the spinners and bars of stderr showed before they went."""
    monkeypatch.setenv("TERM", "xterm")
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(3):
        shutil.copy(picture, folder / f"{number}.jpg")
    few = ["--max-new-tokens", 1, "--json"]
    for arguments, shown in (
        (["run", checkpoint, "--image", picture, *few], ("loading", "answering")),
        (["run", checkpoint, "--image", picture, "--max-new-tokens", 1], ("reading", "answering")),
        (["run", checkpoint, "--data", folder, *few], ("looking into", "counting the items")),
        (["bench", checkpoint, "--image", folder, "--rounds", 1, "--json"], ("3/3", "preparing")),
        (["plan", checkpoint, "--data", folder, "--max-tokens", 1000, *few], ("looking into", "3/3")),
        (["fidelity", checkpoint, "--data", folder, *few], ("counting the items", "summing up")),
    ):
        terminal = Console(file=io.StringIO(), force_terminal=True, width=200)
        for module in ("console", "run", "fidelity"):  # those that hand it on
            monkeypatch.setattr(f"illava.cli.{module}.notes", terminal)
        status, _, _ = illava_says(*arguments)
        assert status == (console.NOT_REACHED if arguments[0] == "plan" else 0)
        for word in shown:
            assert word in terminal.file.getvalue(), (arguments, word)


@pytest.mark.slow
def test_an_answer_comes_piece_by_piece(illava_says, tmp_path, monkeypatch):
    (line, *_) = map(json.loads, write_questions(tmp_path, ("video",), 1).read_text().splitlines())
    pieces = []
    show = console.out.print

    def hear(*said, **how):
        pieces.append(said)
        show(*said, **how)

    monkeypatch.setattr(console.out, "print", hear)
    asked = ["--video", tmp_path / line["video"], "--prompt", line["prompt"], "--reduction", 0]
    status, said, error = illava_says("run", READER, *asked)
    assert (status, said) == (0, line["answer"] + "\n")
    words = line["answer"].split()
    assert len(words) == 3
    assert [piece[0].strip() for piece in pieces if piece and piece[0]] == words
    assert "nothing was merged" in error


@pytest.mark.parametrize("command", ["run", "fidelity"])
def test_results_of_other_data_are_not_gone_on_with(command, checkpoint, picture, illava_says, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        shutil.copy(picture, tmp_path / name / "a.jpg")
    ask = (command, checkpoint, "--out", "out.jsonl", "--max-new-tokens", 2, "--data")
    assert illava_says(*ask, tmp_path / "one")[0] == 0
    before = Path("out.jsonl").read_text()
    status, said, error = illava_says(*ask, tmp_path / "two")
    assert (status, said) == (1, "")
    assert "holds results of other settings: data was" in " ".join(error.split())
    assert Path("out.jsonl").read_text() == before
    assert illava_says(*ask, "one")[0] == 0, "the same folder by another name"


# Options ----------------------------------------------------------------------------------------


def test_reductions_are_given_one_after_the_other():
    line = ["bench", "m", "--reduction", "0", "0.667", "--rounds", "2", "--reduction", ".5", "1e-1"]
    each = ["--reduction", "0", "--reduction", "0.667"], ["--reduction", ".5", "--reduction", "1e-1"]
    assert spread(line) == ["bench", "m", *each[0], "--rounds", "2", *each[1]]
    assert spread(["run", "--reduction", "0.5", "--image", "3"]) == [
        "run",
        "--reduction",
        "0.5",
        "--image",
        "3",
    ]
    assert spread(["bench", "--reduction=0", "0.667"]) == ["bench", "--reduction=0", "--reduction", "0.667"]


def test_options_say_a_plan(tmp_path):
    assert plan_of(0.5, "7, 15", "none", 0.3) == illava.Plan((7, 15), (), 0.5, 0.3)
    assert plan_of(None, "output", None, None) == illava.Plan(("output",))
    assert plan_of(None, "5-9-13", None, None) == illava.Plan((5, 9, 13))
    assert plan_of(None, "0.25, 3", "0.5", None) == illava.Plan((0.25, 3), (0.5,))
    assert list(plans_of(None, None, None, None, None, None)) == ["0 %", "66.7 %", "77.8 %", "88.9 %"]
    file = tmp_path / "plan.json"
    file.write_text(illava.Plan.paper(0.889).to_json())
    plans = plans_of([0.5], None, "3", None, None, [file])
    assert plans == {"50 %": illava.Plan(None, (3,), 0.5), str(file): illava.Plan.paper(0.889)}
    assert list(plans_of(None, None, None, None, None, [file])) == [str(file)]
    assert list(plans_of([0.6667, 0.66671], None, None, None, None, None)) == ["66.67 %", "66.671 %"]
    ranked = plans_of([0.5], None, None, None, Rule.recycle, [file])
    assert ranked["50 %"] == illava.Plan(reduction=0.5, merge="recycle")
    assert [plan_of(None, None, None, None, rule).merge for rule in Rule] == [rule.value for rule in Rule]
    said = (("3", None, None, None), (None, "3", None, None), (None, None, 0.3, None))
    for layers in (*said, (None, None, None, Rule.recycle)):
        with pytest.raises(illava.PlanError, match="says everything already; leave out --"):
            plans_of(None, *layers, [file])


@pytest.mark.parametrize(
    "plan",
    [
        illava.Plan(),
        illava.Plan.release(),
        illava.Plan((3,), ("input",), score="lse", merge="prune", llm_shares=(0.2,), vit_shares=(0.5,)),
    ],
)
def test_a_plan_is_described_as_python(plan):
    assert eval(describe(plan), {"illava": illava}) == plan


# Models -----------------------------------------------------------------------------------------


def test_models_are_those_of_the_readme(illava_says):
    readme = (ROOT / "README.md").read_text()
    rows = [line for line in readme.splitlines() if line.startswith("| ") and line.count("|") == 6]
    status, said, _ = illava_says("models", "--json")
    assert status == 0
    models = json.loads(said)["models"]
    assert set(models) == set(illava.supported_models())
    for name, about in models.items():
        (row,) = [row for row in rows if f"`{name}`" in row.split("|")[2]]
        cells = [cell.strip().replace("`", "") for cell in row.strip("| ").split("|")]
        assert cells[2:] == [about["merge_unit"], about["encoder_blocks"], about["decoder_layers"]], name
        supported = (ROOT / "tests/support" / f"{about['transformers'][-1]}.csv").read_text()
        assert f"\n{name},passed" in supported
    assert "Qwen2.5-VL" in illava_says("models")[1]


def test_a_checkpoints_default_plan_is_what_patching_takes(checkpoint, illava_says):
    from transformers import AutoModelForImageTextToText

    status, said, _ = illava_says("models", checkpoint, "--json")
    assert status == 0
    found = json.loads(said)
    with illava.patch(AutoModelForImageTextToText.from_pretrained(checkpoint)) as handle:
        assert tuple(found["vit_layers"]) == handle.plan.vit_layers
        assert tuple(found["llm_layers"]) == handle.plan.llm_layers
        assert (found["vit_depth"], found["llm_depth"]) == (16, 16)
    assert families.about("qwen2_5_vl").title in illava_says("models", checkpoint)[1]
