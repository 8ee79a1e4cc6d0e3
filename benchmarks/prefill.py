"""How much faster a prefill gets, against the bound that its plan's operations set.

    python benchmarks/prefill.py                         # two CPU cores, a minute or two
    python benchmarks/prefill.py --check                 # exit 1 below 0.90 of the bound
    python benchmarks/prefill.py --profile               # where illava's own time goes
    python benchmarks/prefill.py --family internvl       # another family's small model
    python benchmarks/prefill.py --family all            # every family, some ten minutes
    python benchmarks/prefill.py --family all --check    # exit 1 if one is not faster than unpatched
    python benchmarks/prefill.py --config qwen2.5-vl-7b --device cuda --dtype bfloat16 --rounds 20

A prefill is encoder, language model and head for the last token, with a cache, of one picture and a
short prompt. Each round times one model object unpatched, twice at reduction 0, unpatched
again, then at every reduction; patching and its removal are not timed. A speed-up is the median over
the rounds of (mean of the round's unpatched times) / (patched time), so that a busy machine slows
both sides of a ratio. Weights are random: time does not depend on what they say.

How the default small model was chosen. It is Qwen2.5-VL-7B made narrower and shallower, not rebalanced:
heads keep their real sizes (80 channels in the encoder, 128 in the language model), feed-forward
networks their real ratios (2.67 and 5.29), full attention its real relative depth (every quarter, so
merging by attention does so after 1/4 and 1/2 of the encoder, as 7 and 15 of 32), windows and picture
their real size. The encoder is about half of the operations here, 3/10 in the 7B model. It was not
fitted to the result, and two things make it a harder case than the 7B model. Attention statistics,
which the default does not need, grow as (patches)^2 x width while the model grows as patches x width^2,
and a quarter as many layers share them: at 1,024 visual tokens they are some 7 % of the merged
prefill's operations here, under 1 % in the 7B model. And the fewer rows a matrix product has, the less
of the CPU's peak it reaches, which no package can change: the efficiency lines below the table say how
much that is on this machine.

The other families' models (prefill_models.py) are made the same way, with about a third of its operations.

`--clock cpu --threads 1` times the process's own CPU seconds, for machines that others use as well.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import gc
import inspect
import platform
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import transformers
from prefill_models import FAMILIES, QWEN2_5_VL_7B, Family, Shape, build_config, build_model
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import illava
from illava.evaluate.synthetic import build_inputs

SHARE_OF_BOUND = 0.90
COST_OF_NOTHING = 0.01
DEFAULT_FAMILY, ALL = "qwen2_5_vl", "all"
CONFIGS = ("small", "qwen2.5-vl-7b")
DEFAULT_CSV = Path(__file__).parent / "results" / "prefill_cpu.csv"

COLUMNS = (
    "date", "torch", "transformers", "illava", "device", "threads", "dtype", "attn", "family", "config",
    "clock", "rounds", "reduction", "layers", "tokens", "bound", "speedup", "p25", "p75", "share_of_bound",
    "time_unpatched_ms", "time_patched_ms", "merge_share",
)  # fmt: skip


class Prefill:
    """One prefill of a model, ready to be timed.

    Args:
        model: patched or not.
        inputs: of its forward.
        tokens: visual tokens among them.
        clock: `"wall"`, or `"cpu"` for the process's own CPU seconds.
    """

    def __init__(self, model: Any, inputs: dict[str, Any], tokens: int, clock: str) -> None:
        self.model, self.inputs, self.tokens = model, inputs, tokens
        self.keeps_logits = "logits_to_keep" in inspect.signature(type(model).forward).parameters
        self.now = time.process_time if clock == "cpu" else time.perf_counter
        self.cuda = inputs["input_ids"].is_cuda

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    @torch.inference_mode()
    def __call__(self) -> Tensor:
        if self.keeps_logits:
            return self.model(**self.inputs, logits_to_keep=1, use_cache=True).logits
        # MiniCPM-V 4.6 in transformers 5.23 puts every token through its head.
        hidden = self.model.model(**self.inputs, use_cache=True).last_hidden_state
        return self.model.lm_head(hidden[:, -1:])

    def seconds(self) -> float:
        gc.collect()
        self.synchronize()
        start = self.now()
        self()
        self.synchronize()
        return self.now() - start


# Measuring ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """One model and all that was measured of it.

    Attributes:
        name: of its family.
        config: its shape in words.
        unpatched, results: the unpatched model, and one result per reduction, 0 first.
        notes: how fast its feed-forward networks are, with as many rows as before and after merging.
    """

    name: str
    config: str
    unpatched: Result
    results: list[Result]
    notes: list[str]


@dataclass
class Result:
    """One reduction.

    Attributes:
        layers, tokens: which layers merge; visual tokens before and after.
        bound: of the speed-up, by the plan's operations.
        encoded, encoder_tokens: merge units that enter the encoder and leave it.
        final_tokens: visual tokens that leave the last merge.
        seconds: one time per round.
        ratios: unpatched time / patched time, one per round.
        watch: one call looked at from inside.
    """

    reduction: float
    layers: str = ""
    tokens: str = ""
    bound: float = 1.0
    final_tokens: int = 0
    encoded: int = 0
    encoder_tokens: int = 0
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    watch: Watch | None = None

    @property
    def speedup(self) -> float:
        return statistics.median(self.ratios)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.ratios) < 2:
            return self.ratios[0], self.ratios[0]
        low, _, high = statistics.quantiles(self.ratios, n=4, method="inclusive")
        return low, high

    @property
    def share_of_bound(self) -> float:
        return self.speedup / self.bound

    @property
    def passes(self) -> bool:
        if self.reduction == 0:
            return 1 / self.speedup - 1 <= COST_OF_NOTHING
        return self.share_of_bound >= SHARE_OF_BOUND

    @property
    def faster(self) -> bool:
        """Than the unpatched model; reduction 0 need not be."""
        return self.reduction == 0 or self.speedup > 1


class Watch:
    """Adds up the time spent in illava's own code during one call, by function.

    Python tells of every function entered and left. Time counts as illava's from the entry into one
    of its functions to the way out, less what the model's own code takes when called from there, and
    less the attention that a merging encoder block computes in place of the model's own.
    """

    _INSTEAD = "varlen_attention"

    def __init__(self, prefill: Prefill) -> None:
        self._homes = str(Path(illava.__file__).parent), str(Path(transformers.__file__).parent)
        self._prefill = prefill
        self._stack: list[tuple[FrameType, bool, float]] = []  # frame, illava's own, entry time
        self._mark = 0.0
        self.own_seconds = self.seconds = 0.0
        self.inclusive: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        prefill.synchronize()
        start = prefill.now()
        sys.setprofile(self._event)
        try:
            prefill()
        finally:
            sys.setprofile(None)
        prefill.synchronize()
        self.seconds = prefill.now() - start

    @property
    def share(self) -> float:
        return self.own_seconds / self.seconds

    def _event(self, frame: FrameType, event: str, arg: Any) -> None:
        if event == "call":
            in_illava = frame.f_code.co_filename.startswith(self._homes[0])
            if not in_illava and not (self._stack and frame.f_code.co_filename.startswith(self._homes[1])):
                return
            own = in_illava and frame.f_code.co_name != self._INSTEAD
            if self._stack and self._stack[-1][0].f_code.co_name == self._INSTEAD:
                own = False
            now = self._turn()
            self._stack.append((frame, own, now))
        elif event == "return" and self._stack and self._stack[-1][0] is frame:
            now = self._turn()
            _, own, entered = self._stack.pop()
            if frame.f_code.co_filename.startswith(self._homes[0]):
                code = frame.f_code
                name = f"{Path(code.co_filename).stem}.{getattr(code, 'co_qualname', code.co_name)}"
                self.inclusive[name] += now - entered
                self.calls[name] += 1

    def _turn(self) -> float:
        """The time, after what has passed since the last event was put down to its owner."""
        self._prefill.synchronize()
        now = self._prefill.now()
        if self._stack and self._stack[-1][1]:
            self.own_seconds += now - self._mark
        self._mark = now
        return now


def measure(
    prefill: Prefill, options: argparse.Namespace, progress: Progress, name: str
) -> tuple[Result, list[Result]]:
    """Time unpatched and patched in turn, with a bar of that name.

    Returns:
        The unpatched model, and one result per reduction, 0 first.
    """
    settings = {"vit_layers": options.vit_layers, "llm_layers": options.llm_layers_merge}
    unpatched = Result(0.0)
    zero = Result(0.0, layers="-")
    others = [Result(r) for r in options.reduction if r > 0]

    def patched(result: Result) -> float:
        with illava.patch(prefill.model, reduction=result.reduction, **settings):
            return prefill.seconds()

    def idle() -> float:
        return patched(zero)

    unmerged = prefill.seconds
    steps = 5 + len(others)
    task = progress.add_task(f"{name}: warming up", total=1 + len(others) + options.rounds * steps)

    def step(label: str) -> None:
        progress.update(task, advance=1, description=f"{name}: {label}")

    prefill()
    step("warming up")
    for result in others:
        with illava.patch(prefill.model, reduction=result.reduction, **settings) as handle:
            prefill()
            result.watch = Watch(prefill)
            _describe(result, handle)
        step("warming up")
    zero.tokens, zero.final_tokens = f"{prefill.tokens}", prefill.tokens

    for number in range(options.rounds):
        label = f"round {number + 1} of {options.rounds}"
        prefill()  # not timed: a call after one of other sizes finds the allocator in another state
        step(label)
        base: list[float] = []
        nothing: list[float] = []
        merging: list[float] = []
        for times, run in ((base, unmerged), (nothing, idle), (nothing, idle), (base, unmerged)):
            times.append(run())
            step(label)
        for result in others:
            merging.append(patched(result))
            step(label)
        reference = statistics.mean(base)
        for result, seconds in zip([zero, *others], [statistics.mean(nothing), *merging], strict=True):
            result.seconds.append(seconds)
            result.ratios.append(reference / seconds)
        unpatched.seconds.append(reference)
    return unpatched, [zero, *others]


def _describe(result: Result, handle: illava.Handle) -> None:
    """What the plan did, from the handle's report of the warm-up call."""
    report = handle.report
    if report is None:
        raise SystemExit(f"reduction {result.reduction}: illava made no report, so nothing was merged")
    plan = handle.plan
    result.layers = f"vit {' '.join(map(str, plan.vit_layers))}; llm {' '.join(map(str, plan.llm_layers))}"
    result.encoded = result.encoder_tokens = sum(p.encoded_units or p.tokens for p in report.pictures)
    result.encoder_tokens -= sum(
        r.tokens_removed for p in report.pictures for r in p.layers if r.stage == "vit"
    )
    result.tokens, result.final_tokens = f"{report.tokens} > {report.final_tokens}", report.final_tokens
    result.bound = report.flops.speedup_bound


