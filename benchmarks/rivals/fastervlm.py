"""FasterVLM: the encoder's output, thinned by the class token's attention.

Zhang et al., arXiv 2412.01818; github.com/Theia-4869/FasterVLM,
llava/model/multimodal_encoder/clip_encoder.py and llava/model/llava_arch.py: attention of the block whose
output is read, from the class token, averaged over heads; each tile by itself.
"""

from __future__ import annotations

from illava import Plan
from illava.families.seams import Seams
from rivals.common import Rival, seen_by_class


def plan(seams: Seams, final_ratio: float) -> Plan:
    return Plan(("output",), (), vit_shares=(final_ratio,), score=seen_by_class, merge="prune")


RIVAL = Rival(
    "FasterVLM",
    "Zhang et al., arXiv 2412.01818; Theia-4869/FasterVLM llava/model/multimodal_encoder/clip_encoder.py",
    "encoder output",
    "Merge units instead of patches; where the encoder has no class token (Qwen), attention received from "
    "all tokens stands in for it.",
    plan,
)
