"""What the tests of large jobs have a job do, and the job as a process that can be killed."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_sample_image

from illava import jobs


@dataclass(frozen=True)
class Stuck:
    """Takes its time for each batch, and after so many gets stuck until it is killed."""

    after: int = sys.maxsize
    seconds: float = 0.0

    def ahead_of(self, work):
        """The same work, stuck there."""
        batches = itertools.count()

        def stuck(items):
            time.sleep(self.seconds)
            while next(batches) >= self.after:
                time.sleep(1)
            return work(items)

        return stuck


@dataclass(frozen=True)
class Colours:
    """The mean colour of a picture."""

    stuck: Stuck = Stuck()

    def __call__(self):
        return self.stuck.ahead_of(self.work)

    def work(self, items):
        return [
            {"colour": list(item.pictures[0].resize((1, 1)).getpixel((0, 0))), "pid": os.getpid()}
            for item in items
        ]


@dataclass(frozen=True)
class Answers:
    """What a patched model of a small checkpoint folder says."""

    checkpoint: str
    stuck: Stuck = Stuck()

    def __call__(self):
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        import illava

        torch.set_num_threads(1)
        model = AutoModelForImageTextToText.from_pretrained(self.checkpoint).eval()
        processor = AutoProcessor.from_pretrained(self.checkpoint)
        handle = illava.patch(model, reduction=0.778)

        def work(items):
            messages = [
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": item.prompt}]}]
                for item in items
            ]
            texts = [
                processor.apply_chat_template(m, tokenize=False, add_generation_prompt=True) for m in messages
            ]
            inputs = processor(text=texts, images=[picture for item in items for picture in item.pictures],
                               padding=True, padding_side="left", return_tensors="pt")  # fmt: skip
            said = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs.input_ids.shape[1] :]
            tokens = [picture.final_tokens for picture in handle.report.pictures]
            return [
                {"said": ids.tolist(), "tokens": count, "pid": os.getpid()}
                for ids, count in zip(said, tokens, strict=True)
            ]

        return self.stuck.ahead_of(work)


def pictures(folder: Path, count: int) -> Path:
    """Crops of a photograph in many sizes, and two files that are no pictures."""
    folder.mkdir(parents=True)
    photograph = Image.fromarray(load_sample_image("china.jpg"))
    for i in range(count):
        box = (3 * i % 300, 2 * i % 200, 3 * i % 300 + 60 + i % 7 * 20, 2 * i % 200 + 60 + i % 5 * 30)
        photograph.crop(box).save(folder / f"{i:03}.png")
    whole = (folder / "000.png").read_bytes()
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.jpg").write_text("no picture")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--engine", default="process")
    parser.add_argument("--checkpoint", help="answers of this model; without one, colours")
    parser.add_argument("--stuck-after", type=int, default=sys.maxsize, help="batches")
    parser.add_argument("--seconds", type=float, default=0.0, help="of each batch")
    options = parser.parse_args()
    stuck = Stuck(options.stuck_after, options.seconds)
    factory = Answers(options.checkpoint, stuck) if options.checkpoint else Colours(stuck)
    settings = {"data": str(options.data), "work": type(factory).__name__, "engine": options.engine}
    print(
        jobs.run(
            jobs.read_items(options.data), factory, options.results, settings=settings,
            batch_size=4, engine=options.engine, workers=2 if options.engine == "ray" else None,
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
