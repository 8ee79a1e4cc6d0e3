"""Pictures of where the tokens went: `python examples/see.py` draws those of docs/see.md.

The model is the reader in `checkpoints/`, a small genuine Qwen2.5-VL; it is asked about pictures and a clip
that it has not seen, and about a photograph.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    import numpy as np
    import torch
    from PIL import Image
    from sklearn.datasets import load_sample_image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import illava

    ROOT = Path(__file__).resolve().parent.parent
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from readers import batches, tasks
except ModuleNotFoundError as missing:
    raise SystemExit(
        f'see.py needs {missing.name}, which is not installed: run `pip install ".[examples,see]"`'
    ) from missing

READER = ROOT / "checkpoints" / "qwen2_5_vl"
QUALITY, WIDEST, TALLEST = 82, 1400, 1000  # of the files, in pixels: a page shows no more
PHOTOGRAPH = 384, 256


def photograph() -> tasks.Item:
    """A question about a photograph, which the reader was not taught to answer."""
    picture = Image.fromarray(load_sample_image("china.jpg")).resize(PHOTOGRAPH, Image.Resampling.LANCZOS)
    return tasks.Item((np.asarray(picture),), None, (tasks.Question("", "what is written ?", ""),))


def draw(model, composer: batches.Composer, item: tasks.Item, file: Path, plan: illava.Plan, **how) -> str:
    """Ask an item's question with tracing on and draw what became of its pictures; returns the answer."""
    question = item.questions[0].text
    inputs = composer.prompt(item, question).to(model.device)
    with illava.patch(model, plan=plan, trace=True) as handle:
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    answer = composer.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    title = f"{question[0].upper()}{question[1:-2]}?   {answer.strip()}" if item.questions[0].task else None
    shown = list(item.pictures) if item.video is None else item.video
    picture = illava.visualize(handle.report, shown, title=title, **how)
    picture.thumbnail((WIDEST, TALLEST), Image.Resampling.LANCZOS)
    picture.save(file, quality=QUALITY, optimize=True)
    return answer.strip()


def main() -> None:
    """Draw every picture and say which file it is in."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reader", type=Path, default=READER, help="folder of a reader")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images", help="folder for the pictures")
    parser.add_argument("--reduction", type=float, default=2 / 3, help="share of the visual tokens to remove")
    options = parser.parse_args()
    if not (options.reader / "config.json").is_file():
        raise SystemExit(f"--reader {options.reader} holds no checkpoint; train one: see benchmarks/readers")
    options.out.mkdir(parents=True, exist_ok=True)
    model = AutoModelForImageTextToText.from_pretrained(options.reader, use_safetensors=True).float().eval()
    composer = batches.Composer(model, AutoProcessor.from_pretrained(options.reader))
    held_out = tasks.held_out_item
    pictures = {
        "see.jpg": (held_out("find", "test", 1), {"merges": (0, 4, 6)}),
        "see_importance.jpg": (held_out("find", "test", 1), {"merge": "recycle", "importance": True}),
        "see_several.jpg": (held_out("several", "test", 0, pictures=3), {"merges": (4, 6)}),
        "see_video.jpg": (held_out("video", "test", 2), {"merges": (4, 6), "frames": 4}),
        "see_photograph.jpg": (photograph(), {"merges": (4, 6)}),
    }
    with torch.inference_mode():
        for name, (item, how) in pictures.items():
            plan = illava.Plan(reduction=options.reduction, merge=how.pop("merge", "bipartite"))
            answer = draw(model, composer, item, options.out / name, plan, **how)
            print(f"{options.out / name}: {item.questions[0].text} {answer}")


if __name__ == "__main__":
    try:
        main()
    except illava.IllavaError as error:  # its message says what to do; a traceback adds nothing
        raise SystemExit(f"illava: {error}") from error
