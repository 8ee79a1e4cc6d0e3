"""illava itself: its defaults, the paper's plan at the same relative depth, and three a user might choose.

The readers' encoders have 8 blocks where the paper's has 32. The same relative depth begins at block 1,
behind which a token knows little of its picture yet. The third plan merges at block 3 instead.

The fourth merges where the defaults do, but in the encoder those units whose features are most alike
(`vit_merge="bipartite"`), however little attention they receive; in the language model as the defaults do.
These two were chosen on the validation split of readers that could not read yet, where they led; today's keep
less with them than with the fifth.

The fifth makes four such steps in the middle of the encoder, which take four fifths of all that goes, and one
in the middle of the language model, by attention: in its first layers the question has not yet asked for
anything, and small writing goes unread. It was chosen on the validation split of the InternVL that reads
(`--methods middle`).
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


def later(seams: Seams, final_ratio: float) -> Plan:
    return Plan(vit_layers=scale_layers((3,), 8, len(seams.blocks)), reduction=1 - final_ratio)


def bipartite(seams: Seams, final_ratio: float) -> Plan:
    return Plan(vit_merge="bipartite", reduction=1 - final_ratio)


def middle(seams: Seams, final_ratio: float) -> Plan:
    return Plan(
        vit_layers=scale_layers((2, 3, 4, 5), 8, len(seams.blocks)),
        llm_layers=scale_layers((4,), 8, len(seams.layers)),
        vit_merge="bipartite",
        encoder_share=0.8,
        reduction=1 - final_ratio,
    )


EQUAL_STEPS = "Layers remove equal whole numbers, so the final tokens are within half a token per layer."
ILLAVA = Rival("illava", "this package's defaults", "both", EQUAL_STEPS, default)
PAPER = Rival("illava paper", "iLLaVA, ICLR 2026, section 4.1: `Plan.paper()`", "both", EQUAL_STEPS, paper)
LATER = Rival("illava later", "chosen on the validation split", "both", EQUAL_STEPS, later)
BIPARTITE = Rival("illava bipartite", "chosen on the validation split", "both", EQUAL_STEPS, bipartite)
MIDDLE = Rival("illava middle", "chosen on the validation split", "both", EQUAL_STEPS, middle)
