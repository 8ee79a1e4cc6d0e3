"""What illava runs, loads and depends on: nothing that came as data is ever run."""

import ast
import json
import re
import socket
import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.version import Version
from safetensors.torch import load_file

import tiny_checkpoint
from illava import Plan, evaluate
from illava.errors import CheckpointError
from illava.harness.answering import Answerer

try:
    import tomllib
except ImportError:  # Python 3.10, where pytest brings it along
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = sorted((ROOT / "illava").rglob("*.py"))
TOOLS = [path for folder in ("benchmarks", "examples") for path in sorted((ROOT / folder).rglob("*.py"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

UNPICKLING = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
OUTWARD = {
    "urllib", "urllib3", "http", "socket", "socketserver", "ssl", "ftplib", "smtplib", "xmlrpc", "webbrowser",
    "requests", "httpx", "aiohttp", "websockets", "huggingface_hub",
}  # fmt: skip
OSV = "api.osv.dev"
PROCESSES = {"subprocess", "multiprocessing", "os.system", "os.popen", "os.fork", "os.posix_spawn", "pty"}


def found(path):
    """Names of modules imported, functions called by their dotted names, and keywords given."""
    imported, called, keywords = set(), set(), {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
        elif isinstance(node, ast.Call):
            called.add(ast.unparse(node.func))
            keywords |= {k.arg: ast.unparse(k.value) for k in node.keywords}
    roots = imported | {name.split(".")[0] for name in imported}
    return roots, called, keywords


@pytest.mark.claim(
    "Safety", "trust_remote_code", "works", "illava's code and tools never set it (syntax tree)"
)
@pytest.mark.parametrize("path", PACKAGE + TOOLS, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_from_elsewhere_is_never_asked_for(path):
    assert "trust_remote_code" not in found(path)[2]
    spoken = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)]
    assert "trust_remote_code" not in [n.value for n in spoken], "not in a dict of arguments, either"


@pytest.mark.claim(
    "Safety",
    "pickle, eval, exec",
    "works",
    "illava's code and tools use none of them (syntax tree), but for one benchmark that compiles illava's "
    "own source",
)
@pytest.mark.parametrize("path", PACKAGE + TOOLS, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_came_as_data_is_run(path):
    imported, called, keywords = found(path)
    assert not imported & UNPICKLING
    if path.name == "trace_cost.py":  # compiles functions of illava without what records traces
        called -= {"compile", "exec"}
    assert not called & {"eval", "exec", "compile", "__import__", "torch.load", "torch.save", "yaml.load"}
    assert keywords.get("allow_pickle", "False") == "False"
    assert keywords.get("weights_only", "True") == "True"


def loads_of_models(path):
    """Calls of `from_pretrained` that are not of a config, processor or tokenizer."""
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    loads = [n for n in calls if ast.unparse(n.func).endswith(".from_pretrained")]
    return [n for n in loads if not re.search(r"(Config|Processor|Tokenizer)\.", ast.unparse(n.func))]


PICKLES = pytest.mark.claim(
    "Safety",
    "weights in pickles (.bin)",
    "refused",
    "CheckpointError by illava's commands and harnesses; its code and tools load with use_safetensors=True",
)


@PICKLES
@pytest.mark.parametrize("path", PACKAGE + TOOLS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_load_of_weights_is_of_safetensors(path):
    loads = loads_of_models(path)
    assert all("use_safetensors=True" in [ast.unparse(k) for k in n.keywords] for n in loads)
    assert loads or path.name not in ("weights.py", "compare.py"), "the rule sees them"


@PICKLES
@pytest.mark.parametrize("load", [evaluate.load, lambda folder: Answerer.load(folder, Plan())])
def test_weights_in_a_pickle_are_refused(load, tmp_path):
    folder = tiny_checkpoint.build(tmp_path / "tiny")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    load(folder)  # safetensors are there as well
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"in pytorch_model\.bin; illava loads safetensors only"):
        load(folder)
    index = folder / "model.safetensors.index.json"  # that leads elsewhere
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model.bin"}}))
    with pytest.raises(CheckpointError, match=r"json has its weights in pytorch_model\.bin; illava loads"):
        load(folder)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="is no index of weights"):
        load(folder)


@pytest.mark.claim(
    "Safety",
    "network and processes",
    "works",
    "its own code imports nothing that opens or starts any (syntax tree); transformers, Gradio and Ray do "
    "when asked: a model of the hub, illava demo, --engine ray",
)
@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_package_itself_talks_to_nobody(path):
    imported, called, _ = found(path)
    assert not imported & (OUTWARD | PROCESSES)
    assert not called & PROCESSES


def test_the_rules_above_notice(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text(
        "import pickle\nfrom urllib import request\neval('1')\nf(trust_remote_code=True)\ntorch.load(x)\n"
    )
    imported, called, keywords = found(path)
    assert {"pickle", "urllib"} <= imported
    assert {"eval", "torch.load"} <= called
    assert keywords["trust_remote_code"] == "True"


# ---------------------------------------------------------------- dependencies


def bounds(requirement):
    return {s.operator: Version(s.version) for s in Requirement(requirement).specifier}


@pytest.mark.claim(
    "Supply", "dependencies are bounded", "works",
    "pyproject names both ends of each; .ci/run installs both and runs the tests",
)  # fmt: skip
@pytest.mark.parametrize("requirement", PROJECT["dependencies"])
def test_every_dependency_has_both_ends_and_ci_proves_them(requirement):
    """The upper end is the newest that pip finds, which CI's first environment gets; the lower is pinned."""
    own, name = bounds(requirement), Requirement(requirement).name
    assert set(own) == {">=", "<"}, "a lower bound and an upper one"
    pinned = dict(re.findall(r'"([a-z]+)==([\d.]+)"', (ROOT / ".ci/run").read_text()))
    assert Version(pinned[name]) == own[">="]
    assert own[">="] <= Version(metadata.version(name)) < own["<"]


EXTRAS = PROJECT["optional-dependencies"]
OF_EXTRAS = sorted({r for extra in EXTRAS.values() for r in extra if Requirement(r).name != PROJECT["name"]})
NOT_IN_CI = {"qwen", "flash"}


def with_their_own(extras):
    """These extras and those they bring along."""
    seen, queue = set(), list(extras)
    while queue:
        if (extra := queue.pop()) not in seen:
            seen.add(extra)
            wanted = map(Requirement, EXTRAS[extra])
            queue += [more for r in wanted if r.name == PROJECT["name"] for more in r.extras]
    return seen


@pytest.mark.claim(
    "Supply", "dependencies of extras are bounded", "works",
    "pyproject names both ends of each; .ci/run installs the newest alone, and not those of qwen and flash",
)  # fmt: skip
@pytest.mark.parametrize("requirement", OF_EXTRAS)
def test_what_extras_bring_has_both_ends(requirement):
    own, name = bounds(requirement), Requirement(requirement).name
    assert set(own) == {">=", "<"}, "a lower bound and an upper one"
    assert [r for r in OF_EXTRAS if Requirement(r).name == name] == [requirement], "the same in all extras"
    with suppress(metadata.PackageNotFoundError):  # an extra may not be installed here
        assert own[">="] <= Version(metadata.version(name)) < own["<"]


def test_ci_installs_the_other_extras():
    commands = "".join((ROOT / name).read_text() for name in (".ci/run", "README.md"))
    installed = re.findall(r'^ *pip install .*-e "\.\[([a-z,-]+)\]"', commands, re.MULTILINE)
    assert with_their_own(",".join(installed).split(",")) == EXTRAS.keys() - NOT_IN_CI


# Licences that let a user do with illava what its own (Apache-2.0) lets them. NVIDIA's wheels, which the CUDA
# build of torch brings along, are proprietary: free to use, not to pass on.
FREE = r"MIT|BSD|Apache|PSF|Python Software Foundation|ISC|MPL|Mozilla|Unlicense|Zlib|CNRI|HPND|0BSD"


def closure(names):
    """Everything that installing these without extras brings along, here."""
    seen, queue = set(), list(names)
    while queue:
        requirement = Requirement(queue.pop())
        name = requirement.name.lower().replace("_", "-")
        marker = requirement.marker
        if name in seen or (marker and not marker.evaluate(default_environment() | {"extra": ""})):
            continue
        seen.add(name)
        queue += metadata.requires(name) or []
    return sorted(seen)


def licence(name):
    about = metadata.metadata(name)
    said = [about.get("License-Expression") or "", (about.get("License") or "")[:300]]
    return " ".join([*said, *(c for c in about.get_all("Classifier") or [] if c.startswith("License"))])


@pytest.mark.claim("Supply", "licences", "works", "of everything that `pip install illava` brings (metadata)")
def test_licences_of_everything_that_comes_along():
    names = closure(PROJECT["dependencies"])
    assert {"torch", "transformers", "rich", "safetensors", "tokenizers", "numpy"} <= set(names)
    others = {name: licence(name) for name in names if not re.search(FREE, licence(name), re.IGNORECASE)}
    unknown = {name: said for name, said in others.items() if not name.startswith(("nvidia-", "cuda-"))}
    assert not unknown, "not known to be free: look, and say so here"


@pytest.mark.slow
@pytest.mark.claim(
    "Supply", "known vulnerabilities", "works", "pip-audit finds none in what `pip install illava` brings"
)
def test_no_known_vulnerability(tmp_path):
    """Asks osv.dev, the only test that asks anybody; where it cannot be reached, nothing is known."""
    try:
        socket.create_connection((OSV, 443), timeout=5).close()
    except OSError as error:
        pytest.skip(f"pip-audit's data at {OSV} cannot be reached from here ({type(error).__name__})")
    asked = tmp_path / "requirements.txt"
    versions = {name: Version(metadata.version(name)).public for name in closure(PROJECT["dependencies"])}
    asked.write_text("".join(f"{name}=={version}\n" for name, version in versions.items()))
    command = ["-m", "pip_audit", "-s", "osv", "--no-deps", "--disable-pip", "-r", asked, "-f", "json"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)
    assert done.stdout, done.stderr
    audited = {row["name"]: row for row in json.loads(done.stdout)["dependencies"]}
    assert {"torch", "transformers"} <= audited.keys()
    assert {name: row["vulns"] for name, row in audited.items() if row.get("vulns")} == {}
