"""FastV: after its second layer the decoder drops the visual tokens the last token looks at least.

Chen et al., ECCV 2024, arXiv 2403.06764; github.com/pkunlp-icler/FastV,
src/FastV/lmms-eval/fastv_kvcache.py: K = 2, so the attention of layer 1 (from 0), averaged over heads, of the
last token. K = 2 for models of 32 and of 40 layers, so it is not scaled with the depth.
"""

from __future__ import annotations

from illava import Plan
from illava.families.seams import Seams
from rivals.common import Rival

K = 2


def plan(seams: Seams, final_ratio: float) -> Plan:
    return Plan((), (K - 1,), llm_shares=(final_ratio,), queries="last", merge="prune")


RIVAL = Rival(
    "FastV",
    "Chen et al., ECCV 2024, arXiv 2403.06764; pkunlp-icler/FastV src/FastV/lmms-eval/fastv_kvcache.py",
    "llm",
    "Each picture of several keeps the same share, where its code ranks one picture alone.",
    plan,
)