@torch.inference_mode()
def efficiency(prefill: Prefill, label: str, mlp: nn.Module, width: int, rows: Sequence[int]) -> str:
    """TFLOP/s of one feed-forward network at several numbers of rows."""
    text = prefill.model.config.get_text_config()
    chosen = getattr(text, "num_experts_per_tok", 1) / getattr(text, "num_experts", 1)
    weights = sum(p.numel() * (chosen if p.ndim == 3 else 1) for p in mlp.parameters() if p.ndim > 1)
    parameter = next(mlp.parameters())
    rates = {}
    for count in dict.fromkeys(rows):
        x = torch.randn(1, count, width, device=parameter.device).to(parameter.dtype)
        mlp(x)
        times = []
        for _ in range(9):
            prefill.synchronize()
            start = prefill.now()
            mlp(x)
            prefill.synchronize()
            times.append(prefill.now() - start)
        rates[count] = 2 * weights * count / statistics.median(times)
    best = rates[rows[0]]
    parts = [f"{n} rows {rate / 1e12:.3g} ({rate / best:.2f})" for n, rate in rates.items()]
    return f"Efficiency of {label}, TFLOP/s (against the first): {', '.join(parts)}"


def efficiencies(prefill: Prefill, merged: Sequence[Result]) -> list[str]:
    """Of both feed-forward networks, before and after merging."""
    if not merged:
        return []
    model, tokens = prefill.model, prefill.tokens
    seams = illava.families.family_of(model.config.model_type, type(model).__name__).find_seams(model)
    text = prefill.inputs["input_ids"].shape[1] - tokens
    decoder = seams.layers[0].mlp
    rows = [tokens + text, *(r.final_tokens + text for r in merged)]
    lines = [
        efficiency(
            prefill,
            "a decoder feed-forward network",
            decoder,
            model.get_input_embeddings().embedding_dim,
            rows,
        )
    ]
    block, unit = seams.blocks[0], seams.merge_size**2
    encoder, width = getattr(block, seams.block_ffn), getattr(block, seams.block_norm).weight.numel()
    rows = [unit * merged[0].encoded, *(unit * r.encoder_tokens for r in merged)]
    return [*lines, efficiency(prefill, "an encoder feed-forward network", encoder, width, rows)]


