"""The model behind the page."""

from __future__ import annotations

from pathlib import Path

from illava.demo.asking import Asker, Prompt
from illava.demo.media import Limits, read
from illava.demo.samples import SAMPLES
from illava.errors import DemoError
from illava.evaluate.loading import load as load_checkpoint

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


def load(name: str, device: str | None = None, dtype: str | None = None, attn: str = "sdpa") -> Asker:
    """A model and its processor, ready to be asked; arguments as those of `illava.evaluate.load`.

    Raises:
        CheckpointError: no such checkpoint, or none that can be asked.
        UnsupportedModelError: not a model of a supported family.
    """
    loaded = load_checkpoint(name, device=device, dtype=dtype, attn=attn)
    asker = Asker(loaded.model, loaded.processor, Path(name).name if Path(name).is_dir() else name)
    sample = SAMPLES[0]
    asker.warm_up(Prompt([read(Path(file), Limits()) for file in sample.files], sample.question))
    return asker
