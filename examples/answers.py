"""Ask a model that really sees, with and without illava: `python examples/answers.py`.

The model is the reader in `checkpoints/`, a small genuine Qwen2.5-VL trained on drawn pictures; the questions
are about pictures and clips that it has not seen, made of digits, fonts and photographs it has not seen
either.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    import torch
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging as transformers_logging

    import illava

    ROOT = Path(__file__).resolve().parent.parent
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from readers import batches, tasks
except ModuleNotFoundError as missing:
    raise SystemExit(
        f'answers.py needs {missing.name}, which is not installed: run `pip install ".[examples]"`'
    ) from missing

READER = ROOT / "checkpoints" / "qwen2_5_vl"
SHOWN = 2  # questions of each task in the table


def say(model, composer: batches.Composer, item: tasks.Item) -> str:
    """The model's answer to an item's question."""
    inputs = composer.prompt(item, item.questions[0].text).to(model.device)
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    return composer.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def table(folder: Path, reduction: float, items: int, console: Console) -> Table:
    """Answers to `items` held-out questions of each task, the first few shown, all of them counted."""
    transformers_logging.disable_progress_bar()
    model = AutoModelForImageTextToText.from_pretrained(folder, use_safetensors=True).float().eval()
    composer = batches.Composer(model, AutoProcessor.from_pretrained(folder))
    shown = Table(title=f"{folder.name} reader, {reduction:.1%} of the visual tokens removed")
    for column in ("question", "answer", "unpatched", "patched"):
        shown.add_column(column)
    for task in track(tasks.TASKS, description="asking", console=console, transient=True):
        right = [0, 0]
        for number in range(items):
            item = tasks.held_out_item(task, "test", number)
            question = item.questions[0]
            plain = say(model, composer, item)
            with illava.patch(model, reduction=reduction):
                merged = say(model, composer, item)
            for side, said in enumerate((plain, merged)):
                right[side] += said == question.answer
            if number < SHOWN:
                cells = [
                    f"[green]{said}[/]" if said == question.answer else f"[red]{said}[/]"
                    for said in (plain, merged)
                ]
                shown.add_row(question.text, question.answer, *cells)
        shown.add_row(
            f"[dim]{task}: right of {items}[/]", "", *(f"[dim]{n}[/]" for n in right), end_section=True
        )
    return shown


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reader", type=Path, default=READER, help="folder of a reader")
    parser.add_argument("--reduction", type=float, default=0.778, help="share of the visual tokens to remove")
    parser.add_argument("--items", type=int, default=10, help="questions of each task")
    options = parser.parse_args()
    if not (options.reader / "config.json").is_file():
        raise SystemExit(f"--reader {options.reader} holds no checkpoint; train one: see benchmarks/readers")
    console = Console()
    with torch.inference_mode():
        console.print(table(options.reader, options.reduction, options.items, console))


if __name__ == "__main__":
    try:
        main()
    except illava.IllavaError as error:  # its message says what to do; a traceback adds nothing
        raise SystemExit(f"illava: {error}") from error
