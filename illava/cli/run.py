"""`illava run`: answers, one as it comes or a file of a million."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from illava.cli import options as o
from illava.cli.console import bar, busy, finishing, notes, out, print_json
from illava.plan import Plan

_HELP = """Ask a model about pictures and videos, with merging.

`illava run Qwen/Qwen2.5-VL-7B-Instruct --image cat.jpg --prompt "What is it doing?"` streams the answer,
and then shows what illava did, layer by layer. `--compare` shows the unpatched model's answer and times
beside it.

`illava run MODEL --data questions.jsonl --out answers.jsonl` answers a whole folder of pictures, or every
line of a JSONL file (`{"image": "cat.jpg", "prompt": "..."}`). Stopped or killed, the same command goes on
where it was; what cannot be read is recorded with the reason."""


def command(
    model: o.Model,
    image: Annotated[
        list[Path] | None, typer.Option(help="A picture; may be given again.", rich_help_panel="Data")
    ] = None,
    video: Annotated[
        list[Path] | None, typer.Option(help="A video; may be given again.", rich_help_panel="Data")
    ] = None,
    prompt: o.Prompt = "Describe the picture.",
    data: Annotated[
        Path | None,
        typer.Option(
            help="A folder or a JSONL file, instead of --image and --video.", rich_help_panel="Data"
        ),
    ] = None,
    frames: o.Frames = 16,
    limit: o.Limit = None,
    reduction: o.Reduction = None,
    vit_layers: o.VitLayers = None,
    llm_layers: o.LlmLayers = None,
    encoder_share: o.EncoderShare = None,
    merge: o.Merge = None,
    plan_file: o.PlanFile = None,
    max_new_tokens: o.MaxNewTokens = 256,
    compare: Annotated[bool, typer.Option("--compare", help="Show the unpatched model beside it.")] = False,
    results: Annotated[
        Path, typer.Option("--out", help="With --data: where the answers go.", rich_help_panel="Job")
    ] = Path("answers.jsonl"),
    batch_size: o.BatchSize = 8,
    engine: o.JobEngine = o.Engine.process,
    workers: o.Workers = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    attn: o.Attn = "sdpa",
    as_json: o.Json = False,
) -> None:
    if bool(image or video) == bool(data):
        raise typer.BadParameter("give --image or --video, or else --data")
    if data and compare:
        raise typer.BadParameter("--compare is for one prompt; for many, see `illava fidelity`")
    with finishing(f"{results} holds what was answered; the same command goes on" if data else ""):
        plan = o.plan_of(reduction, vit_layers, llm_layers, encoder_share, merge, plan_file)
        loading = {"device": device, "dtype": dtype, "attn": attn}
        if data:
            job: dict[str, Any] = {
                "batch_size": batch_size, "engine": engine.value, "workers": workers, "frames": frames
            }  # fmt: skip
            _many(model, data, prompt, limit, plan, max_new_tokens, loading, results, job, as_json)
        else:
            _one(
                model,
                image or [],
                video or [],
                prompt,
                frames,
                plan,
                max_new_tokens,
                loading,
                compare,
                as_json,
            )


command.__doc__ = _HELP


def _one(
    model: str, images: list[Path], videos: list[Path], prompt: str, frames: int, plan: Plan,
    max_new_tokens: int, loading: dict[str, Any], compare: bool, as_json: bool,
) -> None:  # fmt: skip
    from illava.cli.data import asked_item
    from illava.cli.tables import comparison_table
    from illava.evaluate import answers
    from illava.evaluate.loading import load
    from illava.evaluate.speed import calls

    item = asked_item(images, videos, prompt, frames)
    with busy(f"loading {model}"):
        loaded = load(model, **loading)
    if compare:
        with bar("answering", 2 + calls(1, 1, rounds=3)) as step:
            found = answers.compare(loaded, item, plan, max_new_tokens=max_new_tokens, progress=step)
        if as_json:
            print_json(loaded.to_dict() | {"prompt": prompt, "plan": plan.to_dict(), **found.to_dict()})
            return
        out.print(comparison_table(found))
        if found.patched.report is not None:
            out.print(str(found.patched.report), markup=False, highlight=False)
        return
    with ExitStack() as until_the_first_word:
        until_the_first_word.enter_context(busy("answering"))

        def show(text: str) -> None:
            until_the_first_word.close()
            out.print(text, end="", markup=False, highlight=False)

        said = answers.answer(
            loaded, item, plan, max_new_tokens=max_new_tokens, on_text=None if as_json else show
        )
    if as_json:
        print_json(loaded.to_dict() | {"prompt": prompt, "plan": plan.to_dict(), **said.to_dict()})
        return
    out.print()
    if said.report is None:
        notes.print("nothing was merged: the plan removes nothing")
    else:
        notes.print(str(said.report), markup=False)


def _many(
    model: str, data: Path, prompt: str, limit: int | None, plan: Plan, max_new_tokens: int,
    loading: dict[str, Any], results: Path, job: dict[str, Any], as_json: bool,
) -> None:  # fmt: skip
    from illava import jobs
    from illava.cli.data import first_items
    from illava.evaluate.answers import AnswerWork
    from illava.evaluate.loading import check

    check(model)  # before a worker finds out
    items = first_items(data, prompt, limit)
    summary = jobs.run(
        items,
        AnswerWork.factory(model, plan, max_new_tokens=max_new_tokens, **loading),
        results,
        settings={
            "model": model, "data": str(data.resolve()), "plan": plan.to_dict(), "prompt": prompt,
            "frames": job["frames"], "max_new_tokens": max_new_tokens, **loading,
        },
        console=notes,
        **job,
    )  # fmt: skip
    if as_json:
        print_json(
            {
                "results": str(summary.results), "answered": summary.answered, "skipped": summary.skipped,
                "failed": summary.failed, "before": summary.before, "seconds": summary.seconds,
            }
        )  # fmt: skip
    else:
        out.print(str(summary), markup=False, highlight=False)
