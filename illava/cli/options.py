"""Options that several commands have in common, and how a plan is said on a command line."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from illava.errors import DataError, PlanError
from illava.plan import INPUT, OUTPUT, Plan

REDUCTIONS = (0.0, 0.667, 0.778, 0.889)


class Engine(str, Enum):
    """What runs a large job."""

    process = "process"
    ray = "ray"


class Rule(str, Enum):
    """How tokens merge, as `illava.Plan` says it."""

    bipartite = "bipartite"
    recycle = "recycle"
    prune = "prune"
    linear = "linear"


_MODEL, _PLAN, _DATA, _JOB = "Model", "Plan", "Data", "Job"

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a checkpoint, or a name on the hub.")]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1; by default a GPU if there is one.", rich_help_panel=_MODEL),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="float32, bfloat16 or float16; by default the checkpoint's own on a GPU, float32 on a CPU.",
        rich_help_panel=_MODEL,
    ),
]
Attn = Annotated[
    str,
    typer.Option(help="sdpa, eager or flash_attention_2.", rich_help_panel=_MODEL),
]
Reduction = Annotated[
    float | None,
    typer.Option(
        help="Share of the visual tokens gone after the last merge: 0 for none; 0.667 by default.",
        rich_help_panel=_PLAN,
    ),
]
Reductions = Annotated[
    list[float] | None,
    typer.Option(
        "--reduction",
        help="Shares of the visual tokens to remove, as many as you like: --reduction 0 0.667 0.778 0.889.",
        rich_help_panel=_PLAN,
    ),
]
VitLayers = Annotated[
    str | None,
    typer.Option(
        help='Encoder blocks that merge, from 0: "7,15", or shares of the depth: "0.25,0.5"; "none"; '
        '"output" for what the last block puts out. By default the rule\'s own, see `illava models`.',
        rich_help_panel=_PLAN,
    ),
]
LlmLayers = Annotated[
    str | None,
    typer.Option(help='Decoder layers that merge, likewise: "2,8,14".', rich_help_panel=_PLAN),
]
EncoderShare = Annotated[
    float | None,
    typer.Option(
        help="Share of the removed tokens that the encoder removes; 0.6, or 0.4 where it ranks them.",
        rich_help_panel=_PLAN,
    ),
]
Merge = Annotated[
    Rule | None,
    typer.Option(
        help="bipartite (the default) makes one of tokens that are most alike; the others rank them by "
        "attention: recycle is the paper's rule, prune drops the rest, linear is its first version's.",
        rich_help_panel=_PLAN,
    ),
]
PlanFile = Annotated[
    Path | None,
    typer.Option(
        "--plan",
        metavar="FILE.json",
        help="A whole plan, as `illava plan --out` or `Plan.to_json()` writes it, instead of the above.",
        rich_help_panel=_PLAN,
    ),
]
PlanFiles = Annotated[
    list[Path] | None,
    typer.Option(
        "--plan",
        metavar="FILE.json",
        help="A whole plan, as `illava plan --out` writes it; may be given again and beside --reduction.",
        rich_help_panel=_PLAN,
    ),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Items answered together.", rich_help_panel=_JOB)]
Frames = Annotated[
    int,
    typer.Option(min=1, help="Frames of a video, spread evenly over it.", rich_help_panel=_DATA),
]
Prompt = Annotated[
    str,
    typer.Option(help="What is asked, of items that bring no prompt of their own.", rich_help_panel=_DATA),
]
Limit = Annotated[
    int | None,
    typer.Option(min=1, help="Take only the first so many items.", rich_help_panel=_DATA),
]
JobEngine = Annotated[
    Engine,
    typer.Option(
        help='process: here. ray: on many GPUs and machines, by Ray Data (pip install "illava[ray]").',
        rich_help_panel=_JOB,
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1, help="With ray: processes that hold a model; one for each GPU.", rich_help_panel=_JOB
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document instead of tables, for other programs.")
]


def spread(arguments: Sequence[str]) -> list[str]:
    """`--reduction 0 0.667` as `--reduction 0 --reduction 0.667`, which is how options repeat themselves."""
    result: list[str] = []
    several = False
    for argument in arguments:
        number = _is_number(argument)
        if several and number and result[-1] != "--reduction":
            result.append("--reduction")
        several = argument.partition("=")[0] == "--reduction" or (several and number)
        result.append(argument)
    return result


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def plan_of(
    reduction: float | None,
    vit_layers: str | None,
    llm_layers: str | None,
    encoder_share: float | None,
    merge: Rule | None = None,
    file: Path | None = None,
) -> Plan:
    """The plan that the options of a command say.

    Raises:
        PlanError: a value out of range, or a file and other options at once.
        DataError: a file that is none.
    """
    settings: dict[str, Any] = {
        "reduction": reduction,
        "vit_layers": _layers("--vit-layers", vit_layers, OUTPUT),
        "llm_layers": _layers("--llm-layers", llm_layers, INPUT),
        "encoder_share": encoder_share,
        "merge": None if merge is None else merge.value,
    }
    said = {name: value for name, value in settings.items() if value is not None}
    if file is None:
        return Plan(**said)
    if said:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in said)
        raise PlanError(f"--plan {file} says everything already; leave out {options}")
    return read_plan(file)


def plans_of(
    reductions: Sequence[float] | None,
    vit_layers: str | None,
    llm_layers: str | None,
    encoder_share: float | None,
    merge: Rule | None,
    files: Sequence[Path] | None,
) -> dict[str, Plan]:
    """The plans that the options of a command say, by name; those of `REDUCTIONS` where they say none.

    Raises:
        PlanError, DataError: as `plan_of`.
    """
    chosen = reductions if reductions or files else REDUCTIONS
    if files and not reductions:  # refuses a file and other options at once
        plan_of(None, vit_layers, llm_layers, encoder_share, merge, files[0])
    plans = {
        f"{100 * reduction:.6g} %": plan_of(reduction, vit_layers, llm_layers, encoder_share, merge)
        for reduction in chosen or ()
    }
    return plans | {str(file): read_plan(file) for file in files or ()}


def output_file(option: str, file: Path) -> Path:
    """A file that a command will write, its folder made: what took minutes is not lost for want of one.

    Raises:
        DataError: no file can be written there.
    """
    if file.is_dir():
        raise DataError(f"{option} {file} is a folder; give a file in it")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{option} {file}: its folder cannot be made: {error.strerror}") from error
    return file


def read_plan(file: Path) -> Plan:
    """A plan from a JSON file.

    Raises:
        PlanError: no plan in it.
        DataError: no such file.
    """
    try:
        return Plan.from_json(file.read_text())
    except OSError as error:
        raise DataError(f"--plan {file} cannot be read: {error.strerror}") from error
    except PlanError as error:
        raise PlanError(f"--plan {file}: {error}") from error


def _layers(option: str, text: str | None, place: str) -> tuple[Any, ...] | None:
    if text is None:
        return None
    if text.strip().lower() in ("none", ""):
        return ()
    layers: list[Any] = []
    for part in text.replace("-", ",").split(","):
        part = part.strip()
        if part == place:
            layers.append(place)
        elif _is_number(part):
            layers.append(int(part) if part.isdecimal() else float(part))
        else:
            raise PlanError(f'{option} "{text}": {part!r} is no layer; give for example "2,8,14", or "none"')
    return tuple(layers)
