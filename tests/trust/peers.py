"""The common model tests that transformers ships with its source, run against small models of the zoo.

transformers' wheel has no tests, its source has: a checkout of its repository, or what
`pip download --no-deps --no-binary :all: transformers==VERSION` unpacks to, of the version installed. None of
it is part of illava; `ILLAVA_TRANSFORMERS_SOURCE` names the folder.
"""

from __future__ import annotations

import copy
import importlib
import os
import sys
import types
import unittest
from pathlib import Path

import torch
import transformers

import zoo
from contract import tools

VARIABLE = "ILLAVA_TRANSFORMERS_SOURCE"
PACKAGE = "transformers_source_tests"


def why_not() -> str | None:
    """Why they cannot be run, for a person who reads the skip; `None` if they can."""
    folder = os.environ.get(VARIABLE)
    how = (
        f"`pip download --no-deps --no-binary :all: transformers=={transformers.__version__}`, unpack, set it"
    )
    if not folder:
        return f"{VARIABLE} names no folder with transformers' source: {how}"
    if not (Path(folder) / "tests/test_modeling_common.py").is_file():
        return f"{VARIABLE}={folder} has no tests/test_modeling_common.py: {how}"
    if importlib.util.find_spec("parameterized") is None:
        return "transformers' own tests need the package parameterized: pip install parameterized"
    return None


def mixin() -> type:
    """`ModelTesterMixin`. What pip downloads lacks two mixins that it imports; they are empty then."""
    if PACKAGE not in sys.modules:
        package = types.ModuleType(PACKAGE)
        package.__path__ = [str(Path(os.environ[VARIABLE]) / "tests")]
        sys.modules[PACKAGE] = package
        for name, needed in (
            ("exporters.test_export", "ExportTesterMixin"),
            ("generation.test_utils", "GenerationTesterMixin"),
        ):
            if (Path(package.__path__[0]) / name.split(".")[0]).is_dir():
                continue
            parent = types.ModuleType(f"{PACKAGE}.{name.split('.')[0]}")
            parent.__path__ = []
            module = types.ModuleType(f"{PACKAGE}.{name}")
            setattr(module, needed, type(needed, (), {}))
            sys.modules |= {parent.__name__: parent, module.__name__: module}
    return importlib.import_module(f"{PACKAGE}.test_modeling_common").ModelTesterMixin


def mixins() -> list[str]:
    """The mixins with tests in them, of those that `mixin()` inherits."""
    return sorted(k.__name__ for k in mixin().__mro__ if any(name.startswith("test_") for name in vars(k)))


class Tester:
    """What the mixin asks of a family: a config and inputs that fit it."""

    is_training, has_attentions = True, True

    def __init__(self, family: str) -> None:
        self.family = zoo.FAMILIES[family]
        picture = tools.pictures_of(self.family.KINDS["one picture"])[0]
        self.inputs = self.family.prompt([3, picture, 4], [3, picture, 4], seeds=[0, 1])
        self.config = self.family.build().config
        self.batch_size, self.seq_length = self.inputs["input_ids"].shape
        self.num_hidden_layers = self.config.get_text_config().num_hidden_layers
        self.hidden_size = self.config.get_text_config().hidden_size
        self.num_attention_heads = self.config.get_text_config().num_attention_heads

    def get_config(self):
        return copy.deepcopy(self.config)

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), copy.deepcopy(self.inputs)


def case(family: str, settings: dict | None) -> type[unittest.TestCase]:
    """The family's test case, whose models are patched as they are made; `None` leaves them alone."""
    plain = type(zoo.FAMILIES[family].build())
    classes = (plain,)
    if settings is not None:

        def init(self, *args, **kwargs):
            plain.__init__(self, *args, **kwargs)
            tools.patch(self, family, **settings)

        # The same name and module: transformers looks both up.
        classes = (type(plain.__name__, (plain,), {"__init__": init, "__module__": plain.__module__}),)

    def set_up(self):
        torch.manual_seed(0)
        self.model_tester = Tester(family)

    body = {"all_model_classes": classes, "setUp": set_up, "_is_composite": True}
    return type("Peers", (mixin(), unittest.TestCase), body)


def names(family: str = "") -> list[str]:
    return sorted(
        name for name in dir(mixin()) if name.startswith("test_") and callable(getattr(mixin(), name))
    )


def run(family: str, name: str, settings: dict | None) -> str:
    """`"passed"`, or why not."""
    result = unittest.TestResult()
    case(family, settings)(name).run(result)
    for kind, found in (("failed", result.failures), ("failed", result.errors)):
        if found:
            return f"{kind}: {found[0][1].strip().splitlines()[-1]}"
    if result.skipped:
        return f"skipped: {result.skipped[0][1]}"
    return "passed"
