"""illava itself: its defaults, the paper's plan at the same relative depth, and `Plan.bipartite()`.

The readers' encoders have 8 blocks where the paper's has 32. The same relative depth begins at block 1,
behind which a token knows little of its picture yet. The third plan makes one of those tokens whose features
are most alike, however little attention they receive, and merges later; it was chosen on the validation
split (`--methods likeness bipartite distance`).
"""

from __future__ import annotations

from illava import Plan
from illava.families.seams import Seams
from illava.plan import LLM_PAPER, VIT_PAPER
from illava.schedule import scale_layers
from rivals.common import Rival


def default(seams: Seams, final_ratio: float) -> Plan:
    return Plan(reduction=1 - final_ratio)


def paper(seams: Seams, final_ratio: float) -> Plan:
    return Plan.paper(
        1 - final_ratio,
        vit_layers=scale_layers(*VIT_PAPER, len(seams.blocks)),
        llm_layers=scale_layers(*LLM_PAPER, len(seams.layers)),
    )


def bipartite(seams: Seams, final_ratio: float) -> Plan:
    return Plan.bipartite(1 - final_ratio)


EQUAL_STEPS = "Layers remove equal whole numbers, so the final tokens are within half a token per layer."
ILLAVA = Rival("illava", "this package's defaults", "both", EQUAL_STEPS, default)
PAPER = Rival("illava paper", "iLLaVA, ICLR 2026, section 4.1: `Plan.paper()`", "both", EQUAL_STEPS, paper)
BIPARTITE = Rival("illava bipartite", "this package's `Plan.bipartite()`", "both", EQUAL_STEPS, bipartite)
