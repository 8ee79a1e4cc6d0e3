"""`illava bench`: time and memory under each plan, beside the unpatched model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from illava.cli import options as o
from illava.cli.console import bar, busy, finishing, notes, out, print_json, stopped
from illava.errors import DataError, MissingExtraError

_HELP = """How much faster, and how much smaller, on your own pictures.

`illava bench MODEL --image pictures/ --reduction 0 0.667 0.778 0.889` times the unpatched model and each
plan in turns, prints a table and draws it. A ratio of 2.00x means twice as fast, or half as large, as the
unpatched model in the same rounds; the bound is what the plan's operations allow, if time were operations
alone.

`illava bench FOLDER --random-weights` needs no weights, only a config.json: speed does not depend on them.
Without a processor, or without pictures, the model is shown a picture of noise, of `--size`."""


def command(
    model: o.Model,
    image: Annotated[
        Path | None,
        typer.Option(help="A picture, or a folder of pictures and videos.", rich_help_panel="Data"),
    ] = None,
    size: Annotated[
        str,
        typer.Option(
            metavar="HEIGHTxWIDTH", help="Of the picture of noise that stands in.", rich_help_panel="Data"
        ),
    ] = "896x896",
    prompt: o.Prompt = "Describe the picture.",
    frames: o.Frames = 16,
    limit: o.Limit = 8,
    reduction: o.Reductions = None,
    vit_layers: o.VitLayers = None,
    llm_layers: o.LlmLayers = None,
    encoder_share: o.EncoderShare = None,
    merge: o.Merge = None,
    plan_files: o.PlanFiles = None,
    random_weights: Annotated[
        bool,
        typer.Option(
            "--random-weights", help="Build the model from its config alone.", rich_help_panel="Model"
        ),
    ] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 5,
    new_tokens: Annotated[
        int, typer.Option(min=0, help="Also decode so many tokens, and count how fast.")
    ] = 0,
    batch_size: o.BatchSize = 1,
    plot: Annotated[
        Path, typer.Option(help="Where the plot goes: .png, .svg or .pdf; needs illava[evaluate].")
    ] = Path("bench.png"),
    device: o.Device = None,
    dtype: o.Dtype = None,
    attn: o.Attn = "sdpa",
    as_json: o.Json = False,
) -> None:
    with finishing():
        plans = o.plans_of(reduction, vit_layers, llm_layers, encoder_share, merge, plan_files)
        height, width = _sides(size)
        o.output_file("--plot", plot)
        if plot.suffix.lower() not in (".png", ".svg", ".pdf"):
            raise DataError(f"--plot {plot} does not say what to draw; give a path in .png, .svg or .pdf")
        from illava.cli.tables import bench_table
        from illava.evaluate.loading import load
        from illava.evaluate.speed import bench, calls

        with busy(f"loading {model}"):
            loaded = load(model, device=device, dtype=dtype, attn=attn, random_weights=random_weights)
        inputs, shown = _inputs(loaded, image, (height, width), prompt, frames, limit, batch_size)
        total = calls(len(inputs), len(plans), rounds=rounds, new_tokens=new_tokens)
        with bar("warming up", total) as step:
            result = bench(loaded, inputs, plans, rounds=rounds, new_tokens=new_tokens, progress=step)
        if as_json:
            print_json(result.to_dict() | {"shown": shown, "plot": _draw(result, plot)})
        else:
            out.print(bench_table(result, shown))
            if drawn := _draw(result, plot):
                notes.print(f"drawn in {drawn}", markup=False, soft_wrap=True)
        if result.interrupted:
            stopped(f"the figures are of the {result.rounds} rounds that were finished")


command.__doc__ = _HELP


def _inputs(
    loaded: Any, image: Path | None, size: tuple[int, int], prompt: str, frames: int, limit: int | None,
    batch_size: int,
) -> tuple[list[Any], str]:  # fmt: skip
    """Inputs of `generate`, and what they are."""
    from illava.cli.data import readable_items
    from illava.evaluate.prompts import batches, build_inputs
    from illava.evaluate.synthetic import noise_inputs, repeated

    if image is None:
        with busy("making a picture of noise"):
            shown, tokens = noise_inputs(loaded.model, size)
        what = f"a picture of noise, {size[0]} x {size[1]} pixels asked for, {tokens:,} visual tokens"
        return [repeated(shown, batch_size)], what
    if loaded.processor is None:
        raise DataError(
            f"{loaded.name} has no processor to show {image} with; leave --image out for a picture of "
            "noise, or copy its preprocessor_config.json and tokenizer.json there"
        )
    items = readable_items(image, prompt, limit, frames)
    groups = list(batches(items, batch_size))
    with bar("preparing", len(groups)) as step:
        inputs = []
        for group in groups:
            step("preparing")
            inputs.append(build_inputs(loaded, group))
    return inputs, f"{len(items)} of {image}" if len(items) > 1 else items[0].source


def _draw(result: Any, path: Path) -> str | None:
    from illava.evaluate.plot import plot

    if not any(row.figures for row in result.rows[1:]):
        return None
    try:
        return str(plot(result, path))
    except MissingExtraError as missing:
        notes.print(f"no plot: {missing}", markup=False, soft_wrap=True)
        return None


def _sides(size: str) -> tuple[int, int]:
    height, _, width = size.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise DataError(f"--size {size} is no size in pixels; give for example 896x1344, height first")
    return int(height), int(width)
