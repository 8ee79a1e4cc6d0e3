"""illava itself: its defaults, the paper's plan at the same relative depth, and three a user might choose.

The readers' encoders have 8 blocks where the paper's has 32. The same relative depth begins at block 1,
behind which a token knows little of its picture yet.

The third plan merges where the defaults do and as much, but makes one of those tokens whose features are
most alike (`merge="bipartite"`), however little attention they receive, in both stages. The fourth does that
in four blocks in the middle of the encoder, for half of all that goes, and leaves out the language model's
first merge; and a token of the encoder that stands for several attracts as much attention as they would
(`proportional=True`), without which merging in the encoder costs the InternVL a sixth of its counts. The
fifth is the fourth, but for neighbours that merge before what is as alike elsewhere (`distance_penalty`). All
three were chosen on the validation split (`--methods bipartite distance`).
"""

from __future__ import annotations

from typing import Any

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
    return Plan(merge="bipartite", reduction=1 - final_ratio)


def middle(seams: Seams, final_ratio: float, **changes: Any) -> Plan:
    return Plan(
        vit_layers=scale_layers((2, 3, 4, 5), 8, len(seams.blocks)),
        llm_layers=scale_layers((2, 4), 8, len(seams.layers)),
        merge="bipartite",
        encoder_share=0.5,
        proportional=True,
        reduction=1 - final_ratio,
        **changes,
    )


def near(seams: Seams, final_ratio: float) -> Plan:
    """Of the penalties tried 0.1 does about as well; from 0.5 on writing is lost at 88.9 %."""
    return middle(seams, final_ratio, distance_penalty=0.2)


EQUAL_STEPS = "Layers remove equal whole numbers, so the final tokens are within half a token per layer."
ILLAVA = Rival("illava", "this package's defaults", "both", EQUAL_STEPS, default)
PAPER = Rival("illava paper", "iLLaVA, ICLR 2026, section 4.1: `Plan.paper()`", "both", EQUAL_STEPS, paper)
BIPARTITE = Rival("illava bipartite", "chosen on the validation split", "both", EQUAL_STEPS, bipartite)
MIDDLE = Rival("illava middle", "chosen on the validation split", "both", EQUAL_STEPS, middle)
NEAR = Rival("illava near", "chosen on the validation split", "both", EQUAL_STEPS, near)
