"""How much a rival computes for visual tokens, and the final ratio at which it computes as much as another.

The area under tokens x layers: every encoder block and every decoder layer counts the share of the visual
tokens that it meets, all alike. By operations a small model's encoder would weigh far more beside its
language model than that of a 7B does, and methods that work in the language model alone could never be
matched; `illava.flops` counts operations.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from illava.flops import measure
from rivals.common import Rival, entering, seams_of

STEPS = 40


@dataclass(frozen=True)
class Match:
    """A rival's final ratio for a given compute.

    Attributes:
        final_ratio: `None` where the method cannot compute so little; `reason` says why.
        area: what it computes at that ratio, or at the least it can; a share of the unpatched model's.
    """

    final_ratio: float | None
    area: float
    reason: str = ""


def area(model: nn.Module, rival: Rival, *, visual_tokens: int, final_ratio: float, frames: int = 1) -> float:
    """Compute for a picture's visual tokens, as a share of what the unpatched model spends on them.

    Args:
        visual_tokens: of all frames or tiles.
        frames: frames or tiles that the encoder reads one by one; each loses whole tokens.
    """
    seams = seams_of(model)
    shape = measure(seams)
    attending = shape.block_attention / (shape.block_attention + shape.block_ffn)
    done = rival.schedule(model, visual_tokens=visual_tokens, final_ratio=final_ratio, frames=frames)
    depth = len(seams.blocks)
    merges = {layer: out for layer, _, out in done.vit}
    spent = 0.0
    for block, tokens in enumerate(entering(done.tokens, done.vit, depth)):
        # A merging block's attention meets the tokens that enter, its feed-forward network those left.
        after = merges.get(block, tokens)
        spent += attending * tokens + (1 - attending) * after
    spent += sum(entering(done.encoder_tokens, done.llm, len(seams.layers)))
    return spent / ((depth + len(seams.layers)) * visual_tokens)


def match_compute(
    model: nn.Module, rival: Rival, *, visual_tokens: int, target: float, frames: int = 1
) -> Match:
    """The final ratio at which a rival's area is nearest to `target`, without passing it.

    Args:
        visual_tokens, frames: of the picture, as of `area`.
        target: area, for example `area(model, RIVALS["illava recycle"], ...)`.
    """

    def at(ratio: float) -> float:
        return area(model, rival, visual_tokens=visual_tokens, final_ratio=ratio, frames=frames)

    low, high = 1 / visual_tokens, 1.0
    least = at(low)
    if least > target * (1 + 1e-9):
        where = "it saves nothing in the encoder" if rival.stages in ("llm", "encoder output") else ""
        where = where or (
            "it saves nothing in the model" if rival.stages == "none" else "too little in the LLM"
        )
        return Match(
            None, least, f"computes {least:.1%} even with one token left: {where}; asked {target:.1%}"
        )
    if at(high) <= target:
        return Match(1.0, at(high))
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle) <= target * (1 + 1e-9) else (low, middle)
    return Match(low, at(low))
