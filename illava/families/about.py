"""What a family's file says about itself, for people: `illava models` and the README's table show it."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class About:
    """One architecture.

    Attributes:
        title: as its makers write it.
        merge_unit: the patches that are kept or dropped together.
        encoder_blocks, decoder_layers: where tokens merge by attention (`merge="recycle"`) unless layers
            are named, counted from 0.
        transformers: versions it was run on.
    """

    title: str
    merge_unit: str
    encoder_blocks: str
    decoder_layers: str
    transformers: tuple[str, ...] = ("4.57.6", "5.23.0")

    def to_dict(self) -> dict[str, object]:
        """As plain values."""
        return asdict(self)
