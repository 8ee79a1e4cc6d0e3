"""How much faster a prefill gets, against the bound that its plan's operations set.

    python benchmarks/prefill.py                         # two CPU cores, a minute or two
    python benchmarks/prefill.py --check                 # exit 1 below 0.90 of the bound
    python benchmarks/prefill.py --profile               # where illava's own time goes
    python benchmarks/prefill.py --config qwen2.5-vl-7b --device cuda --dtype bfloat16 --rounds 20

A prefill is encoder, language model and head for the last token, with a cache, of one picture and a
short prompt. Each round times one model object unpatched, twice at reduction 0, unpatched
again, then at every reduction; patching and its removal are not timed. A speed-up is the median over
the rounds of (mean of the round's unpatched times) / (patched time), so that a busy machine slows
both sides of a ratio. Weights are random: time does not depend on what they say.

How the small model was chosen. It is Qwen2.5-VL-7B made narrower and shallower, not rebalanced:
heads keep their real sizes (80 channels in the encoder, 128 in the language model), feed-forward
networks their real ratios (2.67 and 5.29), full attention its real relative depth (every quarter, so
the default plan merges after 1/4 and 1/2 of the encoder, as 7 and 15 of 32), windows and picture
their real size. The encoder is about half of the operations here, 3/10 in the 7B model. It was not
fitted to the result, and two things make it a harder case than the 7B model. Attention statistics
grow as (patches)^2 x width while the model grows as patches x width^2, and a quarter as many layers
share them: at 1,024 visual tokens they are some 7 % of the merged prefill's operations here, under
1 % in the 7B model. And the fewer rows a matrix product has, the less of the CPU's peak it reaches, which
no package can change: the efficiency lines below the table say how much that is on this machine.

`--clock cpu --threads 1` times the process's own CPU seconds, for machines that others use as well.
"""

from __future__ import annotations

import argparse
import csv
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
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import illava

SHARE_OF_BOUND = 0.90
COST_OF_NOTHING = 0.01
PATCH, UNIT = 14, 2
VISION_START, VISION_END, IMAGE, VIDEO, FIRST_TEXT = range(5)
DEFAULT_CSV = Path(__file__).parent / "results" / "prefill_cpu.csv"

COLUMNS = (
    "date", "torch", "transformers", "illava", "device", "threads", "dtype", "attn", "config", "clock",
    "rounds", "reduction", "layers", "tokens", "bound", "speedup", "p25", "p75", "share_of_bound",
    "time_unpatched_ms", "time_patched_ms", "merge_share",
)  # fmt: skip


# The model and its inputs -------------------------------------------------------------------------


def small_config(options: argparse.Namespace) -> Qwen2_5_VLConfig:
    """The 7B model made narrower and shallower; see the top of this file."""
    hidden, depth, llm_hidden = options.hidden, options.depth, options.llm_hidden
    heads = llm_hidden // 128
    return _config(
        vision={
            "depth": depth,
            "hidden_size": hidden,
            "intermediate_size": round(hidden * 3420 / 1280 / 16) * 16,
            "num_heads": hidden // 80,
            "fullatt_block_indexes": [depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4)],
        },
        text={
            "hidden_size": llm_hidden,
            "intermediate_size": round(llm_hidden * 18944 / 3584 / 128) * 128,
            "num_hidden_layers": options.llm_layers,
            "num_attention_heads": heads,
            "num_key_value_heads": 1 if heads % 7 else heads // 7,
            "vocab_size": 2048,
        },
    )


