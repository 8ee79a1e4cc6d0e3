"""How fast models of true sizes get, stage by stage, beside other ways to spend as few visual tokens.

    python benchmarks/speed.py --device cuda             # true sizes; hours, most important first
    python benchmarks/speed.py --device cuda --budget 300   # what five minutes hold; run again to go on
    python benchmarks/speed.py                           # a CPU, reduced sizes, under ten minutes
    python benchmarks/speed.py --show                    # measure nothing: table and plot of what is there
    python benchmarks/speed.py --markdown benchmarks/speed_readme.md

Weights are random and made on the device: nothing is downloaded, and time does not depend on what they say.
Figures go into a CSV as they are measured, one row each; a run goes on where the last one stopped, and skips
what was measured with the same versions on the same device. After a change of code, name another file.

In each round the unpatched model is timed before and after every few arms, and a ratio is taken to the mean
of the two, so that a busy machine slows both sides. Ratios say how many times better than unpatched: faster,
or smaller. Bounds are the plan's: operations for times (`handle.report.flops`), its token counts for memory.

    encoder_ms   the vision encoder and its projector
    llm_ms       decoder layers and the head for one token, a cache written
    ttft_ms      end to end, from pixels on the device to the first token's number on the host
    decode       tokens of all rows per second, median over the steps of one `generate`
    requests     rows per second of that `generate`, prefill included
    kv_cache, peak_memory    as measured, and `_by_plan` as the plan's arithmetic has them
    own_share    of a prefill, inside illava's own hooks and statistics

A case that runs out of memory, or out of its time, is written down as such, and the run goes on.
"""

from __future__ import annotations

import argparse
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from speed_cases import EARLY, MODELS_FIRST, RIVALS, SMALLER_MODEL, Arm, Case, all_cases, arms_of
from speed_figures import figures, tokens_of
from speed_inputs import CONTENTS
from speed_models import MODELS
from speed_rows import LIMIT, OK, OOM, Rows, environment, identity
from speed_run import Models, Settings, Trial, run_case

RESULTS = Path(__file__).parent / "results"
ATTENTIONS = ("sdpa", "flash_attention_2", "flash_attention_3")
ALL_REDUCTIONS = (0.0, 0.5, 0.667, 0.778, 0.889, 0.95)
# Defaults by device, and for tests.
DEFAULTS = {
    "cuda": {
        "size": "full",
        "dtype": "bfloat16",
        "models": MODELS_FIRST,
        "contents": CONTENTS,
        "tokens": (256, 1024, 4096, 16384),
        "batches": (1, 8),
        "pictures": 8,
        "frames": 64,
        "reductions": ALL_REDUCTIONS,
        "rivals": tuple(RIVALS),
        "rivals_at": (0.667, 0.778, 0.889),
        "text": 64,
        "threads": 8,
        "new_tokens": 128,
        "rounds": 10,
        "warmup": 2,
        "limit": 300.0,
    },
    "cpu": {
        "size": "reduced",
        "dtype": "float32",
        "models": MODELS_FIRST,
        "contents": CONTENTS,
        "tokens": (256, 1024),
        "batches": (1, 2),
        "pictures": 4,
        "frames": 4,
        "reductions": ALL_REDUCTIONS,
        "rivals": tuple(RIVALS),
        "rivals_at": (0.889,),
        "text": 32,
        "threads": 2,
        "new_tokens": 8,
        "rounds": 3,
        "warmup": 1,
        "limit": 60.0,
    },
    "quick": {
        "size": "quick",
        "dtype": "float32",
        "models": ("qwen2.5-vl-7b",),
        "contents": ("picture",),
        "tokens": (64,),
        "batches": (1,),
        "pictures": 2,
        "frames": 4,
        "reductions": (0.0, 0.889),
        "rivals": (EARLY, "FastV", "VisionZip", SMALLER_MODEL),
        "rivals_at": (0.889,),
        "text": 16,
        "threads": 1,
        "new_tokens": 3,
        "rounds": 2,
        "warmup": 1,
        "limit": 30.0,
    },
}


def importable(attn: str) -> bool:
    """Whether an attention implementation can run here."""
    module = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}.get(attn)
    return module is None or find_spec(module) is not None


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Encoder, prefill, first token, decoding and memory, patched against unpatched.",
        epilog="Defaults depend on --device and --quick; see DEFAULTS in this file.",
    )
    add = parser.add_argument
    add("--device", default="cpu")
    add("--quick", action="store_true", help="one tiny model, a minute at most: whether it runs at all")
    add("--size", choices=("full", "reduced", "quick"), help="of the models")
    add("--dtype", choices=("float32", "bfloat16", "float16"))
    add("--models", nargs="+", choices=tuple(MODELS))
    add("--attn", nargs="+", choices=ATTENTIONS, help="default: all that are importable; sdpa on a CPU")
    add("--contents", nargs="+", choices=CONTENTS)
    add("--tokens", nargs="+", type=int, help="visual tokens of a prompt, as near as the family can")
    add("--batches", nargs="+", type=int)
    add("--pictures", type=int, help="how many `pictures` are")
    add("--frames", type=int, help="of a video")
    add("--reductions", nargs="+", type=float)
    add("--rivals", nargs="*", choices=tuple(RIVALS))
    add("--rivals-at", nargs="+", type=float, help="reductions at which rivals are measured")
    add("--text", type=int, help="text tokens of a prompt")
    add("--new-tokens", type=int, help="tokens to generate; 0 leaves decoding out")
    add("--rounds", type=int)
    add("--warmup", type=int)
    add("--decode-rounds", type=int, default=1)
    add("--limit", type=float, help="seconds a case may take before its rounds are cut")
    add("--budget", type=float, default=float("inf"), help="seconds after which no further case begins")
    add("--threads", type=int, help="of torch, on a CPU")
    add("--csv", type=Path, help="default: benchmarks/results/speed_<device>.csv")
    add("--plot", type=Path, help="without a suffix; default: beside the CSV, .png and .svg")
    add("--markdown", type=Path, help="write the block for the README; measures nothing")
    add("--show", action="store_true", help="measure nothing: table and plot of what the CSV holds")
    add("--inject-oom", default="", metavar="ARM", help="for tests: this arm runs out of memory")
    options = parser.parse_args(arguments)
    cuda = options.device.startswith("cuda")
    defaults = DEFAULTS["quick" if options.quick else "cuda" if cuda else "cpu"]
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.attn is None:
        options.attn = [a for a in ATTENTIONS if importable(a)] if cuda else ["sdpa"]
    wrong = [a for a in options.attn if not importable(a) or (a != "sdpa" and not cuda)]
    if wrong:
        parser.error(f"{', '.join(wrong)} cannot run here")
    if any(not 0 <= r < 1 for r in (*options.reductions, *options.rivals_at)):
        parser.error("a reduction is a share of the tokens, from 0 up to below 1")
    if options.csv is None:
        kind = options.device.split(":")[0]
        options.csv = RESULTS / f"speed_{kind}{'_quick' if options.quick else ''}.csv"
    if options.plot is None:
        options.plot = options.csv.with_suffix("")
    return options


