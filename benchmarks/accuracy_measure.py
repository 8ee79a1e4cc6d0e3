"""One measurement of accuracy.py: a reader, a method, a task, answered by `generate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import nn

import illava
from illava import Plan
from readers import architectures, batches, states, tasks
from readers.tasks import Item
from rivals import RIVALS, Rival, area, match_compute

UNIT_PX = architectures.UNIT
PER_PASS = {"several": 8, "video": 8}  # items of one batch; others 16
BUDGETS = ("tokens", "compute")
NEAR = 1.25  # a picture counts as shrunk if its tokens, which come in rows and columns, are as near as this


@dataclass(frozen=True)
class Cell:
    """What is measured.

    Attributes:
        reader: family of the reader, the name of its folder.
        method: a rival's name, or a plan's of `accuracy_ablations`.
        reduction: what illava is asked for, which the method is matched to.
        budget: `"tokens"`: as many tokens after the last stage; `"compute"`: as much visual-token compute.
        task: one of `tasks.TASKS`.
        split: `"validation"` or `"test"`.
    """

    reader: str
    method: str
    reduction: float
    budget: str
    task: str
    split: str

    @property
    def key(self) -> tuple[str, ...]:
        """What tells it from all others, as a CSV holds it."""
        return (
            self.reader, self.method, f"{self.reduction:.4f}", self.budget, self.task, self.split
        )  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """A trained reader and what turns items into its inputs."""

    name: str
    model: nn.Module
    composer: batches.Composer
    fingerprint: str

    def visual_tokens(self, item: Item) -> int:
        """Visual tokens of one picture, or of the video, of an item."""
        inputs = self.composer.prompt(item, "?")
        config = self.model.config
        ids = [getattr(config, name, None) for name in ("image_token_id", "video_token_id")]
        count = int(sum((inputs["input_ids"] == i).sum() for i in ids if i is not None))
        return count // max(1, len(item.pictures))

    @torch.inference_mode()
    def layout(self, item: Item) -> dict[str, int]:
        """Frames or tiles of an item's first picture, and its visual tokens, as `rivals.area` takes them.

        As the model is really handed them: to InternVL a video is one picture a frame.
        """
        inputs = self.composer.prompts([item], ["?"]).to(self.model.device)
        with illava.patch(self.model, reduction=0.5) as handle:
            self.model(**inputs)
            first = handle.report.pictures[0]
        return {"visual_tokens": first.tokens, "frames": first.frames}


def load(folder: Path, device: torch.device) -> Reader:
    """The reader of a checkpoint folder, in float32 on a CPU and in bfloat16 elsewhere."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16, use_safetensors=True
    )
    processor = transformers.AutoProcessor.from_pretrained(folder)
    composer = batches.Composer(model, processor)
    return Reader(folder.name, model.to(device).eval(), composer, states.fingerprint(folder))


@dataclass(frozen=True)
class Method:
    """A method made ready for one reader and one size of picture.

    Attributes:
        patch: the context in which the model works by it.
        prepare: what it does to pictures and videos.
        final_ratio, area: what it leaves, and what it computes; of the visual tokens.
    """

    patch: Callable[[], Any]
    prepare: Callable[[Any], Any]
    final_ratio: float
    area: float


def ready(reader: Reader, cell: Cell, item: Item, plans: dict[str, Callable[..., Plan]]) -> Method | str:
    """The cell's method at its strength, or why it has none."""
    layout = reader.layout(item)
    rival = RIVALS.get(cell.method) or Rival(
        cell.method, "", "both", plan_of=lambda seams, ratio: plans[cell.method](seams, 1 - ratio)
    )
    final_ratio = 1 - cell.reduction
    if cell.budget == "compute" and rival.stages != "none":
        # Of one piece, so that whole tokens of small tiles and frames do not move what all are held to.
        whole = reader.visual_tokens(item)
        target = area(reader.model, RIVALS["illava recycle"], visual_tokens=whole, final_ratio=final_ratio)
        match = match_compute(reader.model, rival, target=target, **layout)
        if match.final_ratio is None:
            return match.reason
        final_ratio = match.final_ratio
    if cell.method == "unpatched" or cell.budget == "tokens":
        final_ratio = 1.0 if cell.method == "unpatched" else 1 - cell.reduction
    made = Method(
        patch=lambda: rival.patch(reader.model, final_ratio=final_ratio),
        prepare=lambda x: rival.prepare([x], final_ratio=final_ratio, unit=UNIT_PX)[0],
        final_ratio=final_ratio,
        area=area(reader.model, rival, final_ratio=final_ratio, **layout),
    )
    if rival.resize is None:
        return made
    shown = reader.visual_tokens(prepared(item, made)) / reader.visual_tokens(item)
    if shown > NEAR * final_ratio:
        return f"its picture still has {shown:.0%} of the tokens, as whole tiles do; asked {final_ratio:.1%}"
    return replace(made, final_ratio=shown, area=shown)


def prepared(item: Item, method: Method) -> Item:
    """The item as the method shows it to the model."""
    video = None if item.video is None else method.prepare(item.video)
    pictures = tuple(np.asarray(method.prepare(Image.fromarray(x))) for x in item.pictures)
    return Item(pictures, video, item.questions)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's random state set for a method that draws, and put back."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@torch.inference_mode()
def answer(reader: Reader, items: list[Item]) -> list[str]:
    """What the model, patched or not, says to each item's question."""
    inputs = reader.composer.prompts(items, [item.questions[0].text for item in items])
    inputs = inputs.to(reader.model.device)
    ids = reader.model.generate(**inputs, do_sample=False, max_new_tokens=8)
    said = reader.composer.tokenizer.batch_decode(
        ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return [text.strip() for text in said]


def measure(
    reader: Reader, method: Method, cell: Cell, numbers: range, progress: Callable[[int], None]
) -> list[bool]:
    """Which of the items are answered rightly, word for word."""
    right: list[bool] = []
    step = PER_PASS.get(cell.task, 16)
    with method.patch(), seeded(0):
        for start in range(numbers.start, numbers.stop, step):
            items = [
                prepared(tasks.held_out_item(cell.task, cell.split, number), method)
                for number in range(start, min(start + step, numbers.stop))
            ]
            said = answer(reader, items)
            right += [a == item.questions[0].answer for a, item in zip(said, items, strict=True)]
            progress(len(items))
    return right


def versions() -> dict[str, str]:
    """What a figure was measured with."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {
        "illava": illava.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": device,
    }


def pack(right: list[bool]) -> str:
    """Right and wrong, item by item, as hexadecimal."""
    return np.packbits(np.array(right, bool)).tobytes().hex()


def unpack(text: str, count: int) -> np.ndarray:
    """The reverse of `pack`: `[count]` bool."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=count).astype(bool)
