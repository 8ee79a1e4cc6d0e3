"""Tiny random models of the real classes, and prompts for them, without processor or files."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import transformers
from packaging.version import Version

V5 = Version(transformers.__version__) >= Version("5")
IMAGE, VIDEO, START, END, PAD, EOS, VOCAB = 190, 191, 192, 193, 0, 199, 200
FAMILIES = ("qwen2_vl", "qwen2_5_vl")


def build(family: str, *, seed: int = 0, attention: str = "sdpa", dtype=torch.float32, layers: int = 4):
    """A random model with 4 encoder blocks (1 and 3 attend fully in Qwen2.5-VL) and 4 decoder layers."""
    text = dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
        rope_scaling={"type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 2]},
        bos_token_id=1, eos_token_id=EOS, pad_token_id=PAD,
    )  # fmt: skip
    ids = dict(
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END,
        tie_word_embeddings=False,
    )  # fmt: skip
    if family == "qwen2_5_vl":
        vision = dict(depth=4, hidden_size=32, num_heads=2, intermediate_size=48, out_hidden_size=32,
                      fullatt_block_indexes=[1, 3], window_size=56, patch_size=14)  # fmt: skip
        config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
        kind = transformers.Qwen2_5_VLForConditionalGeneration
    else:
        vision = dict(depth=4, embed_dim=32, num_heads=2, mlp_ratio=2, hidden_size=32, patch_size=14)
        config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
        kind = transformers.Qwen2VLForConditionalGeneration
    torch.manual_seed(seed)
    model = kind._from_config(config, attn_implementation=attention).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        # Wide enough that attention is far from uniform, so that ranks are not decided by rounding.
        if weight.ndim > 1:
            fan_in = weight[0].numel()
            scale = 1.5 if any(part in name for part in ("qkv", "q_proj", "k_proj")) else 0.5
            weight.data = torch.randn(weight.shape, generator=generator) * scale / fan_in**0.5
        elif name.endswith("bias"):
            weight.data = torch.randn(weight.shape, generator=generator) * 0.1
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None  # a random model should not stop early
    return model.to(dtype)


@dataclass
class Image:
    """A picture (`frames=1`) or video of a grid in patches, with seeded random pixels."""

    height: int
    width: int
    frames: int = 1
    video: bool = False
    seed: int = 0

    @property
    def grid(self):
        return (self.frames, self.height, self.width)

    @property
    def tokens(self):
        return self.frames * self.height * self.width // 4

    def pixels(self):
        generator = torch.Generator().manual_seed(self.seed + 1000 * self.height + self.width)
        return torch.randn(self.frames * self.height * self.width, 3 * 2 * 14 * 14, generator=generator)


def Video(frames, height, width, seed=0):
    return Image(height, width, frames, True, seed)


def row_ids(parts, seed=0):
    """Token ids of one prompt: ints are runs of random text, `Image`s their placeholders."""
    generator = torch.Generator().manual_seed(seed)
    ids = []
    for part in parts:
        if isinstance(part, int):
            ids += torch.randint(1, 180, (part,), generator=generator).tolist()
        else:
            ids += [START, *[VIDEO if part.video else IMAGE] * part.tokens, END]
    return ids


def prompt(*rows, side="left", dtype=torch.float32, seeds=None):
    """Inputs for `model(**inputs)` and `model.generate(**inputs)`.

    Args:
        rows: one list of parts per batch row.
        side: where shorter rows are padded.
    """
    seeds = range(len(rows)) if seeds is None else seeds
    ids = [row_ids(row, seed) for row, seed in zip(rows, seeds, strict=True)]
    length = max(map(len, ids))
    table = torch.full((len(ids), length), PAD)
    mask = torch.zeros(len(ids), length, dtype=torch.long)
    for row, line in enumerate(ids):
        place = slice(length - len(line), length) if side == "left" else slice(0, len(line))
        table[row, place] = torch.tensor(line)
        mask[row, place] = 1
    inputs = {"input_ids": table, "attention_mask": mask}
    for video, pixels, grid in (
        (False, "pixel_values", "image_grid_thw"),
        (True, "pixel_values_videos", "video_grid_thw"),
    ):
        pictures = [p for row in rows for p in row if not isinstance(p, int) and p.video == video]
        if pictures:
            inputs[pixels] = torch.cat([p.pixels() for p in pictures]).to(dtype)
            inputs[grid] = torch.tensor([p.grid for p in pictures])
    if V5:
        inputs["mm_token_type_ids"] = (table == IMAGE).int() + 2 * (table == VIDEO).int()
    return inputs


# Every kind of input a model takes, by name.
A, B, C = Image(8, 12), Image(12, 8, seed=1), Image(6, 6, seed=2)
V = Video(3, 6, 8)
PROMPTS = {
    "one picture": ([5, A, 7],),
    "several pictures": ([3, A, 4, B, 2, C, 6],),
    "video": ([4, V, 5],),
    "pictures and video": ([2, C, 3, V, 2, A, 4],),
    "text only": ([9],),
    "batch": ([5, A, 7], [3, C, 2, B, 9], [6], [2, V, 3]),
}
