"""What every small model of the zoo shares: pictures, words, weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import transformers
from packaging.version import Version
from PIL import Image as PIL

VERSION = Version(transformers.__version__)
V5 = Version("5") <= VERSION
WORDS = 150


@dataclass(frozen=True)
class Image:
    """A picture with seeded random pixels."""

    height: int
    width: int
    seed: int = 0

    def pil(self) -> PIL.Image:
        noise = np.random.default_rng((self.seed, self.height, self.width))
        return PIL.fromarray(noise.integers(0, 256, (self.height, self.width, 3), dtype=np.uint8))


@dataclass(frozen=True)
class Video:
    """A video with seeded random pixels, one frame a second."""

    frames: int
    height: int
    width: int
    seed: int = 0

    def array(self) -> np.ndarray:
        """`[T, H, W, 3]` uint8."""
        noise = np.random.default_rng((self.seed, self.frames, self.height, self.width))
        return noise.integers(0, 256, (self.frames, self.height, self.width, 3), dtype=np.uint8)


def tokenizer(special: list[str], *, pad: str, eos: str, kind=None, **named: str):
    """A word-level tokenizer: the special tokens, then `w0`, `w1`, ..., of which prompts are made.

    Args:
        special: every token that is not a word, the placeholders among them.
        pad, eos: two of them.
        kind: its class, where a family's processor insists on one.
        named: further attributes for a family's processor, as `image_token="<image>"`.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate([*special, *(f"w{i}" for i in range(WORDS))])}
    vocabulary["<unk>"] = len(vocabulary)
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = (kind or transformers.PreTrainedTokenizerFast)(
        tokenizer_object=backend, pad_token=pad, eos_token=eos, unk_token="<unk>", extra_special_tokens=named
    )
    # Said here and not above: transformers 5 takes the named tokens for all there are, and would not cut
    # the others out of text in which no space is around them.
    made.add_tokens(special, special_tokens=True)
    made.model_input_names = ["input_ids", "attention_mask"]  # 4.57 adds token_type_ids, which no model takes
    return made


def words(count: int, generator: torch.Generator) -> str:
    """Random words."""
    return " ".join(f"w{i}" for i in torch.randint(0, WORDS, (count,), generator=generator).tolist())


def scale_weights(model, seed: int):
    """Random weights wide enough that attention is far from uniform: rounding must not decide ranks."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            fan_in = weight[0].numel()
            scale = 1.5 if any(part in name for part in ("qkv", "q_proj", "k_proj")) else 0.5
            weight.data = torch.randn(weight.shape, generator=generator) * scale / fan_in**0.5
        elif name.endswith("bias"):
            weight.data = torch.randn(weight.shape, generator=generator) * 0.1
    return model
