"""Which tokens of a call came from pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from illava.errors import UnsupportedInputError


@dataclass(frozen=True)
class VisualInput:
    """Which tokens of one call came from pictures.

    Attributes:
        segment: `[B, L]` int64 on the CPU: the number of the picture or video a token belongs to,
            -1 for text and padding.
        kinds: `"image"` or `"video"` per segment.
        tokens: visual tokens per segment in this call.
        encoded_units: per segment, the merge units of each grid it was encoded as (one grid, or a
            picture's tiles), in the encoder's order; `None` where the model's packing tells.
    """

    segment: Tensor
    kinds: tuple[str, ...]
    tokens: tuple[int, ...]
    encoded_units: tuple[tuple[int, ...] | None, ...]

    def expanded(self, rows: int, length: int) -> VisualInput:
        """The same for a batch whose rows were repeated one by one, as for beams.

        Raises:
            UnsupportedInputError: of another length, or rows that are no multiple.
        """
        own = len(self.segment)
        if self.segment.shape[1] != length or rows % own:
            raise UnsupportedInputError(
                f"the language model is called with {rows} x {length} tokens where its pictures are known "
                f"for {own} x {self.segment.shape[1]}; pass the prompt in one call (no prefill_chunk_size)"
            )
        repeats = rows // own
        if repeats == 1:
            return self
        order: list[int] = []
        lines: list[Tensor] = []
        for row in self.segment:
            numbers = sorted(set(row[row >= 0].tolist()))
            for _ in range(repeats):
                table = torch.full((len(self.kinds) + 1,), -1)  # the last for text, which is -1
                table[numbers] = torch.arange(len(order), len(order) + len(numbers))
                lines.append(table[row])
                order += numbers
        return VisualInput(
            torch.stack(lines),
            tuple(self.kinds[i] for i in order),
            tuple(self.tokens[i] for i in order),
            tuple(self.encoded_units[i] for i in order),
        )


# Of each picture its visual tokens, and the merge units of each grid it is encoded as, if known.
Pictures = Sequence[tuple[int, tuple[int, ...] | None]]


def visual_input(
    model: nn.Module, call: Mapping[str, Any], pictures: Mapping[str, Pictures]
) -> VisualInput | None:
    """Find the tokens of pictures in a call by its placeholders; `None` if it brings no picture.

    Args:
        model: the model called, for its placeholder tokens.
        call: its arguments by name.
        pictures: for `"image"` and `"video"`, those the call brings.
    """
    return visual_tokens({kind: placeholders(model, call, kind) for kind in pictures}, pictures)


def visual_tokens(places: Mapping[str, Tensor], pictures: Mapping[str, Pictures]) -> VisualInput | None:
    """Which tokens belong to which picture; `None` if there is no picture.

    Placeholders and features correspond in reading order, so the sizes of the features say where one
    picture ends and the next begins.

    Args:
        places: for `"image"` and `"video"`, where its tokens stand, `[B, L]` bool on the CPU.
        pictures: likewise, those the call brings.
    """
    segment: Tensor | None = None
    kinds: list[str] = []
    tokens: list[int] = []
    units: list[tuple[int, ...] | None] = []
    for kind, found in pictures.items():
        place = places[kind]
        if segment is None:
            segment = torch.full(place.shape, -1, dtype=torch.long)
        counts = torch.tensor([count for count, _ in found], dtype=torch.long)
        numbers = torch.arange(len(kinds), len(kinds) + len(found)).repeat_interleave(counts)
        if int(place.sum()) != len(numbers):
            return None  # the model itself reports features and placeholders that do not match
        segment[place] = numbers
        kinds += [kind] * len(found)
        tokens += counts.tolist()
        units += [grids for _, grids in found]
    if segment is None or not tokens:
        return None
    return VisualInput(segment, tuple(kinds), tuple(tokens), tuple(units))


def placeholders(model: nn.Module, call: Mapping[str, Any], kind: str) -> Tensor:
    """Where a call's tokens stand for an `"image"` or a `"video"`: `[B, L]` bool on the CPU."""
    config: Any = model.config
    token = getattr(config, f"{kind}_token_id", None)
    if token is None:
        token = getattr(config, f"{kind}_token_index")
    if call.get("input_ids") is not None:
        return call["input_ids"].cpu() == token
    embedding = model.get_input_embeddings().weight[token]
    return (call["inputs_embeds"] == embedding.to(call["inputs_embeds"].device)).all(-1).cpu()


def runs(place: Tensor) -> list[int]:
    """Lengths of the runs of placeholders in `[B, L]`, in reading order; a run ends with its row."""
    edges = torch.nn.functional.pad(place.long(), (1, 1)).diff(dim=1)  # [B, L + 1]
    starts, ends = (edges == 1).nonzero(), (edges == -1).nonzero()
    return (ends - starts)[:, 1].tolist()


def feature_lengths(features: Any) -> list[int]:
    """Tokens per picture of a model's features: one tensor per picture, or a batch of them."""
    if isinstance(features, Tensor) and features.ndim == 2:
        return [len(features)]
    return [len(f) for f in features]
