"""Qwen3-VL and Qwen3-VL-MoE. Run on transformers 4.57.6 and 5.23.

Encoder: packed patches with one attention span per frame, no windows; a merge unit is the 2 x 2
patches that the mergers join, consecutive in the packing. Besides the last merger, others read the
output of inner blocks (deepstack taps); each sees the survivors of its own depth. Their features are
added to the outputs of the first decoder layers, before those layers' own merges.

A video comes as one run of placeholders per frame with its timestamp as text between them; the
language model ranks all its frames together.

Where it merges by attention: the paper's 5, 9, 13 of 32 and 2, 8, 14 of 28, at the same relative depth.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from illava.families import qwen2_vl
from illava.families.about import About
from illava.families.cutting import Cutting
from illava.families.parts import part
from illava.families.qwen2_vl import layout, visual_input
from illava.families.seams import Additions, Projector, Seams

__all__ = ["find_seams", "layout", "visual_input"]

ABOUT = {
    "qwen3_vl": About("Qwen3-VL", "2 x 2 patches", "4, 8, 11 of 27", "3, 10, 18 of 36"),
    "qwen3_vl_moe": About("Qwen3-VL-MoE", "2 x 2 patches", "4, 8, 11 of 27", "3, 10, 18 of 36"),
}
CUTTING = {name: Cutting(keeps_shape=True) for name in ABOUT}


def find_seams(model: nn.Module) -> Seams:
    """Locate the parts, in `...ForConditionalGeneration` or the bare `...Model`.

    Raises:
        SeamError: a part is missing in this version of transformers.
    """
    seams = qwen2_vl.find_seams(model)
    blocks = part(seams.tower, "deepstack_visual_indexes", "to know which blocks deepstack reads")
    mergers = part(seams.tower, "deepstack_merger_list", "to put deepstack features on the full grid")
    taps = tuple(Projector(m, block) for m, block in zip(mergers, blocks, strict=True))
    added = Additions(len(taps), places="visual_pos_masks", features="deepstack_visual_embeds")
    return replace(seams, projectors=(*seams.projectors, *taps), additions=added)