def run(name: str, family: Family, options: argparse.Namespace, progress: Progress) -> Subject:
    """Build a family's model, measure it, and let it go."""
    shape = options.shapes[name]
    dtype = getattr(torch, options.dtype)
    config = build_config(family, shape)
    model = build_model(family, config, options.device, dtype, options.attn)
    picture = family.picture(config, shape.picture, torch.Generator().manual_seed(0))
    inputs = build_inputs(model, picture, options.text, options.device, dtype)
    prefill = Prefill(model, inputs, picture.tokens, options.clock)
    unpatched, results = measure(prefill, options, progress, name)
    notes = [] if options.family == ALL else efficiencies(prefill, results[1:])
    text = options.config + (f" {shape}" if options.config == "small" else "")
    return Subject(name, text, unpatched, results, notes)


# Showing ------------------------------------------------------------------------------------------


def show_one(console: Console, setting: str, subject: Subject) -> None:
    unpatched, results = subject.unpatched, subject.results
    table = Table(title=f"Prefill, {subject.name}, {subject.config}, {setting}")
    for column in (
        "reduction", "tokens", "bound", "measured", "of bound", "IQR", "ms", "unpatched ms", "merging", "",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    for r in results:
        low, high = r.quartiles
        table.add_row(
            f"{r.reduction:.1%}",
            r.tokens,
            f"{r.bound:.2f}x",
            f"{r.speedup:.3f}x" if r.reduction == 0 else f"{r.speedup:.2f}x",
            f"{r.share_of_bound:.3f}",
            f"{low:.3f} to {high:.3f}" if r.reduction == 0 else f"{low:.2f} to {high:.2f}",
            f"{1e3 * statistics.median(r.seconds):.0f}",
            f"{1e3 * statistics.median(unpatched.seconds):.0f}",
            f"{r.watch.share:.1%}" if r.watch is not None else "-",
            "[green]ok[/]" if r.passes else "[red]short[/]",
        )
    console.print(table)
    if len(results) > 1:
        console.print(f"Layers: {results[-1].layers}. 'merging': illava's own share of the patched time.")
    for note in subject.notes:
        console.print(note)


def show_all(console: Console, title: str, subjects: Sequence[Subject]) -> None:
    table = Table(title=title)
    table.add_column("family")
    for column in ("reduction", "visual tokens", "bound", "measured (quartiles)", "share of the bound", ""):
        table.add_column(column, justify="right")
    for subject in subjects:
        for r in subject.results:
            low, high = r.quartiles
            table.add_row(
                subject.name,
                f"{r.reduction:.1%}",
                r.tokens,
                f"{r.bound:.2f}x",
                f"{r.speedup:.2f}x ({low:.2f} to {high:.2f})",
                f"{r.share_of_bound:.2f}",
                "[green]ok[/]" if r.faster else "[red]slower[/]",
                end_section=r is subject.results[-1],
            )
    console.print(table)


def show_profile(console: Console, result: Result) -> None:
    watch = result.watch
    if watch is None:
        return
    table = Table(
        title=f"reduction {result.reduction:.1%}: illava's own code {1e3 * watch.own_seconds:.0f} ms of "
        f"{1e3 * watch.seconds:.0f} ms"
    )
    table.add_column("function")
    for column in ("calls", "ms, with all it calls", "share"):
        table.add_column(column, justify="right")
    longest = sorted(watch.inclusive.items(), key=lambda item: -item[1])
    for name, seconds in longest:
        if seconds > 5e-4 * watch.seconds:
            share = seconds / watch.seconds
            table.add_row(name, str(watch.calls[name]), f"{1e3 * seconds:.1f}", f"{share:.1%}")
    console.print(table)


def write_csv(path: Path, options: argparse.Namespace, subject: Subject) -> None:
    """Append one row per reduction."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if fresh:
            writer.writeheader()
        for r in subject.results:
            low, high = r.quartiles
            writer.writerow(
                {
                    "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                    "illava": illava.__version__,
                    "device": device_name(options.device),
                    "threads": torch.get_num_threads(),
                    "dtype": options.dtype,
                    "attn": options.attn,
                    "family": subject.name,
                    "config": subject.config,
                    "clock": options.clock,
                    "rounds": len(r.ratios),
                    "reduction": r.reduction,
                    "layers": r.layers,
                    "tokens": r.tokens,
                    "bound": f"{r.bound:.4f}",
                    "speedup": f"{r.speedup:.4f}",
                    "p25": f"{low:.4f}",
                    "p75": f"{high:.4f}",
                    "share_of_bound": f"{r.share_of_bound:.4f}",
                    "time_unpatched_ms": f"{1e3 * statistics.median(subject.unpatched.seconds):.1f}",
                    "time_patched_ms": f"{1e3 * statistics.median(r.seconds):.1f}",
                    "merge_share": f"{r.watch.share:.4f}" if r.watch is not None else "",
                }
            )


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _layers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.replace(",", " ").split())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measured prefill speed-up against the bound of the plan's operations.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--family", choices=(*FAMILIES, ALL), default=DEFAULT_FAMILY, help="whose small model, or all")
    add("--config", choices=CONFIGS, default="small", help="the model's shape")
    default = "; if not given, the family's"
    add("--hidden", type=int, help=f"small: width of the encoder, a multiple of its heads' channels{default}")
    add("--depth", type=int, help=f"small: encoder blocks{default}")
    add("--llm-hidden", type=int, help=f"small: width of the language model, a multiple as above{default}")
    add("--llm-layers", type=int, help=f"small: decoder layers{default}")
    add("--picture", type=_picture, help=f"pixels along a side, or height x width as 448x1344{default}")
    add("--text", type=int, default=32, help="text tokens")
    add("--reduction", "--reductions", type=float, nargs="+", help="default: 0.667 0.778 0.889; all: 0.889")
    add("--vit-layers", type=_layers, help="encoder blocks that merge, as 3,7; default: the rule's own")
    add("--llm-layers-merge", type=_layers, help="decoder layers that merge; default: the rule's own")
    add("--rounds", type=int, default=7)
    add("--threads", type=int, default=2)
    add("--clock", choices=("wall", "cpu"), default="wall")
    add("--device", default="cpu")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    add("--attn", choices=("sdpa", "eager", "flash_attention_2"), default="sdpa")
    add("--csv", type=Path, help="where to append; if not given, benchmarks/results/prefill_<device>.csv")
    add("--profile", action="store_true", help="list illava's own functions by time")
    limits = f"below {SHARE_OF_BOUND} of a bound, or if reduction 0 costs over {COST_OF_NOTHING}"
    of_all = "; with --family all, if a family is not faster than unpatched"
    add("--check", action="store_true", help=f"exit 1 {limits} of the unpatched time{of_all}")
    options = parser.parse_args()
    _settle(options, parser)
    return options


def _picture(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def _settle(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Defaults that depend on other options, and combinations that cannot be."""
    every = options.family == ALL
    if options.config != "small" and options.family != DEFAULT_FAMILY:
        parser.error(f"--config {options.config} is a model of --family {DEFAULT_FAMILY}")
    options.families = FAMILIES if every else {options.family: FAMILIES[options.family]}
    if options.config != "small":
        options.families = {DEFAULT_FAMILY: QWEN2_5_VL_7B}
    absent = [name for name, family in options.families.items() if not family.exists]
    if absent and not every:
        parser.error(f"transformers {transformers.__version__} has no {absent[0]}")
    options.absent = absent
    options.families = {name: family for name, family in options.families.items() if family.exists}
    sizes = ("hidden", "depth", "llm_hidden", "llm_layers", "picture")
    given = {name: value for name in sizes if (value := getattr(options, name)) is not None}
    merging = options.vit_layers is not None or options.llm_layers_merge is not None
    if every and (given or merging):
        parser.error("sizes and layers are for one family, not for --family all")
    if options.config != "small" and set(given) - {"picture"}:
        parser.error(f"--config {options.config} has sizes of its own")
    options.shapes = {
        name: dataclasses.replace(family.shape, **given) for name, family in options.families.items()
    }
    for name, shape in options.shapes.items():
        _check_shape(shape, options.families[name], parser)
    if options.reduction is None:
        options.reduction = [0.889] if every else [0.667, 0.778, 0.889]
    if options.clock == "cpu" and (options.threads != 1 or options.device != "cpu"):
        parser.error("--clock cpu counts waiting threads as work: it needs --threads 1 on the CPU")
    if options.csv is None:
        kind = options.device.split(":")[0]
        options.csv = DEFAULT_CSV.with_name(f"prefill_{kind}.csv")
    if options.csv.exists() and options.csv.stat().st_size:
        with options.csv.open(newline="") as file:
            if tuple(next(csv.reader(file))) != COLUMNS:
                parser.error(f"{options.csv} has other columns; name another file with --csv")


def _check_shape(shape: Shape, family: Family, parser: argparse.ArgumentParser) -> None:
    (head, llm_head), (pixels, blocks) = family.heads, family.steps
    for name, value, step in (
        ("--hidden", shape.hidden, head),
        ("--depth", shape.depth, blocks),
        ("--llm-hidden", shape.llm_hidden, llm_head),
        ("--picture", shape.picture[0], pixels),
        ("--picture", shape.picture[1], pixels),
    ):
        if value <= 0 or value % step:
            parser.error(f"{name} must be a multiple of {step} in this family")


def main() -> int:
    """Command line."""
    options = parse()
    console = Console(width=None if sys.stdout.isatty() else 130)
    torch.set_num_threads(options.threads)
    if options.absent:
        console.print(f"transformers {transformers.__version__} has no {', '.join(options.absent)}")
    subjects = []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        overall = progress.add_task("families", total=len(options.families), visible=options.family == ALL)
        for name, family in options.families.items():
            subjects.append(run(name, family, options, progress))
            write_csv(options.csv, options, subjects[-1])
            progress.advance(overall)

    setting = f"{options.dtype}, {options.attn}, {device_name(options.device)}"
    setting += f", {options.threads} threads" if options.device == "cpu" else ""
    setting += f", {options.rounds} rounds"
    if options.family == ALL:
        show_all(console, f"Prefill, small models, {setting}", subjects)
    else:
        show_one(console, setting, subjects[0])
    if options.profile:
        for subject in subjects:
            for result in subject.results[1:]:
                console.print(subject.name)
                show_profile(console, result)
    console.print(f"Appended to {options.csv}")
    short = verdict(subjects, options.family == ALL)
    for line in short:
        console.print(f"[red]{line}[/]")
    return 1 if options.check and short else 0


def verdict(subjects: Sequence[Subject], every: bool) -> list[str]:
    """What falls short, in words."""
    lines = []
    for subject in subjects:
        for r in subject.results:
            if r.faster if every else r.passes:
                continue
            slower, share = f"{1 / r.speedup - 1:.1%} slower", f"{r.share_of_bound:.3f} of the bound"
            reason = slower if every or r.reduction == 0 else share
            lines.append(f"{subject.name}, reduction {r.reduction:.1%}: {reason}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
