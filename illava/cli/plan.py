"""`illava plan`: the plan to take, found on your own data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from illava.cli import options as o
from illava.cli.console import busy, finishing, notes, out, print_json, stages, stopped

_HELP = """Find the plan for your model, your data and your patience.

`illava plan MODEL --data questions.jsonl --min-agreement 0.98` searches encoder blocks and their rule,
decoder layers, shares and reductions for the cheapest plan under which 98 % of the answers stay the same,
word for word. With 40 items or more, half of them choose the plan and the other half confirm it.

`--speedup 2` asks for the plan that keeps most among those whose prefill needs half the operations;
`--max-tokens 512` among those that leave at most 512 visual tokens of a prompt.

Prints the plan as Python and as JSON, which `illava.patch(model, plan=...)` and `--plan FILE.json` read
back, and times it against the unpatched model and against the default plan at equal agreement."""


def command(
    model: o.Model,
    data: Annotated[
        Path,
        typer.Option(help="A folder of pictures, or a JSONL file with questions.", rich_help_panel="Data"),
    ],
    min_agreement: Annotated[
        float | None,
        typer.Option(help="Least share of answers that stay the same.", rich_help_panel="Target (one)"),
    ] = None,
    speedup: Annotated[
        float | None,
        typer.Option(help="How many times fewer operations of the prefill.", rich_help_panel="Target (one)"),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Most visual tokens left of a prompt.", rich_help_panel="Target (one)"),
    ] = None,
    prompt: o.Prompt = "Describe the picture.",
    frames: o.Frames = 16,
    limit: o.Limit = 100,
    max_new_tokens: o.MaxNewTokens = 64,
    batch_size: o.BatchSize = 8,
    rounds: Annotated[int, typer.Option(min=0, help="Rounds of timing the plan; 0 for none.")] = 5,
    file: Annotated[
        Path | None, typer.Option("--out", metavar="FILE.json", help="Also write the plan's JSON there.")
    ] = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    attn: o.Attn = "sdpa",
    as_json: o.Json = False,
) -> None:
    if [min_agreement, speedup, max_tokens].count(None) != 2:
        raise typer.BadParameter("give exactly one of --min-agreement, --speedup and --max-tokens")
    with finishing():
        from illava.cli.data import readable_items
        from illava.cli.tables import plan_table
        from illava.evaluate.found import describe
        from illava.evaluate.loading import load
        from illava.evaluate.plan_search import check_target, find_plan

        target: dict[str, Any] = {
            "min_agreement": min_agreement,
            "speedup": speedup,
            "max_tokens": max_tokens,
        }
        check_target(target)
        if file is not None:
            o.output_file("--out", file)
        items = readable_items(data, prompt, limit, frames)
        with busy(f"loading {model}"):
            loaded = load(model, device=device, dtype=dtype, attn=attn)
        with stages("searching") as step:
            found = find_plan(
                loaded, items, **target, max_new_tokens=max_new_tokens, batch_size=batch_size, rounds=rounds,
                progress=step,
            )  # fmt: skip
        plan = found.best.plan
        if file is not None:
            file.write_text(plan.to_json() + "\n")
        if as_json:
            asked = {name: value for name, value in target.items() if value is not None}
            said = {"plan": plan.to_dict(), "python": describe(plan)}
            print_json(loaded.to_dict() | {"target": asked} | said | found.to_dict())
        else:
            out.print(plan_table(found))
            if (faster := found.faster_than_default) is not None:
                out.print(f"{faster:.2f} times faster than the default at equal agreement, measured")
            out.print(f"\n{describe(plan)}", markup=False, highlight=False, soft_wrap=True)
            out.print(plan.to_json(), markup=False, highlight=False, soft_wrap=True)
        if not found.unseen and not found.interrupted:
            notes.print(
                f"few items: the {found.items} answers that chose the plan also count its agreement, which "
                "flatters it; give 40 or more"
            )
        if file is not None:
            notes.print(f"written to {file}", markup=False, soft_wrap=True)
        if found.interrupted:
            stopped(
                "this is the best plan by then" if found.unseen else "the best by then, on data that chose it"
            )


command.__doc__ = _HELP
