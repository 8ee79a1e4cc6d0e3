"""`illava fidelity`: whether answers stay the same, without labels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from illava.cli import options as o
from illava.cli.console import busy, finishing, notes, out, print_json, stopped
from illava.plan import Plan

_HELP = """Do the answers stay the same? No labels needed.

`illava fidelity MODEL --data questions.jsonl --reduction 0.667 0.889`: the unpatched model answers once,
and each plan is held against it: how often the answer is the same, word for word and but for capitals,
punctuation and articles; which share of its tokens the patched model would have chosen as well (teacher
forcing); how far its next-token distributions are off (KL divergence, in nats). All with 95 % intervals.

`--out` gets a line for every item (stopped or killed, the same command goes on where it was), and beside
it, as `.disagreements.jsonl`, a line for every answer that changed, with its pictures, the largest changes
first."""


def command(
    model: o.Model,
    data: Annotated[
        Path, typer.Option(help="A folder of pictures, or a JSONL file.", rich_help_panel="Data")
    ],
    prompt: o.Prompt = "Describe the picture.",
    frames: o.Frames = 16,
    limit: o.Limit = None,
    reduction: o.Reductions = None,
    vit_layers: o.VitLayers = None,
    llm_layers: o.LlmLayers = None,
    encoder_share: o.EncoderShare = None,
    merge: o.Merge = None,
    plan_files: o.PlanFiles = None,
    max_new_tokens: o.MaxNewTokens = 64,
    results: Annotated[
        Path, typer.Option("--out", help="Where the results go.", rich_help_panel="Job")
    ] = Path("fidelity.jsonl"),
    batch_size: o.BatchSize = 8,
    engine: o.JobEngine = o.Engine.process,
    workers: o.Workers = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    attn: o.Attn = "sdpa",
    as_json: o.Json = False,
) -> None:
    with finishing():
        plans = o.plans_of(reduction, vit_layers, llm_layers, encoder_share, merge, plan_files)
        from illava import jobs
        from illava.cli.data import first_items
        from illava.evaluate.loading import check
        from illava.evaluate.quality import FidelityWork

        check(model)  # before a worker finds out
        loading = {"device": device, "dtype": dtype, "attn": attn}
        named = {name: plan.to_dict() for name, plan in plans.items()}
        interrupted = False
        try:
            jobs.run(
                first_items(data, prompt, limit),
                FidelityWork.factory(model, plans, max_new_tokens=max_new_tokens, **loading),
                results,
                batch_size=batch_size, engine=engine.value, workers=workers, frames=frames, console=notes,
                settings={
                    "model": model, "data": str(data.resolve()), "plans": named, "prompt": prompt,
                    "frames": frames, "max_new_tokens": max_new_tokens, **loading,
                },
            )  # fmt: skip
        except KeyboardInterrupt:
            interrupted = True
        if interrupted and not (results.exists() and results.stat().st_size):
            stopped("nothing was finished yet")
        _show(results, plans, model, as_json)
        if interrupted:
            stopped(f"{results} holds what was finished; the same command goes on")


command.__doc__ = _HELP


def _show(results: Path, plans: dict[str, Plan], model: str, as_json: bool) -> None:
    from illava.cli.tables import fidelity_table
    from illava.evaluate.quality import read_records, summarise, write_disagreements

    differing = results.with_suffix(".disagreements.jsonl")
    with busy("summing up"):
        found = summarise(read_records(results), plans)
        write_disagreements(found, differing)
    if as_json:
        files: dict[str, Any] = {"results": str(results), "disagreements_file": str(differing)}
        print_json({"model": model} | found.to_dict() | files)
        return
    out.print(fidelity_table(found, model))
    for skipped in found.skipped[:5]:
        notes.print(f"left out: {skipped['source']}: {skipped['reason']}", markup=False, soft_wrap=True)
    if (more := len(found.skipped) - 5) > 0:
        notes.print(f"left out: {more} more, see {results}", markup=False, soft_wrap=True)
    notes.print(
        f"{len(found.disagreements)} answers that changed are in {differing}", markup=False, soft_wrap=True
    )
