"""The readers' questions as files: `python benchmarks/questions.py questions`.

Writes pictures (PNG) and clips (FFV1 in Matroska, without loss) of held-out items, and `questions.jsonl` with
a line for each, the data that `illava run`, `fidelity` and `plan` take. They do not read the answer.

    {"key": "find-0", "image": "find-0.png", "prompt": "which digit is red ?", "answer": "seven"}
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import av
import numpy as np
from PIL import Image
from rich.progress import track

from readers import material, tasks


def write_questions(
    folder: Path, names: tuple[str, ...], items: int, *, split: str = "validation", side: int = 192
) -> Path:
    """Write the first `items` of each task, the tasks in turns, and return the JSONL file.

    Args:
        names: of `tasks.TASKS`.
        side: pixels of a picture's side, for tasks of one picture.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [(task, number) for number in range(items) for task in names]
    lines = [
        _write(folder, f"{task}-{number}", tasks.held_out_item(task, split, number, side=side))
        for task, number in track(wanted, "drawing", transient=True)
    ]
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _write(folder: Path, key: str, item: tasks.Item) -> dict[str, object]:
    """Write an item's pictures or its clip; its line."""
    (question,) = item.questions
    said = {"prompt": question.text, "answer": question.answer}
    if item.video is not None:
        _write_clip(folder / f"{key}.mkv", item.video)
        return {"key": key, "video": f"{key}.mkv", **said}
    single = len(item.pictures) == 1
    names = [f"{key}.png" if single else f"{key}-{place}.png" for place in range(len(item.pictures))]
    for name, pixels in zip(names, item.pictures, strict=True):
        Image.fromarray(pixels).save(folder / name)
    return {"key": key, "image": names[0] if single else names, **said}


def _write_clip(path: Path, frames: np.ndarray) -> None:
    """`[frames, height, width, 3]` uint8, at 24 frames a second."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("ffv1", rate=24)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "bgr0"
        for pixels in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode())


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("folder", type=Path, help="where to write; made if it is not there")
    add("--tasks", nargs="+", default=["find", "count"], choices=tasks.TASKS)
    add("--items", type=int, default=50, help="of each task")
    add("--side", type=int, default=192, choices=(96, 128, 192, 256), help="pixels of a picture's side")
    add("--split", default="validation", choices=[s for s in material.SPLITS if s != "train"])
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    path = write_questions(
        options.folder, tuple(options.tasks), options.items, split=options.split, side=options.side
    )
    print(f"{len(options.tasks) * options.items} questions in {path}")


if __name__ == "__main__":
    main()
