"""Train a reader: `python benchmarks/readers/train.py qwen2_5_vl --out FOLDER --state FOLDER`.

One seeded run from random weights to a checkpoint folder, with a progress bar and curves; stopped at any time
it goes on from its last saved state when the same command is given again. Difficulty rises with the share of
the run done: the encoder first learns to name what it sees (see `sight.py`), then the model to read, then
questions about few digits in small pictures are asked, and in the end everything at every size.

`torchrun --nproc-per-node 2 benchmarks/readers/train.py ...` has two processes share the work: each draws a
batch of its own, and all step along the mean of their gradients.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import transformers
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import distributed, nn
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import illava  # noqa: E402
from readers import architectures, attention, batches, card, states, tasks  # noqa: E402
from readers.lessons import KINDS, LOOKING, READING, TAUGHT, Course, Lessons  # noqa: E402
from readers.sight import Sight  # noqa: E402

OTHERS = 0.2  # learning rate of what is no matrix of a block or layer, as a share of theirs
SIGHT = 0.3  # weight of what the encoder sees beside the answers, thereafter
STATE = "state.safetensors"
HELD_OUT = 10**9  # added to the seed of validation pictures


def rate(done: float, step: int, warmup: int = 100) -> float:
    """The share of the highest learning rate: a short rise, then level, then down over the last 30 %."""
    return min(1.0, (step + 1) / warmup, max(0.0, (1 - done) / 0.3) + 0.01)


def optimizers(model: nn.Module, sight: nn.Module, highest: float) -> list[torch.optim.Optimizer]:
    """Muon (Jordan 2024) for the matrices of blocks and layers, AdamW for all else."""
    matrices, others = [], list(sight.parameters())
    for name, weight in model.named_parameters():
        inner = any(part in name for part in (".blocks.", ".layers.", ".layer."))
        (matrices if weight.ndim == 2 and inner else others).append(weight)
    # "match_rms_adamw": one learning rate does for both (Liu et al., 2025, arXiv 2502.16982).
    muon = torch.optim.Muon(
        matrices, lr=highest, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, torch.optim.AdamW(others, lr=OTHERS * highest, betas=(0.9, 0.98), weight_decay=0.0)]


@torch.no_grad()
def move(average: nn.Module, model: nn.Module, step: int, keep: float = 0.998) -> None:
    """Move the averaged weights towards the model's; faster at first, while those are still random."""
    keep = min(keep, (1 + step) / (10 + step))
    for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(weight, 1 - keep)


def look(model, batch, device, sight):
    """Loss of naming what the encoder sees, the language model left out, and the share named rightly."""
    on = batches.simple(batch, device)
    names = ("pixel_values", "image_grid_thw")
    with torch.autocast(device.type, torch.bfloat16):
        model.model.get_image_features(**{name: on.inputs[name] for name in names if name in on.inputs})
    return sight(on.labels)


def answers(model, batch, device, sight=None):
    """Loss of a batch and, for each question, whether greedy decoding would answer it exactly.

    Args:
        sight: adds the loss of naming what the encoder sees.
    """
    on = batches.simple(batch, device)
    if model.config.text_config._attn_implementation == attention.NAME:
        on.inputs["attention_mask"] = attention.additive(on.inputs["attention_mask"])
    with torch.autocast(device.type, torch.bfloat16):
        hidden = model.model(**on.inputs, use_cache=False)[0]  # [B, L, width]
        logits = model.lm_head(hidden[on.rows, on.columns]).float()  # [n, vocabulary]
    loss = nn.functional.cross_entropy(logits, on.targets)
    right = torch.ones(len(batch.questions), dtype=torch.bool, device=device)
    wrong = logits.argmax(-1) != on.targets
    right[on.question[wrong]] = False
    return loss if sight is None else loss + SIGHT * sight(on.labels)[0], right


