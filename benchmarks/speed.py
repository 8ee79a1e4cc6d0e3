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

`--profile` tells of the unpatched model, and of illava's arms where they remove most, which kernels (on a
CPU: operations) a prefill spends its time in, and whose they are: a table, and <csv>_profile.csv.

A case that runs out of memory, or out of its time, is written down as such, and the run goes on.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import speed_profile
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from speed_cases import OURS, Arm, Case, all_cases, arms_of, main_cases
from speed_figures import figures, tokens_of
from speed_models import MODELS
from speed_options import RESULTS, parse
from speed_rows import LIMIT, OK, OOM, Rows, environment, identity
from speed_run import Models, Settings, Trial, run_case


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
    if options.brief:
        cases = [c for c in cases if c.shown.content == "picture" or c.rows == min(options.batches)]
    first, work = main_cases(cases), []
    for case in cases:
        smaller = MODELS[case.model].smaller is not None
        windows = MODELS[case.model].family == "qwen" and not case.attn.startswith("flash")
        arms = arms_of(case, options.reductions, options.rivals, options.rivals_at, smaller, windows)
        if options.brief and case not in first:
            arms = [Arm(OURS, r) for r in options.rivals_at]
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
        options.profile,
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
            for trial in (unpatched, *trials):
                _profiled(setting, case, trial, options, console)
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


def _profiled(
    setting: dict[str, str], case: Case, trial: Trial, options: argparse.Namespace, console: Console
) -> None:
    """Write and print where a prefill's time went, if that was asked for."""
    if not trial.spent:
        return
    arm = trial.arm or Arm("unpatched", 0.0)
    path = options.csv.with_name(f"{options.csv.stem}_profile.csv")
    speed_profile.write(path, _key(setting, case, arm, options), trial.spent)
    if trial.arm is not None:
        speed_profile.show(console, f"{case}, {arm}", trial.spent)


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
