"""PyramidDrop: the decoder drops visual tokens in stages, ranked for the instruction's last token.

Xing et al., CVPR 2025, arXiv 2410.17247; github.com/Cooperx521/PyramidDrop,
llava/model/modeling_llama_pdrop.py: after 8, 16 and 24 of 32 layers, each keeping the same share of what is
left (published: 0.5), ranked by what the *next* layer's queries and keys make of the hidden states.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from illava import Candidates, Plan
from illava.families.seams import Seams
from illava.rotary import unrotate
from rivals.common import Rival


def score_by(layers: Any) -> Any:
    """The score for one model's decoder layers."""

    def score(c: Candidates) -> Tensor:
        """`[S, N]` attention the row's last token would pay in the next layer, averaged over heads."""
        rows = c.sequences
        batch, slots = rows.positions.shape
        q, k = next_queries_keys(layers[c.layer + 1], c)  # [B, n, H, D], [B, n, K, D]
        last = rows.positions.argmax(dim=1)  # [B]
        q = q[torch.arange(batch, device=q.device), last]  # [B, H, D]
        k = k.repeat_interleave(q.shape[1] // k.shape[2], dim=2)
        logits = torch.einsum("bhd,bnhd->bhn", q, k) * c.scale
        received = logits.masked_fill(rows.positions[:, None] < 0, float("-inf")).softmax(-1).mean(1)
        return received.flatten()[c.index]

    return score


def next_queries_keys(layer: Any, c: Candidates) -> tuple[Tensor, Tensor]:
    """What a layer would make of the hidden states, turned as the layer before turned its own."""
    attention, rows = layer.self_attn, c.sequences
    hidden = layer.input_layernorm(c.features[:, 0].view(*rows.positions.shape, -1))
    cos, sin = (x[:, :, None] for x in rows.rotation)  # [B, n, 1, D]
    turned = []
    for name in ("q", "k"):
        x = getattr(attention, f"{name}_proj")(hidden).unflatten(-1, (-1, attention.head_dim))
        x = getattr(attention, f"{name}_norm", nn.Identity())(x)
        turned.append(unrotate(x, cos, -sin) * (cos * cos + sin * sin)[..., :1])  # back by minus is forward
    return turned[0].float(), turned[1].float()


def plan(seams: Seams, final_ratio: float) -> Plan:
    depth = len(seams.layers)
    places = tuple(sorted({min(depth - 2, max(0, round(depth * done / 4) - 1)) for done in (1, 2, 3)}))
    shares = tuple(final_ratio ** ((i + 1) / len(places)) for i in range(len(places)))
    return Plan((), places, llm_shares=shares, queries="last", score=score_by(seams.layers), merge="prune")


RIVAL = Rival(
    "PyramidDrop",
    "Xing et al., CVPR 2025, arXiv 2410.17247; Cooperx521/PyramidDrop llava/model/modeling_llama_pdrop.py",
    "llm",
    "Survivors keep their positions, its code renumbers them; the share each stage keeps is the cube root of "
    "the final ratio (published: 0.5, hence 0.125); layers at the same relative depth.",
    plan,
)
