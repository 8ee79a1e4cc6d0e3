"""A checkpoint, patched, that answers conversations: what every harness's model is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from illava.errors import DataError
from illava.extras import pillow
from illava.generation import answer_lengths, processed, tokenizer_of
from illava.jobs.pictures import DEFAULT_FRAMES, read_clip
from illava.patching import Handle, patch
from illava.plan import Plan
from illava.weights import load_model


@dataclass(frozen=True)
class Answerer:
    """A patched model with its processor.

    Attributes:
        model, processor: as transformers loads them.
        handle: illava's; `handle.report` tells what the last batch lost.
        frames: of each video, spread evenly over it.
    """

    model: Any
    processor: Any
    handle: Handle
    frames: int = DEFAULT_FRAMES

    @classmethod
    def load(
        cls,
        checkpoint: str,
        plan: Plan | Callable[[Any], Plan],
        *,
        device: str | torch.device = "cpu",
        device_map: str | None = None,
        dtype: str = "auto",
        attn: str | None = None,
        frames: int = DEFAULT_FRAMES,
        **of_processor: Any,
    ) -> Answerer:
        """Load a checkpoint of a supported family and patch it.

        Args:
            checkpoint: a folder, or a name on the hub.
            plan: or a function that makes one for the model.
            device_map: instead of `device`, how to spread the model over several.
            of_processor: for the processor's `from_pretrained`, such as `max_pixels`.

        Raises:
            CheckpointError: no weights there, none but pickles (`*.bin`), or broken ones.
        """
        from transformers import AutoProcessor

        options: dict[str, Any] = {"dtype": dtype}
        if attn is not None:
            options["attn_implementation"] = attn
        if device_map is not None:
            options["device_map"] = device_map
        model = load_model(checkpoint, **options).eval()
        if device_map is None:
            model = model.to(device)
        processor = AutoProcessor.from_pretrained(checkpoint, **of_processor)
        made = plan if isinstance(plan, Plan) else plan(model)
        return cls(model, processor, patch(model, plan=made), frames)

    @torch.inference_mode()
    def answer(
        self, conversations: Sequence[Sequence[Mapping[str, Any]]], **generation: Any
    ) -> list[tuple[str, int]]:
        """Answers to conversations, and how many tokens each has, its end included.

        Args:
            conversations: messages in transformers' form; the content of each is a list of
                `{"type": "text", "text": ...}`, `{"type": "image", "image": PIL or path}` and
                `{"type": "video", "video": path}`.
            generation: for `generate`.

        Raises:
            DataError: a video that cannot be read, or for a model that takes none.
        """
        inputs = self.inputs(conversations)
        ids = self.model.generate(**inputs, **generation)[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer_of(self.processor).batch_decode(ids, skip_special_tokens=True)
        return list(zip(texts, answer_lengths(self.model, ids, generation.get("eos_token_id")), strict=True))

    def inputs(self, conversations: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
        """Conversations as inputs of `generate`: one batch, padded on the left, on the model's device."""
        rows = [
            [part for message in messages for part in _parts(message["content"])]
            for messages in conversations
        ]
        images = [[_picture(part["image"]) for part in row if part["type"] == "image"] for row in rows]
        films = [part["video"] for row in rows for part in row if part["type"] == "video"]
        if films and getattr(self.processor, "video_processor", None) is None:  # it would leave them out
            raise DataError(f"{self.model.name_or_path} takes pictures only; leave {films[0]} out")
        clips = [self._clip(file) for file in films]
        texts = [
            self.processor.apply_chat_template(
                [_without_media(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
            for messages in conversations
        ]
        return processed(self.model, self.processor, texts, images, clips)

    def _clip(self, file: str | Path) -> tuple[Any, Any]:
        try:
            return read_clip(Path(file), self.frames)
        except Exception as error:  # what a broken file raises is up to its reader
            raise DataError(f"{file} cannot be read: {error or type(error).__name__}") from error


def _parts(content: Any) -> list[Mapping[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _picture(picture: Any) -> Any:
    if isinstance(picture, (str, Path)):
        pil = pillow()
        picture = pil.ImageOps.exif_transpose(pil.Image.open(picture))
    return picture.convert("RGB")


def _without_media(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates read it: they ask what kind each part is, and some try to load the rest."""
    parts = [
        {"type": "text", "text": part["text"]} if part["type"] == "text" else {"type": part["type"]}
        for part in _parts(message["content"])
    ]
    return {"role": message["role"], "content": parts}
