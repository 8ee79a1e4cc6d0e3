"""illava itself: its default, the paper's rule as illava places it, and the paper's plan.

The default makes one of those tokens whose features are most alike, however little attention they receive;
it was chosen on the validation split (`--methods likeness bipartite distance`). The other two rank tokens by
attention. The readers have 8 blocks and 8 layers: the paper's relative depth begins behind the second of
each, where attention tells little yet, most of all in the language model.
"""

from __future__ import annotations

from illava import Plan
from illava.families.seams import Seams
from illava.plan import LLM_PAPER, VIT_PAPER
from illava.schedule import scale_layers
from rivals.common import Rival


def default(seams: Seams, final_ratio: float) -> Plan:
    return Plan(reduction=1 - final_ratio)


def recycle(seams: Seams, final_ratio: float) -> Plan:
    return Plan(reduction=1 - final_ratio, merge="recycle")


def paper(seams: Seams, final_ratio: float) -> Plan:
    return Plan.paper(
        1 - final_ratio,
        vit_layers=scale_layers(*VIT_PAPER, len(seams.blocks)),
        llm_layers=scale_layers(*LLM_PAPER, len(seams.layers)),
    )


EVEN_STEPS = "Layers remove whole tokens of a picture or frame, as evenly as can be."
ILLAVA = Rival("illava", "this package's default", "both", EVEN_STEPS, default)
RECYCLE = Rival(
    "illava recycle",
    'the paper\'s rule, `merge="recycle"`, where illava has it merge',
    "both",
    EVEN_STEPS,
    recycle,
)
PAPER = Rival("illava paper", "iLLaVA, ICLR 2026, section 4.1: `Plan.paper()`", "both", EVEN_STEPS, paper)
