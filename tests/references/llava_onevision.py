"""Visual token merging in LLaVA-OneVision: `references.llava`, and videos.

A frame is one tile, projected and then pooled to half its side (rounded up) by bilinear interpolation; one newline
follows a whole video. Images and videos are encoded in two calls, images first.
"""

import math

import torch

from references.core import Options, Result
from references.llava import encode, read, resample, see_images


@torch.no_grad()
def forward(model, inputs, vit_removed, llm_removed, **options) -> Result:
    """Run prompt and pictures through the model, merging on the way.

    Args:
        model: `LlavaOnevisionForConditionalGeneration`, fp32, unpatched.
        inputs: one unpadded row.
        vit_removed: units of a tile or frame before any merge -> block -> units to remove.
        llm_removed: visual tokens of a picture or video before any merge (pooled, for a video), and how many of them
            the encoder left alive -> layer -> tokens to remove.
        options: see `Options`.
    """
    options = Options(**options)
    images, image_merges = see_images(model, inputs, vit_removed, options)
    videos, video_merges = see_videos(model, inputs, vit_removed, options)
    seen, merges = {"image": images, "video": videos}, image_merges + video_merges
    input_ids = inputs["input_ids"][0]
    return read(model, input_ids, len(input_ids), seen, merges, llm_removed, options)


def see_videos(model, inputs, removed, options):
    """The videos of the row: for each its features `[T, D]` and which of them are newlines; and the merges."""
    if "pixel_values_videos" not in inputs:
        return [], []
    pixels = inputs["pixel_values_videos"]  # [videos, frames, 3, height, width]
    config = model.config.vision_config
    side = config.image_size // config.patch_size
    frames, merges = encode(model, pixels.flatten(0, 1), removed, "video", options)
    videos = []
    for video in range(pixels.shape[0]):
        rows = []
        for frame in frames[video * pixels.shape[1] : (video + 1) * pixels.shape[1]]:
            lines = [list(line) for line in frame.split(side)]
            half = math.ceil(side / 2)
            rows += [feature for line in resample(lines, half, half) for feature in line]
        newlines = [False] * len(rows) + [True]
        videos.append((torch.stack([*rows, model.model.image_newline]), newlines))
    return videos, merges
