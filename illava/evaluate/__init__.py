"""What a model, a plan and your own pictures make of each other: answers, speed, fidelity, and the plan to
take.

    from illava import evaluate, jobs
    loaded = evaluate.load("Qwen/Qwen2.5-VL-7B-Instruct")
    items = list(jobs.read_items("pictures/", prompt="What is in the picture?"))
    print(evaluate.fidelity(loaded, items, {"77.8 %": illava.Plan(reduction=0.778)}).agreement)

The commands of `illava --help` are these functions with a table around them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from illava.evaluate.agreement import Agreement, Held
    from illava.evaluate.answers import Answer, AnswerWork, Comparison, answer, compare
    from illava.evaluate.found import Found
    from illava.evaluate.loading import Loaded, load
    from illava.evaluate.plan_search import find_plan
    from illava.evaluate.prompts import build_inputs
    from illava.evaluate.quality import Fidelity, FidelityWork, fidelity, read_records, summarise
    from illava.evaluate.speed import Bench, bench
    from illava.evaluate.statistics import Estimate
    from illava.evaluate.synthetic import noise_inputs

_HOME = {
    "Agreement": "agreement",
    "Answer": "answers",
    "AnswerWork": "answers",
    "Bench": "speed",
    "Comparison": "answers",
    "Estimate": "statistics",
    "Fidelity": "quality",
    "FidelityWork": "quality",
    "Found": "found",
    "Held": "agreement",
    "Loaded": "loading",
    "answer": "answers",
    "bench": "speed",
    "build_inputs": "prompts",
    "compare": "answers",
    "fidelity": "quality",
    "find_plan": "plan_search",
    "load": "loading",
    "noise_inputs": "synthetic",
    "read_records": "quality",
    "summarise": "quality",
}

__all__ = [
    "Agreement",
    "Answer",
    "AnswerWork",
    "Bench",
    "Comparison",
    "Estimate",
    "Fidelity",
    "FidelityWork",
    "Found",
    "Held",
    "Loaded",
    "answer",
    "bench",
    "build_inputs",
    "compare",
    "fidelity",
    "find_plan",
    "load",
    "noise_inputs",
    "read_records",
    "summarise",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'illava.evaluate' has no attribute {name!r}")
    return getattr(import_module(f"illava.evaluate.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