def plan_work(
    options: argparse.Namespace, rows: Rows, setting: dict[str, str]
) -> list[tuple[Case, list[Arm]]]:
    """Cases in order of importance, each with the arms that are not in the CSV yet."""
    cases = all_cases(
        options.models,
        options.attn,
        options.contents,
        options.tokens,
        options.batches,
        options.pictures,
        options.frames,
    )
    work = []
    for case in cases:
        smaller = MODELS[case.model].smaller is not None
        arms = arms_of(case, options.reductions, options.rivals, options.rivals_at, smaller)
        arms = [arm for arm in arms if not rows.done(_key(setting, case, arm, options))]
        if arms:
            work.append((case, arms))
    return work


def _key(setting: dict[str, str], case: Case, arm: Arm, options: argparse.Namespace) -> dict[str, str]:
    return setting | identity(case, arm, options.text, options.new_tokens)


def measure(options: argparse.Namespace, rows: Rows, setting: dict[str, str], console: Console) -> int:
    """Work through the cases; returns how many are left when the budget is spent."""
    work = plan_work(options, rows, setting)
    settings = Settings(
        options.device,
        getattr(torch, options.dtype),
        options.size,
        options.text,
        options.rounds,
        options.warmup,
        options.new_tokens,
        options.decode_rounds,
        options.limit,
        options.inject_oom,
    )
    models, begun = Models(settings), time.monotonic()
    console.print(
        f"{sum(len(arms) for _, arms in work)} arms to measure in {len(work)} cases, to {options.csv}"
    )
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        overall = progress.add_task("cases", total=len(work))
        within = progress.add_task("")
        for number, (case, arms) in enumerate(work):
            if time.monotonic() - begun > options.budget:
                return len(work) - number
            calls = len(arms) * (1 + options.rounds + (options.new_tokens > 1) * options.decode_rounds) + 1
            progress.reset(within, total=calls, description=str(case))

            def step(what: str, case: Case = case) -> None:
                progress.update(within, advance=1, description=f"{case}: {what}")

            unpatched, trials = run_case(case, arms, models, settings, step)
            for trial in trials:
                _write(rows, setting, case, trial, unpatched, options)
            del unpatched, trials  # and the inputs with them
            progress.advance(overall)
            if console.is_terminal is False:
                console.print(f"{time.monotonic() - begun:5.0f} s  {case}")
    return 0


def _write(
    rows: Rows,
    setting: dict[str, str],
    case: Case,
    trial: Trial,
    unpatched: Trial,
    options: argparse.Namespace,
) -> None:
    arm = trial.arm
    if arm is None:
        return
    key = _key(setting, case, arm, options)
    found = figures(trial, unpatched)
    if not found:
        rows.add(key, [{"status": trial.status if trial.status != OK else LIMIT}])
        return
    tokens, final = tokens_of(trial)
    rows.add(key, found, tokens=tokens, final_tokens=final, layers=trial.layers, status=OK)


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    import speed_show
    from speed_plot import plot

    options = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 180)
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    try:
        rows = Rows(options.csv)
    except ValueError as error:
        console.print(f"[red]{error}[/]")
        return 2
    if options.markdown is not None:
        options.markdown.write_text(speed_show.markdown(rows.rows, _all_rows(options.csv)))
        console.print(f"Wrote {options.markdown}")
        return 0
    left, shown = 0, rows.rows
    if not options.show:
        setting = environment(options.device, options.dtype, options.size)
        left = measure(options, rows, setting, console)
        shown = [row for row in rows.rows if all(row[name] == value for name, value in setting.items())]
    speed_show.tables(console, shown)
    written = plot(shown, options.plot)
    console.print(
        f"Figures in {options.csv}{', plotted in ' if written else ''}{', '.join(map(str, written))}"
    )
    if any(row["status"] == OOM for row in shown):
        console.print("Some arms ran out of memory: see the tables.")
    if left:
        console.print(f"The budget is spent and {left} cases are left; the same command goes on with them.")
    return 0


def _all_rows(own: Path) -> list[dict[str, str]]:
    """Rows of every device, for the table of targets."""
    files = {own, *RESULTS.glob("speed_cuda*.csv")}
    return [row for path in sorted(files) if path.exists() for row in Rows(path).rows]


if __name__ == "__main__":
    sys.exit(main())