def full_config(options: argparse.Namespace) -> Qwen2_5_VLConfig:
    """The architecture of Qwen2.5-VL-7B-Instruct."""
    del options
    return _config(
        vision={
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        text={
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
        },
    )


CONFIGS = {"small": small_config, "qwen2.5-vl-7b": full_config}


def _config(vision: dict[str, Any], text: dict[str, Any]) -> Qwen2_5_VLConfig:
    # `rope_scaling` as the hub's checkpoints have it, which transformers 4.57 and 5.x both read.
    text |= {
        "rope_theta": 1_000_000.0,
        "rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]},
        "max_position_embeddings": 128_000,
        "rms_norm_eps": 1e-6,
        "bos_token_id": FIRST_TEXT,
        "eos_token_id": FIRST_TEXT,
        "pad_token_id": FIRST_TEXT,
        "use_sliding_window": False,
    }
    vision |= {
        "in_channels": 3,
        "patch_size": PATCH,
        "spatial_merge_size": UNIT,
        "temporal_patch_size": 2,
        "window_size": 112,
        "out_hidden_size": text["hidden_size"],
        "tokens_per_second": 2,
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=False,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )


def build_model(
    config: Qwen2_5_VLConfig, device: str, dtype: torch.dtype, attn: str
) -> Qwen2_5_VLForConditionalGeneration:
    """A model with random weights, made on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation=attn, dtype=dtype)
    with torch.no_grad():
        for module in model.modules():
            # Every layer's output of unit size: attention neither uniform nor all on one token.
            if isinstance(module, nn.Embedding):
                module.weight.normal_()
            elif isinstance(module, (nn.Linear, nn.Conv3d)):
                module.weight.normal_(std=module.weight[0].numel() ** -0.5)
    return model.eval()


def build_inputs(
    model: nn.Module, picture: int, text: int, device: str, dtype: torch.dtype
) -> dict[str, Any]:
    """One square picture of `picture` pixels a side between `text` tokens of text."""
    side = picture // PATCH
    visual = (side // UNIT) ** 2
    vocabulary = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(FIRST_TEXT, vocabulary, (text,), generator=generator)
    before, after = words[: text // 2], words[text // 2 :]
    start, end = torch.tensor([VISION_START]), torch.tensor([VISION_END])
    ids = torch.cat([before, start, torch.full((visual,), IMAGE), end, after])[None]
    pixels = torch.randn(side * side, 3 * 2 * PATCH * PATCH, generator=generator)
    inputs = {
        "input_ids": ids.to(device),
        "attention_mask": torch.ones_like(ids).to(device),
        "pixel_values": pixels.to(device, dtype),
        "image_grid_thw": torch.tensor([[1, side, side]]).to(device),
    }
    if "mm_token_type_ids" in inspect.signature(type(model).forward).parameters:  # transformers 5.x
        inputs["mm_token_type_ids"] = (ids == IMAGE).long().to(device)
    return inputs


class Prefill:
    """One prefill of a model, ready to be timed.

    Args:
        model: patched or not.
        inputs: of its forward.
        clock: `"wall"`, or `"cpu"` for the process's own CPU seconds.
    """

    def __init__(self, model: nn.Module, inputs: dict[str, Any], clock: str) -> None:
        self.model, self.inputs = model, inputs
        self.now = time.process_time if clock == "cpu" else time.perf_counter
        self.cuda = inputs["input_ids"].is_cuda

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    @torch.inference_mode()
    def __call__(self) -> Tensor:
        return self.model(**self.inputs, logits_to_keep=1, use_cache=True).logits

    def seconds(self) -> float:
        gc.collect()
        self.synchronize()
        start = self.now()
        self()
        self.synchronize()
        return self.now() - start


# Measuring ----------------------------------------------------------------------------------------


@dataclass
class Result:
    """One reduction.

    Attributes:
        layers, tokens: which layers merge; visual tokens before and after.
        bound: of the speed-up, by the plan's operations.
        encoder_tokens, final_tokens: visual tokens that leave the encoder and the last merge.
        seconds: one time per round.
        ratios: unpatched time / patched time, one per round.
        watch: one call looked at from inside.
    """

    reduction: float
    layers: str = ""
    tokens: str = ""
    bound: float = 1.0
    final_tokens: int = 0
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


def measure(prefill: Prefill, options: argparse.Namespace, progress: Progress) -> tuple[Result, list[Result]]:
    """Time unpatched and patched in turn.

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
    task = progress.add_task("warming up", total=1 + len(others) + options.rounds * steps)

    def step(label: str) -> None:
        progress.update(task, advance=1, description=label)

    prefill()
    step("warming up")
    for result in others:
        with illava.patch(prefill.model, reduction=result.reduction, **settings) as handle:
            prefill()
            result.watch = Watch(prefill)
            _describe(result, handle)
        step("warming up")
    tokens = int((prefill.inputs["input_ids"] == IMAGE).sum())
    zero.tokens, zero.final_tokens = f"{tokens}", tokens

    for number in range(options.rounds):
        label = f"round {number + 1} of {options.rounds}"
        prefill()  # not timed: a call after one of other sizes finds the allocator in another state
        step(label)
        base, nothing, merging = [], [], []
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
    left = [record.tokens_out for record in report.pictures[0].layers if record.stage == "vit"]
    result.encoder_tokens = left[-1] if left else report.tokens
    result.tokens, result.final_tokens = f"{report.tokens} > {report.final_tokens}", report.final_tokens
    result.bound = report.flops.speedup_bound


@torch.inference_mode()
def efficiency(prefill: Prefill, label: str, mlp: nn.Module, rows: Sequence[int]) -> str:
    """TFLOP/s of one feed-forward network at several numbers of rows."""
    weights = sum(p.numel() for p in mlp.parameters() if p.ndim == 2)
    parameter = next(mlp.parameters())
    width = next(m for m in mlp.modules() if isinstance(m, nn.Linear)).in_features
    rates = {}
    for count in dict.fromkeys(rows):
        x = torch.randn(count, width, device=parameter.device).to(parameter.dtype)
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


# Showing ------------------------------------------------------------------------------------------


def show(console: Console, title: str, unpatched: Result, results: Sequence[Result]) -> None:
    table = Table(title=title)
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


def write_csv(path: Path, options: argparse.Namespace, unpatched: Result, results: Sequence[Result]) -> None:
    """Append one row per reduction."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if fresh:
            writer.writeheader()
        for r in results:
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
                    "config": options.config_text,
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
                    "time_unpatched_ms": f"{1e3 * statistics.median(unpatched.seconds):.1f}",
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
    add("--config", choices=CONFIGS, default="small", help="the model's shape")
    add("--hidden", type=int, default=320, help="small: width of the encoder, a multiple of 80")
    add("--depth", type=int, default=16, help="small: encoder blocks, a multiple of 4")
    add("--llm-hidden", type=int, default=768, help="small: width of the language model, a multiple of 128")
    add("--llm-layers", type=int, default=12, help="small: decoder layers")
    add("--picture", type=int, default=896, help="pixels along a side, a multiple of 28")
    add("--text", type=int, default=32, help="text tokens")
    add("--reduction", type=float, nargs="+", default=[0.667, 0.778, 0.889])
    add("--vit-layers", type=_layers, help="encoder blocks that merge, as 3,7; default: the family's")
    add("--llm-layers-merge", type=_layers, help="decoder layers that merge; default: the family's")
    add("--rounds", type=int, default=7)
    add("--threads", type=int, default=2)
    add("--clock", choices=("wall", "cpu"), default="wall")
    add("--device", default="cpu")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    add("--attn", choices=("sdpa", "eager", "flash_attention_2"), default="sdpa")
    add("--csv", type=Path, help="where to append; if not given, benchmarks/results/prefill_<device>.csv")
    add("--profile", action="store_true", help="list illava's own functions by time")
    limits = f"below {SHARE_OF_BOUND} of a bound, or if reduction 0 costs over {COST_OF_NOTHING}"
    add("--check", action="store_true", help=f"exit 1 {limits} of the unpatched time")
    options = parser.parse_args()
    if options.config == "small":
        for name, step in (("hidden", 80), ("depth", 4), ("llm_hidden", 128)):
            if getattr(options, name) % step:
                parser.error(f"--{name.replace('_', '-')} must be a multiple of {step}")
    if options.picture % (PATCH * UNIT):
        parser.error(f"--picture must be a multiple of {PATCH * UNIT}")
    if options.clock == "cpu" and (options.threads != 1 or options.device != "cpu"):
        parser.error("--clock cpu counts waiting threads as work: it needs --threads 1 on the CPU")
    if options.csv is None:
        kind = options.device.split(":")[0]
        options.csv = DEFAULT_CSV.with_name(f"prefill_{kind}.csv")
    shape = f" {options.hidden}x{options.depth}+{options.llm_hidden}x{options.llm_layers}"
    options.config_text = options.config + (shape if options.config == "small" else "")
    return options


def main() -> int:
    """Command line."""
    options = parse()
    console = Console(width=None if sys.stdout.isatty() else 130)
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    model = build_model(CONFIGS[options.config](options), options.device, dtype, options.attn)
    inputs = build_inputs(model, options.picture, options.text, options.device, dtype)
    prefill = Prefill(model, inputs, options.clock)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        unpatched, results = measure(prefill, options, progress)

    title = (
        f"Prefill, {options.config_text}, {options.dtype}, {options.attn}, {device_name(options.device)}"
        + (f", {options.threads} threads" if options.device == "cpu" else "")
        + f", {options.rounds} rounds"
    )
    show(console, title, unpatched, results)
    merged = results[1:]
    if merged:
        console.print(f"Layers: {merged[-1].layers}. 'merging': illava's own share of the patched time.")
        text = inputs["input_ids"].shape[1] - results[0].final_tokens
        rows = [results[0].final_tokens + text, *(r.final_tokens + text for r in merged)]
        decoder, encoder = model.model.language_model.layers[0].mlp, model.model.visual.blocks[0].mlp
        console.print(efficiency(prefill, "a decoder feed-forward network", decoder, rows))
        rows = [4 * results[0].final_tokens, *(4 * r.encoder_tokens for r in merged)]
        console.print(efficiency(prefill, "an encoder feed-forward network", encoder, rows))
    if options.profile:
        for result in merged:
            show_profile(console, result)
    write_csv(options.csv, options, unpatched, results)
    console.print(f"Appended to {options.csv}")
    short = [r for r in results if not r.passes]
    for r in short:
        slower, share = f"{1 / r.speedup - 1:.1%} slower", f"{r.share_of_bound:.3f} of the bound"
        reason = slower if r.reduction == 0 else share
        console.print(f"[red]reduction {r.reduction:.1%}: {reason}[/]")
    return 1 if options.check and short else 0


if __name__ == "__main__":
    sys.exit(main())