@torch.no_grad()
def validate(model, processor, *, items: int = 48) -> dict[str, float]:
    """Share of exact answers by task and size on validation pictures, every question asked.

    A question counts as right if each token of its answer is the likeliest after the right ones before it,
    which is when greedy decoding gives the whole answer.
    """
    composer, device, found = batches.Composer(model, processor), model.device, defaultdict(list)
    for number, kind in enumerate(kind for kind in KINDS if kind.name not in TAUGHT):
        for part in range(max(1, items // kind.items)):
            rng = np.random.default_rng([HELD_OUT, number, part])
            batch = composer(batches.sample(rng, kind, "validation"))
            right = answers(model, batch, device)[1]
            for question, good in zip(batch.questions, right.tolist(), strict=True):
                if question.task:
                    found[f"{question.task} {kind.side}"].append(good)
    return {name: round(sum(values) / len(values), 4) for name, values in sorted(found.items())}


def restore(path: Path, model, sight, parts, average) -> tuple[int, float]:
    """Go on from a saved state: the step reached and the hours spent."""
    if (old := path.with_suffix(".pt")).exists():
        raise SystemExit(f"{old} is an earlier version's: finish the run with that version, or delete it")
    if not path.exists():
        return 0, 0.0
    if (saved := states.about(path))["family"] != model.config.model_type:
        raise SystemExit(f"{path} is of a {saved['family']}: give another --state, or delete it")
    states.read(path, {"model": model, "average": average, "sight": sight}, parts)
    return saved["step"], saved["hours"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("family", choices=architectures.FAMILIES)
    add("--out", type=Path, required=True, help="folder for the checkpoint and its curves")
    add("--state", type=Path, required=True, help="folder for what an interrupted run goes on from")
    add("--steps", type=int, default=20_000, help="optimizer steps of the whole run")
    add("--learning-rate", type=float, default=2e-3, help="the highest")
    add("--size", type=float, default=1.0, help="factor on the items of a batch")
    add("--looking", type=float, default=LOOKING, help="share of the steps before anything is asked")
    add("--reading", type=float, default=READING, help="share of the steps, after that, of writing")
    add("--begin", type=float, default=0.0, help="where the course of questions begins; 0.6 with all of it")
    add("--seed", type=int, default=0, help="of weights and pictures")
    add("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    add("--workers", type=int, default=0, help="processes that draw pictures, for a GPU")
    add("--every", type=int, default=250, help="steps between validations, saved states and checkpoints")
    add(
        "--start-from", type=Path, nargs="+", default=[],
        help="checkpoints whose weights of equal shape to begin with; of two that fit, the last one's",
    )  # fmt: skip
    options = parser.parse_args()
    looking, reading, begin = options.looking, options.reading, options.begin
    if min(looking, reading) < 0 or looking + reading > 1 or looking == 1:
        parser.error(
            f"--looking {looking:g} and --reading {reading:g} are no shares of a run in which something is "
            "asked; give two from 0 that sum to at most 1, and leave a step that is not for looking"
        )
    if not 0 <= begin < 1:
        parser.error(f"--begin {begin:g} is no place in the course; give a share from 0 to below 1")
    return options


def main() -> None:
    """Train a reader, or go on training it."""
    options = parse()
    family, steps, out, state = options.family, options.steps, options.out, options.state
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    process = share(device)
    model, processor = architectures.build(family, tasks.WORDS, seed=options.seed)
    for folder in options.start_from:
        architectures.borrow(model, folder)
    if device.type == "cpu":
        attention.use(model)
    average = copy.deepcopy(model).to(device)  # what is validated and saved
    model.to(device)
    if family == "qwen2_5_vl" and device.type == "cuda":  # one call for all windows instead of one each
        illava.patch(model, reduction=0, fast_windows=True)
    sight = Sight(model).to(device)
    parts = optimizers(model, sight, options.learning_rate)
    state.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    step, hours = restore(state / STATE, model, sight, parts, average)
    composer = batches.Composer(copy.deepcopy(average).to("meta"), processor)
    if not process:
        note(out, options, model, device)
    course = Course(options.looking, options.reading, options.begin)
    lessons = Lessons(composer, steps, options.size, options.seed, process, course)
    drawn = DataLoader(
        lessons,
        batch_size=None, sampler=range(step, steps), num_workers=options.workers,
        prefetch_factor=4 if options.workers else None,
    )  # fmt: skip
    losses, began = [], time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=process > 0) as bar:
        shown = bar.add_task(family, total=steps, completed=step)
        for batch in drawn:
            loss, right = (look if lessons.looking(step) else answers)(model, batch, device, sight)
            loss.backward()
            average_gradients([*model.parameters(), *sight.parameters()])
            clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, factor in zip(parts, (1, OTHERS), strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = factor * options.learning_rate * rate(step / steps, step)
                optimizer.step()
                optimizer.zero_grad()
            move(average, model, step)
            step += 1
            losses.append((loss.detach(), right.float().mean().detach()))
            if step % 50 == 0 and not process:
                loss, right = (float(torch.stack(x).mean()) for x in zip(*losses[-50:], strict=True))
                bar.console.print(f"step {step}: loss {loss:.3f}, right {right:.3f}")
            bar.update(shown, completed=step)
            if (step % options.every == 0 or step == steps) and not process:
                spent = hours + (time.monotonic() - began) / 3600
                save(model, sight, average, processor, parts, step, spent, losses, state, out)
                losses = []


def share(device: torch.device) -> int:
    """Join the other processes of `torchrun`, if there are any: the number of this one, 0 for one alone."""
    if "WORLD_SIZE" not in os.environ:
        return 0
    distributed.init_process_group("gloo" if device.type == "cpu" else "nccl")
    if device.type == "cuda":
        torch.cuda.set_device(distributed.get_rank())
    return distributed.get_rank()


def average_gradients(weights: list[nn.Parameter]) -> None:
    """Put the mean of all processes' gradients in the place of each one's own."""
    if not distributed.is_initialized():
        return
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    flat = parameters_to_vector(gradients) / distributed.get_world_size()
    distributed.all_reduce(flat)
    vector_to_parameters(flat, gradients)


def note(out: Path, options: argparse.Namespace, model: nn.Module, device: torch.device) -> None:
    """Write down how this run was asked for, and what with."""
    threads = torch.get_num_threads()
    began = [f"{folder}, weights {states.fingerprint(folder)}" for folder in options.start_from]
    noted = {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "seed": options.seed, "steps asked for": options.steps,
        "of which looking": options.looking, "of which reading": options.reading,
        "course of questions from": options.begin,
        "factor on batches": options.size,
        "highest learning rate": options.learning_rate,
        "began from": "; ".join(began) or "random weights",
        "processes": distributed.get_world_size() if distributed.is_initialized() else 1,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {threads} threads",
        "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    (out / "training.json").write_text(json.dumps(noted, indent=2) + "\n")


def save(model, sight, average, processor, parts, step, hours, losses, state, out) -> None:
    """Validate the averaged weights, note it, and write checkpoint and state."""
    about = {"family": model.config.model_type, "step": step, "hours": hours}
    states.write(
        state / "new.safetensors", {"model": model, "average": average, "sight": sight}, parts, about
    )
    scores = validate(average, processor)
    architectures.save(average, processor, out)
    loss, right = (float(torch.stack(values).mean()) for values in zip(*losses, strict=True))
    row = {"step": step, "hours": round(hours, 3), "loss": round(loss, 4), "right": round(right, 4), **scores}
    path = out / "training.csv"
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if fresh:
            writer.writeheader()
        writer.writerow(row)
    card.write(out)
    (state / "new.safetensors").replace(
        state / STATE
    )  # last: what is noted twice is seen, what is lost is not


if __name__ == "__main__":
    main()
