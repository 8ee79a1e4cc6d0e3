"""Train a reader: `python benchmarks/readers/train.py qwen2_5_vl --out FOLDER --state FOLDER`.

One seeded run from random weights to a checkpoint folder, with a progress bar and curves; stopped at any time
it goes on from its last saved state when the same command is given again. Difficulty rises with the share of
the run done: one or two digits in small pictures first, everything at every size at the end.
"""

from __future__ import annotations

import copy
import csv
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from readers import architectures, batches, states, tasks  # noqa: E402
from readers.batches import Kind  # noqa: E402

import illava  # noqa: E402

# Kinds of batches, and how often each is drawn in the first, second and last part of a run.
KINDS = {
    Kind("picture", 96, 1, 32): (0.70, 0.20, 0.10),
    Kind("picture", 128, 1, 24): (0.20, 0.30, 0.20),
    Kind("picture", 192, 1, 12): (0.0, 0.20, 0.40),
    Kind("several", 96, 3, 12): (0.05, 0.10, 0.05),
    Kind("several", 128, 4, 6): (0.0, 0.05, 0.10),
    Kind("video", 96, 8, 12): (0.05, 0.15, 0.15),
}
PARTS = (0.15, 0.5)  # where the second and the last part begin
HELD_OUT = 10**9  # added to the seed of validation pictures


def settings(done: float) -> tuple[np.ndarray, float]:
    """Chances of each kind and ease of the pictures, when a share `done` of the run is behind."""
    part = sum(done >= start for start in PARTS)
    chances = np.array([row[part] for row in KINDS.values()])
    return chances / chances.sum(), max(0.0, 1.0 - done / PARTS[0])


def rate(done: float, step: int, warmup: int = 100) -> float:
    """The share of the highest learning rate: a short rise, then level, then down over the last 30 %."""
    return min(1.0, (step + 1) / warmup, max(0.0, (1 - done) / 0.3) + 0.01)


def optimizers(model: nn.Module, highest: float) -> list[torch.optim.Optimizer]:
    """Muon (Jordan 2024) for the matrices of blocks and layers, AdamW for all else."""
    matrices, others = [], []
    for name, weight in model.named_parameters():
        inner = any(part in name for part in (".blocks.", ".layers.", ".layer."))
        (matrices if weight.ndim == 2 and inner else others).append(weight)
    # "match_rms_adamw": one learning rate does for both (Liu et al., 2025, arXiv 2502.16982).
    muon = torch.optim.Muon(
        matrices, lr=highest, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, torch.optim.AdamW(others, lr=highest, betas=(0.9, 0.98), weight_decay=0.0)]


@torch.no_grad()
def move(average: nn.Module, model: nn.Module, step: int, keep: float = 0.998) -> None:
    """Move the averaged weights towards the model's; faster at first, while those are still random."""
    keep = min(keep, (1 + step) / (10 + step))
    for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(weight, 1 - keep)


def answers(model, batch, device):
    """Loss of a batch and, for each question, whether greedy decoding would answer it exactly."""
    on = batches.simple(batch, device)
    with torch.autocast(device.type, torch.bfloat16):
        hidden = model.model(**on.inputs, use_cache=False)[0]  # [B, L, width]
        logits = model.lm_head(hidden[on.rows, on.columns]).float()  # [n, vocabulary]
    loss = nn.functional.cross_entropy(logits, on.targets)
    right = torch.ones(len(batch.questions), dtype=torch.bool, device=device)
    wrong = logits.argmax(-1) != on.targets
    right[on.question[wrong]] = False
    return loss, right


