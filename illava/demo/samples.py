"""Pictures and a clip that come with the page, and what to ask about them.

The small model of `checkpoints/` knows some sixty words and these kinds of questions;
`benchmarks/demo_samples.py` drew the files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "samples"


@dataclass(frozen=True)
class Sample:
    """Files, and a question about them."""

    names: tuple[str, ...]
    question: str

    @property
    def files(self) -> list[str]:
        """Where the files are."""
        return [str(FOLDER / name) for name in self.names]


SAMPLES = (
    Sample(("white.jpg",), "which digit is white ?"),
    Sample(("green.jpg",), "which digit is green ?"),
    Sample(("beside.jpg",), "what is left of the white digit ?"),
    Sample(("writing.jpg",), "what is written ?"),
    Sample(
        ("several_1.jpg", "several_2.jpg", "several_3.jpg", "several_4.jpg"),
        "in which picture is the green digit ?",
    ),
    Sample(("clip.mp4",), "in which order did the digits appear ?"),
)
