"""The model behind the page."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from illava.demo.asking import Asker, Prompt
from illava.demo.media import Limits, read
from illava.demo.samples import SAMPLES
from illava.errors import DemoError

READER = Path("checkpoints", "qwen2_5_vl")


def default_model() -> str:
    """The small trained model that comes with a clone of illava: beside the package, or from here.

    Raises:
        DemoError: there is none; says what to do.
    """
    for root in (Path(__file__).resolve().parents[2], Path.cwd()):
        if (root / READER / "config.json").is_file():
            return str(root / READER)
    raise DemoError(
        f"no model is named and {READER} is not here: run from a clone of illava, or name one, for example "
        "illava demo --model Qwen/Qwen2.5-VL-3B-Instruct"
    )


def load(name: str, device: str | None = None, dtype: str | None = None) -> Asker:
    """A model and its processor, ready to be asked.

    Args:
        name: folder or name of a checkpoint.
        device: for example `"cuda"`; by default a GPU where there is one.
        dtype: for example `"bfloat16"`, which is the default on CUDA; elsewhere `"float32"`.

    Raises:
        DemoError: no such checkpoint, or none that takes pictures.
        UnsupportedModelError: not a model of a supported family.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind = getattr(torch, dtype or ("bfloat16" if where.type == "cuda" else "float32"), None)
    if not isinstance(kind, torch.dtype):
        raise DemoError(f"--dtype {dtype} is no type of numbers; take float32, bfloat16 or float16")
    try:
        processor = AutoProcessor.from_pretrained(name)
        model: torch.nn.Module = AutoModelForImageTextToText.from_pretrained(name, dtype=kind)
    except (OSError, ValueError) as error:
        raise DemoError(
            f"{name} cannot be loaded as a model that takes pictures: {str(error).splitlines()[0]}"
        ) from error
    if getattr(processor, "chat_template", None) is None:
        raise DemoError(f"{name} has no chat template; name a checkpoint that was trained to answer")
    asker = Asker(model.to(where).eval(), processor, Path(name).name if Path(name).is_dir() else name)
    sample = SAMPLES[0]
    asker.warm_up(Prompt([read(Path(file), Limits()) for file in sample.files], sample.question))
    return asker