@torch.no_grad()
def validate(model, processor, *, items: int) -> dict[str, float]:
    """Share of exact answers by task and size on validation pictures, every question asked.

    A question counts as right if each token of its answer is the likeliest after the right ones before it,
    which is when greedy decoding gives the whole answer.
    """
    composer, device, found = batches.Composer(model, processor), model.device, defaultdict(list)
    for number, kind in enumerate(KINDS):
        for part in range(max(1, items // kind.items)):
            rng = np.random.default_rng([HELD_OUT, number, part])
            batch = composer(batches.sample(rng, kind, "validation"))
            right = answers(model, batch, device)[1]
            for question, good in zip(batch.questions, right.tolist(), strict=True):
                if question.task:
                    found[f"{question.task} {kind.side}"].append(good)
    return {name: sum(values) / len(values) for name, values in sorted(found.items())}


def restore(path: Path, model, parts, average) -> tuple[int, float]:
    """Go on from a saved state: the step reached and the hours spent."""
    if path.with_suffix(".pt").exists():
        sys.exit(
            f"{path.with_suffix('.pt')} was saved by an earlier version of this script; finish that run with "
            "that version, or delete the file to begin afresh"
        )
    if not path.exists():
        return 0, 0.0
    saved = states.read(path, {"model": model, "average": average}, parts)
    return saved["step"], saved["hours"]


def main(
    family: Annotated[str, typer.Argument(help=f"One of {', '.join(architectures.FAMILIES)}.")],
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint and its curves.")],
    state: Annotated[Path, typer.Option(help="Folder for the state that an interrupted run goes on from.")],
    steps: Annotated[int, typer.Option(help="Optimizer steps of the whole run.")] = 20_000,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 2e-3,
    size: Annotated[float, typer.Option(help="Factor on the items of a batch, for a GPU.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of weights and pictures.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves torch's choice.")] = 0,
    every: Annotated[
        int, typer.Option(help="Steps between validations, saved states and checkpoints.")
    ] = 250,
    start_from: Annotated[
        Path | None, typer.Option(help="Checkpoint whose equal weights to begin with.")
    ] = None,
) -> None:
    """Train a reader, or go on training it."""
    if threads:
        torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, processor = architectures.build(family, tasks.WORDS, seed=seed)
    if start_from:
        architectures.borrow(model, start_from)
    composer = batches.Composer(model, processor)
    average = copy.deepcopy(model).to(device)  # what is validated and saved
    model.to(device)
    if family == "qwen2_5_vl":  # one call for all windows instead of one each
        illava.patch(model, reduction=0, fast_windows=True)
    parts = optimizers(model, learning_rate)
    state.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    step, hours = restore(state / "state.safetensors", model, parts, average)
    kinds, losses, began = list(KINDS), [], time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        shown = bar.add_task(family, total=steps, completed=step)
        while step < steps:
            chances, ease = settings(step / steps)
            rng = np.random.default_rng([seed, step])
            kind = kinds[rng.choice(len(kinds), p=chances)]
            kind = Kind(kind.name, kind.side, kind.count, max(1, round(kind.items * size)))
            batch = composer(batches.sample(rng, kind, "train", ease=ease))
            loss, right = answers(model, batch, device)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in parts:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * rate(step / steps, step)
                optimizer.step()
                optimizer.zero_grad()
            move(average, model, step)
            step += 1
            losses.append((loss.detach(), right.float().mean()))
            if step % 50 == 0:
                loss, right = (float(torch.stack(x).mean()) for x in zip(*losses[-50:], strict=True))
                bar.console.print(f"step {step}: loss {loss:.3f}, right {right:.3f}")
            bar.update(shown, completed=step)
            if step % every == 0 or step == steps:
                spent = hours + (time.monotonic() - began) / 3600
                save(model, average, processor, parts, step, spent, losses, state, out)
                losses = []


def save(model, average, processor, parts, step, hours, losses, state, out) -> None:
    """Validate the averaged weights, note it, and write checkpoint and state."""
    scores = validate(average, processor, items=48)
    architectures.save(average, processor, out)
    loss, right = (float(torch.stack(values).mean()) for values in zip(*losses, strict=True))
    row = {"step": step, "hours": round(hours, 3), "loss": round(loss, 4), "right": round(right, 4)}
    row |= {name: round(score, 4) for name, score in scores.items()}
    path = out / "training.csv"
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if fresh:
            writer.writeheader()
        writer.writerow(row)
    # Last: what is noted twice is seen, what is lost is not.
    models = {"model": model, "average": average}
    states.write(state / "state.safetensors", models, parts, step=step, hours=hours)


if __name__ == "__main__":
    typer.run(main)
