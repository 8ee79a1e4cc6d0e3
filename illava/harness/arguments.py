"""Plans as command lines of harnesses say them: `vit_layers=5-9-13,llm_layers=2-8-14,reduction=0.778`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from illava.errors import PlanError
from illava.plan import PLAN_FIELDS, Plan

_MADE: dict[str, Callable[..., Plan]] = {
    "paper": Plan.paper,
    "release": Plan.release,
    "first_version": Plan.first_version,
}


def plan_for(arguments: Mapping[str, Any]) -> Plan | Callable[[Any], Plan]:
    """A plan as `plan_from_arguments` reads it, or what makes one when it is given the model.

    Args:
        arguments: `plan` may here name a function of your own as well, `module:function`; it is called with
            the model and the other arguments, and returns an `illava.Plan`.

    Raises:
        PlanError: no such function, and whatever `plan_from_arguments` raises.
    """
    module, colon, name = str(arguments.get("plan", "")).partition(":")
    if not colon or Path(str(arguments["plan"])).is_file():
        return plan_from_arguments(arguments)
    others = {key: value for key, value in arguments.items() if key != "plan"}
    try:
        return partial(getattr(import_module(module), name), **others)
    except (ImportError, AttributeError) as error:
        raise PlanError(
            f"plan={arguments['plan']!r} names no function: {error}; is its folder in PYTHONPATH?"
        ) from error


def plan_from_arguments(arguments: Mapping[str, Any]) -> Plan:
    """A plan from single values, each a text or what a harness made of it.

    Args:
        arguments: fields of `illava.Plan`. Layers and shares are numbers joined by `-` (`5-9-13`; `none` for
            none), as is a single number. `plan` names one to start from: `paper`, `release`,
            `first_version`, or a file that holds `Plan.to_json()`; other fields then change it.

    Raises:
        PlanError: a setting that does not exist, or a value that none can have.
    """
    arguments = dict(arguments)
    start = arguments.pop("plan", None)
    changes = {name: _value(name, value) for name, value in arguments.items()}
    if start is None:
        return Plan.from_dict(changes)
    if unknown := [name for name in changes if name not in PLAN_FIELDS]:
        return Plan.from_dict({name: changes[name] for name in unknown})  # says what was meant
    if start in _MADE:
        return _MADE[start](**changes)
    file = Path(str(start))
    if not file.is_file():
        raise PlanError(
            f"plan={start!r} is neither {', '.join(map(repr, _MADE))} nor a file; `plan.to_json()` writes one"
        )
    return Plan.from_dict({**Plan.from_json(file.read_text()).to_dict(), **changes})


def _value(name: str, value: Any) -> Any:
    if name in ("vit_layers", "llm_layers"):
        return _list(name, value, _number)
    if name in ("vit_shares", "llm_shares"):
        return _list(name, value, float)
    return value


def _number(text: str) -> int | float:
    return int(text) if text.isdecimal() else float(text)


def _list(name: str, value: Any, kind: Callable[[str], Any]) -> Any:
    if value is None or (isinstance(value, (list, tuple)) and not isinstance(value, str)):
        return value
    text = str(value).strip()
    if text.lower() in ("none", "()"):
        return ()
    try:
        return tuple(part if part in ("input", "output") else kind(part) for part in text.split("-"))
    except ValueError as error:
        raise PlanError(
            f"{name}={value!r} is no list; join numbers by -, for example {name}=5-9-13"
        ) from error
