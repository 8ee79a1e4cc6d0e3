"""A checkpoint's model and processor, and errors that say what is wrong with a folder that is none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from illava.errors import CheckpointError, UnsupportedModelError
from illava.evaluate.random_weights import build_random
from illava.families import supported_models
from illava.weights import check_weights, first_line, load_model

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Loaded:
    """A model with its processor; make one yourself of what you have loaded already.

    Attributes:
        model: a supported `...ForConditionalGeneration`, unpatched.
        processor: its own, or `None`: then it can be timed, but not asked.
        name: of the checkpoint.
        random_weights: whether nobody trained it.
    """

    model: Any
    processor: Any
    name: str = "model"
    random_weights: bool = False

    @property
    def device(self) -> torch.device:
        return self.model.device

    def to_dict(self) -> dict[str, Any]:
        """What tells a figure's model from others, as plain values."""
        return {
            "model": self.name,
            "model_type": self.model.config.model_type,
            "device": device_name(self.device),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "random_weights": self.random_weights,
        }


def load(
    name: str | Path,
    *,
    device: str | None = None,
    dtype: str | None = None,
    attn: str = "sdpa",
    random_weights: bool = False,
) -> Loaded:
    """Load a checkpoint: a folder, or a name on the Hugging Face hub.

    Args:
        name: folder or name.
        device: for example `"cuda:1"`; by default `"cuda"` where there is one, else `"cpu"`.
        dtype: one of `DTYPES`; by default the checkpoint's own on a GPU, float32 on a CPU.
        attn: `"sdpa"`, `"eager"` or `"flash_attention_2"`.
        random_weights: build the model from its config alone. Its answers mean nothing, its speed is real.

    Raises:
        CheckpointError: no checkpoint, one without weights or with pickled ones (`*.bin`), or one whose
            files are broken; a device or dtype that is not there.
        UnsupportedModelError: a family illava does not know.
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    from transformers.utils import logging

    target = _device(device)
    number_type = _dtype(dtype)
    config = read_config(name)
    if random_weights:
        kind = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
        chosen = number_type or (torch.float32 if target == "cpu" else torch.bfloat16)
        model: Any = build_random(kind, config, device=target, dtype=chosen, attn=attn)
        return Loaded(model, _processor(name, needed=False), str(name), random_weights=True)
    default: Any = torch.float32 if target == "cpu" else "auto"
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = load_model(name, dtype=number_type or default, attn_implementation=attn)
    finally:
        if shown:
            logging.enable_progress_bar()
    return Loaded(model.to(target).eval(), _processor(name, needed=True), str(name))


def read_config(name: str | Path) -> Any:
    """The config of a checkpoint of a supported family.

    Raises:
        CheckpointError: no checkpoint.
        UnsupportedModelError: a family illava does not know.
    """
    import transformers
    from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

    folder = Path(name)
    if folder.is_file():
        raise CheckpointError(f"{name} is a file; give the folder of a checkpoint, with config.json in it")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{name} holds no config.json, so it is no checkpoint; give the folder that does"
        )
    if not folder.is_dir() and (folder.is_absolute() or str(name).startswith(".") or len(folder.parts) > 2):
        raise CheckpointError(f"{name} does not exist; give the folder of a checkpoint, or a name on the hub")
    try:
        values, _ = PretrainedConfig.get_config_dict(name)
        model_type = values.get("model_type")
        if model_type not in supported_models():
            raise UnsupportedModelError(
                f"{name} is a model of type {model_type!r}, which illava does not know; it knows "
                f"{', '.join(supported_models())}"
            )
        if model_type not in CONFIG_MAPPING:
            raise UnsupportedModelError(
                f"{name} is a model of type {model_type!r}, whose code is not in transformers "
                f"{transformers.__version__} but published beside its weights, and illava runs no such code; "
                "load the model yourself and call illava.patch"
            )
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{name} cannot be read: {first_line(error)}; give the folder of a checkpoint, or a name on "
            "the hub"
        ) from error


def check(name: str | Path) -> None:
    """See that a checkpoint could be loaded, without loading it.

    Raises:
        CheckpointError, UnsupportedModelError: as `load`, but for weights that are there and broken.
    """
    read_config(name)
    check_weights(name)


def device_name(device: torch.device) -> str:
    """As a figure should name it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def _device(device: str | None) -> str:
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise CheckpointError(f"device {device!r} is not known; give cpu, cuda or cuda:1") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise CheckpointError(
            f"device {device!r}: torch {torch.__version__} sees no GPU on this machine; give --device cpu"
        )
    return device


def _dtype(dtype: str | None) -> torch.dtype | None:
    if dtype is None:
        return None
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype {dtype!r} is not known; choose one of {', '.join(DTYPES)}")
    return getattr(torch, dtype)


def _processor(name: str | Path, *, needed: bool) -> Any:
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(name)
    except (OSError, ValueError, ImportError, TypeError, KeyError) as error:
        if not needed:
            return None
        raise CheckpointError(
            f"{name} has no processor that can be loaded: {first_line(error)}. Copy "
            "preprocessor_config.json, tokenizer.json and their like beside the weights"
        ) from error
