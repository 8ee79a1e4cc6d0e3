"""What the readers' pictures are made of: handwritten digits, photographs and fonts, split once for all.

Digits are scikit-learn's (1,797 of 8 x 8 pixels, UCI optical recognition of handwritten digits), photographs
those that scikit-learn, scikit-image and matplotlib ship, fonts those of matplotlib. A digit, a photograph,
a font or a written string belongs to one split only: nothing a reader is tested on was seen in training.
"""

from __future__ import annotations

import functools
import string
import zlib
from pathlib import Path

import matplotlib
import numpy as np
import skimage.data
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits, load_sample_image

SPLITS = ("train", "validation", "test")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {
    "red": (225, 35, 35), "green": (40, 190, 60), "blue": (40, 70, 235), "yellow": (245, 225, 40),
    "white": (250, 250, 250), "pink": (250, 90, 210), "cyan": (40, 225, 235),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle")

_PHOTOGRAPHS = {
    "train": ("china", "hopper", "astronaut", "chelsea", "motorcycle_left", "retina", "hubble_deep_field"),
    "validation": ("rocket",),
    "test": ("flower", "coffee"),
}
_FONTS = {
    "train": (
        "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold",
        "DejaVuSerif", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBolIta", "cmss10", "cmr10",
    ),
    "validation": ("DejaVuSans-BoldOblique", "STIXGeneralItalic"),
    "test": ("DejaVuSerif-Bold", "DejaVuSansMono-Oblique", "STIXGeneralBol"),
}  # fmt: skip


@functools.cache
def photographs(split: str) -> tuple[Image.Image, ...]:
    """The photographs of a split, RGB, as PIL images of at least 320 pixels a side."""
    return tuple(_photograph(name) for name in _PHOTOGRAPHS[split])


def _photograph(name: str) -> Image.Image:
    if name in ("china", "flower"):
        return Image.fromarray(load_sample_image(f"{name}.jpg"))
    if name == "hopper":
        folder = Path(matplotlib.get_data_path()) / "sample_data"
        return Image.open(folder / "grace_hopper.jpg").convert("RGB")
    if name == "motorcycle_left":  # its own reader wants a download for the second picture of the pair
        folder = Path(skimage.data.__file__).parent
        return Image.open(folder / "motorcycle_left.png").convert("RGB")
    return Image.fromarray(getattr(skimage.data, name)()[..., :3])


@functools.cache
def digits(split: str) -> tuple[np.ndarray, ...]:
    """Handwritten digits of a split: for each number 0 to 9 an array `[n, 8, 8]` of ink in 0 to 1."""
    data = load_digits()
    # Every fifth is held out, in turn for validation and test: the set is ordered by writer, all take part.
    turn = np.arange(len(data.target)) % 10
    chosen = {"train": (turn != 0) & (turn != 5), "validation": turn == 0, "test": turn == 5}[split]
    return tuple(data.images[chosen & (data.target == number)] / 16.0 for number in range(10))


@functools.lru_cache(maxsize=40_000)
def ink(split: str, number: int, which: int, size_px: int) -> np.ndarray:
    """One handwritten digit enlarged to `[size_px, size_px]`, ink in 0 to 1 (float32)."""
    small = Image.fromarray(digits(split)[number][which].astype(np.float32), mode="F")
    large = np.asarray(small.resize((size_px, size_px), Image.Resampling.BICUBIC))
    return np.clip(1.6 * large - 0.15, 0, 1).astype(np.float32)


@functools.lru_cache(maxsize=256)
def shape_ink(name: str, size_px: int) -> np.ndarray:
    """A filled shape with soft edges, `[size_px, size_px]` in 0 to 1."""
    big = Image.new("L", (4 * size_px, 4 * size_px))
    draw, end = ImageDraw.Draw(big), 4 * size_px - 1
    if name == "circle":
        draw.ellipse((0, 0, end, end), fill=255)
    elif name == "square":
        draw.rectangle((end // 12, end // 12, end - end // 12, end - end // 12), fill=255)
    else:
        draw.polygon(((end // 2, 0), (0, end), (end, end)), fill=255)
    return np.asarray(big.resize((size_px, size_px), Image.Resampling.BOX), np.float32) / 255


@functools.cache
def font(name: str, size_px: int) -> ImageFont.FreeTypeFont:
    """A font of matplotlib at a size in pixels."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf", size_px)


def font_names(split: str) -> tuple[str, ...]:
    """The fonts a split writes with."""
    return _FONTS[split]


def belongs(text: str, split: str) -> bool:
    """Whether a string is of a split, by its checksum: 70 % to train, 10 % to validation, 20 % to test."""
    lowest, highest = {"train": (0, 70), "validation": (70, 80), "test": (80, 100)}[split]
    return lowest <= zlib.crc32(text.encode()) % 100 < highest


def short(rng: np.random.Generator, split: str) -> str:
    """One or two letters or digits, to learn to spell with; two are of the split, one is of all."""
    kind = (string.ascii_lowercase, string.digits)[int(rng.random() < 0.3)]
    while True:
        text = "".join(rng.choice(list(kind), size=rng.integers(1, 3)))
        if len(text) == 1 or belongs(text, split):
            return text


def written(rng: np.random.Generator, split: str) -> str:
    """A string to read: a pronounceable word of 3 or 4 letters or a number of 2 to 4 digits, of a split."""
    while True:
        if rng.random() < 0.6:
            kinds = ("bcdfghjkmnprstvwz", "aeiouy")
            first = int(rng.integers(2))
            letters = [rng.choice(list(kinds[(first + i) % 2])) for i in range(rng.integers(3, 5))]
            text = "".join(letters)
        else:
            text = "".join(str(digit) for digit in rng.integers(10, size=rng.integers(2, 5)))
        if belongs(text, split):
            return text
