"""What the Qwen-VL families share: placeholders, markers, the way to call a processor, random weights."""

from __future__ import annotations

import torch
import transformers

from zoo.common import V5, Image, scale_weights, tokenizer, words

PAD, EOS = "<|endoftext|>", "<|im_end|>"
START, END = "<|vision_start|>", "<|vision_end|>"
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
# transformers 5 warns unless it is told whether to cap the pixels of a frame; 4.57 has no cap.
CAP = {"cap_pixels_per_frame": False} if V5 else {}
SPECIAL = [PAD, EOS, START, END, IMAGE, VIDEO]


def qwen_tokenizer(more: tuple[str, ...] = ()):
    """The zoo's tokenizer with Qwen's markers and placeholders, and `more` tokens."""
    kind = None if V5 else transformers.Qwen2TokenizerFast  # the processors of 4.57 insist on it
    return tokenizer([*SPECIAL, *more], pad=PAD, eos=EOS, kind=kind, image_token=IMAGE, video_token=VIDEO)


def image_processor(**settings):
    """Qwen's image processor; 4.57 calls the one that works on tensors "Fast"."""
    kind = transformers.Qwen2VLImageProcessor if V5 else transformers.Qwen2VLImageProcessorFast
    return kind(**settings)


def token_ids(tokens) -> dict:
    """The token ids that a Qwen-VL config names."""
    names = {
        "image_token_id": IMAGE, "video_token_id": VIDEO,
        "vision_start_token_id": START, "vision_end_token_id": END,
    }  # fmt: skip
    return {name: tokens.convert_tokens_to_ids(token) for name, token in names.items()}


def text_of(row, seed: int) -> str:
    """Words, and each picture's or video's placeholder between markers, as the chat template writes them."""
    generator = torch.Generator().manual_seed(seed)
    pieces = []
    for part in row:
        if isinstance(part, int):
            pieces.append(words(part, generator))
        else:
            pieces.append(f"{START}{IMAGE if isinstance(part, Image) else VIDEO}{END}")
    return " ".join(pieces)


def inputs_of(processor, rows, *, side, dtype, seeds, **settings) -> dict:
    """Run the processor: inputs for `model(**inputs)` and `model.generate(**inputs)`.

    Args:
        settings: more for the processor, given only with videos.
    """
    seeds = range(len(rows)) if seeds is None else seeds
    pictures = [part for row in rows for part in row if not isinstance(part, int)]
    images = [part.pil() for part in pictures if isinstance(part, Image)]
    videos = [part for part in pictures if not isinstance(part, Image)]
    more = {}
    if images:
        more["images"] = images
    if videos:
        more |= settings
        more["videos"] = [video.array() for video in videos]
        more["video_metadata"] = [
            {"total_num_frames": video.frames, "fps": 1.0, "duration": float(video.frames)}
            for video in videos
        ]
    inputs = processor(
        text=[text_of(row, seed) for row, seed in zip(rows, seeds, strict=True)],
        padding=True, padding_side=side, return_tensors="pt", **more,
    )  # fmt: skip
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}


def random_weights(model, seed: int, dtype):
    """Seeded random weights everywhere, also in norms, and embeddings large enough to tell outputs apart."""
    scale_weights(model, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, weight in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            # These two alone say how sharp Qwen3's attention is.
            weight.data = 1.2 + 0.6 * torch.rand(weight.shape, generator=generator)
        elif name.endswith(("q_proj.weight", "k_proj.weight")):
            weight.data *= 0.7  # sharper attention than this lets rounding grow to 1e-5 in the logits
        elif weight.ndim == 1 and name.endswith("weight"):  # every other norm
            weight.data = 1 + 0.2 * torch.randn(weight.shape, generator=generator)
        elif "embed_tokens" in name or "pos_embed" in name:
            weight.data = 0.5 * torch.randn(weight.shape, generator=generator)
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)  # not `model.to`: rotary frequencies stay in full precision
    model.generation_config.pad_token_id = model.config.get_text_config().pad_token_id
    model.generation_config.eos_token_id = None  # a random model should not stop early
    return model.eval()
