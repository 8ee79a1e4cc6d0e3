"""The commands for the paper's tables: sound, though nobody has run them here."""

import ast
import importlib.util
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

import rivals.at_harness
from illava import Plan
from illava.harness.arguments import plan_for

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "paper_tables.sh"
# Rows of each table: the unpatched model, and at each reduction the paper's method and four others.
ROWS = {"table1": 2 * (1 + 3 * 5), "table2": 1 + 2 * 5, "table3": 3 * (1 + 5)}


def commands(*tables, **settings):
    environment = {name: value for name, value in os.environ.items() if name != "PLAN"} | settings
    done = subprocess.run(
        ["bash", SCRIPT, *tables], capture_output=True, text=True, check=True, timeout=60, env=environment
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize("table", ROWS)
def test_every_row_has_its_command(table):
    printed = commands(table)
    assert len(printed) == len(set(printed)) == ROWS[table]
    assert set(printed) <= set(commands())


def arguments_of(line):
    """What a command says of the plan; `None` for the unpatched model of VLMEvalKit itself."""
    words = shlex.split(line)
    if "--model_args" not in words:
        return registered(words[2])
    said = words[words.index("--model_args") + 1]
    arguments = dict(pair.split("=", 1) for pair in said.split(","))
    assert arguments.pop("pretrained")
    assert arguments.pop("dtype") == "bfloat16"
    return arguments | {n: float(arguments[n]) for n in ("reduction", "encoder_share") if n in arguments}


def test_every_plan_can_be():
    for line in commands():
        arguments = arguments_of(line)
        if arguments is None:
            continue
        plan = plan_for(arguments)
        assert isinstance(plan, Plan) or plan.func in vars(rivals.at_harness).values()
        if isinstance(plan, Plan) and arguments["reduction"] and "7B-Instruct" in line:
            assert plan == Plan.paper(arguments["reduction"])
        if isinstance(plan, Plan) and arguments["reduction"]:
            assert plan.merge == "recycle", "the paper's rule in every cell"


@pytest.mark.parametrize(
    ("setting", "settings"),
    [
        ("", {}),
        (",encoder_share=0.5", {"encoder_share": 0.5}),
        (",vit_layers=3-7,llm_layers=none", {"vit_layers": (3, 7), "llm_layers": ()}),
    ],
)
def test_another_plan_is_taken_by_both_harnesses(setting, settings):
    for table, rows in (("table1", 6), ("table2", 2)):
        ours = [line for line in commands(table, PLAN=setting) if "/illava_" in line]
        assert len(ours) == rows
        for line in ours:
            arguments = arguments_of(line)
            assert plan_for(arguments) == Plan(reduction=arguments["reduction"], **settings)


def registered(script):
    """What a script's call of `register` or `register_patched` says of the plan."""
    compile(script, "script", "exec")
    found = re.search(r"v\.(register\w*\(.*?\));", script)
    if not found:
        assert "; pass;" in script
        return None
    call = ast.parse(found[1], mode="eval").body
    said = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    said.pop("pretrained", None)
    return said


def test_the_script_says_that_nobody_ran_it():
    assert "NOT RUN HERE" in SCRIPT.read_text()


def test_lmms_eval_knows_every_task():
    found = importlib.util.find_spec("lmms_eval")
    if found is None:
        pytest.skip('needs lmms-eval: pip install ".[lmms-eval]"')
    lines = [shlex.split(line) for line in commands()]
    said = [words[words.index("--tasks") + 1] for words in lines if "--tasks" in words]
    asked = {task for tasks in said for task in tasks.split(",")}
    assert len(asked) >= 14
    for task in asked:
        (file,) = Path(found.origin).with_name("tasks").glob(f"*/{task}.yaml")
        assert re.search(rf"^(task|group): *[\"']?{task}[\"']?\s*$", file.read_text(), re.MULTILINE)
