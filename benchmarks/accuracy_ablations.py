"""The plans that accuracy.py compares: the paper's ablations and the choices that were open.

Each is the paper's rule where illava has it merge (`illava recycle`), merging by likeness in the same places,
the default, or the paper's plan, with one thing changed; `PLANS` names them, `GROUPS` says which table they
stand in.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from accuracy_rules import RULES, in_encoder, keeping
from accuracy_selection import best_patch, every_frame_alike

from illava import Plan
from illava.families.seams import Seams
from illava.plan import LLM_BIPARTITE, LLM_PAPER, PAPER_SHARE, VIT_BIPARTITE, VIT_PAPER
from illava.schedule import scale_layers

Maker = Callable[[Seams, float], Plan]
MIDDLE = VIT_BIPARTITE[:4]  # of the readers' 8 blocks 2, 3, 4, 5


# By likeness wherever it is, and every token as one.
ANYWHERE = {"proportional": False, "distance_penalty": 0.0}


def _ranked(seams: Seams, reduction: float, **changes: Any) -> Plan:
    return Plan(**{"merge": "recycle", "reduction": reduction, **changes})


def _anywhere(seams: Seams, reduction: float, **changes: Any) -> Plan:
    """By likeness, where the paper's rule merges."""
    ranked = {
        "vit_layers": seams.vit_ranked, "llm_layers": seams.llm_ranked, "encoder_share": PAPER_SHARE
    }  # fmt: skip
    return Plan(**{"reduction": reduction, **ranked, **ANYWHERE, **changes})


def _encoder_anywhere(seams: Seams, reduction: float) -> Plan:
    places = {"vit_layers": seams.vit_ranked, "encoder_share": PAPER_SHARE}
    return _ranked(seams, reduction, vit_merge="bipartite", **places, **ANYWHERE)


def _middle(seams: Seams, reduction: float, **changes: Any) -> Plan:
    return Plan(MIDDLE, LLM_BIPARTITE, reduction, 0.5, **changes)


def _likeness(seams: Seams, reduction: float, **changes: Any) -> Plan:
    return Plan(reduction=reduction, **changes)


def _named(vit: tuple[int, ...], llm: tuple[int, ...], share: float) -> str:
    layers = f"encoder {', '.join(map(str, vit))}, LLM {', '.join(map(str, llm))}"
    return f"neighbours, {layers}, encoder share {share}"


def _paper(seams: Seams, reduction: float, **changes: Any) -> Plan:
    """The paper's layers at the same relative depth; its blocks of the encoder attend in windows."""
    layers = {
        "vit_layers": scale_layers(*VIT_PAPER, len(seams.blocks)),
        "llm_layers": scale_layers(*LLM_PAPER, len(seams.layers)),
    }
    return Plan.paper(reduction, **layers | changes)


def _only(stage: str) -> Maker:
    other = "llm_layers" if stage == "encoder" else "vit_layers"
    share = 1.0 if stage == "encoder" else 0.0
    return partial(_ranked, **{other: ()}, encoder_share=share)


GROUPS: dict[str, dict[str, Maker]] = {
    "where": {  # the paper's table 4
        "encoder only": _only("encoder"),
        "LLM only": _only("llm"),
    },
    "rule": {  # tables 5; 4 and 7 of the first version
        "rule: prune": partial(_ranked, merge="prune"),
        "rule: linear": partial(_ranked, merge="linear"),
        "rule: recycle": partial(_ranked, merge="recycle"),
        **{f"rule: {name}": partial(_ranked, **settings) for name, settings in RULES.items()},
        "rule: bipartite": _anywhere,
        "rule: bipartite in the encoder": _encoder_anywhere,
        "rule: bipartite in the LLM": partial(_anywhere, vit_merge="recycle"),
        "rule: greedy in the encoder": partial(_ranked, **in_encoder(RULES["greedy"])),
    },
    "encoder share": {  # figure 6
        f"encoder share {share}": partial(_ranked, encoder_share=share)
        for share in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    },
    "layers": {
        "encoder 1, 2, 3": partial(_ranked, vit_layers=(1, 2, 3)),
        "encoder 1, 3, 5": partial(_ranked, vit_layers=(1, 3, 5)),
        "encoder 2": partial(_ranked, vit_layers=(2,)),
        "encoder 3": partial(_ranked, vit_layers=(3,)),
        "encoder 3, 5": partial(_ranked, vit_layers=(3, 5)),
        "encoder 5": partial(_ranked, vit_layers=(5,)),
        "encoder 2, 4, 6": partial(_ranked, vit_layers=(2, 4, 6)),
        "encoder 2, 4, 6, whole picture": partial(_ranked, vit_layers=(2, 4, 6), window_score="picture"),
        "LLM 1, 2, 4": partial(_ranked, llm_layers=(1, 2, 4)),
        "LLM 1": partial(_ranked, llm_layers=(1,)),
        "LLM 2": partial(_ranked, llm_layers=(2,)),
        "LLM 2, 4": partial(_ranked, llm_layers=(2, 4)),
        "LLM 3, 5": partial(_ranked, llm_layers=(3, 5)),
        "paper's layers, whole picture": partial(_paper, window_score="picture"),
    },
    "bipartite": {  # where, and how much of it in the encoder
        **{
            f"bipartite, encoder {', '.join(map(str, layers))}": partial(_anywhere, vit_layers=layers)
            for layers in ((1,), (3,), (1, 3), (1, 3, 5), (2, 3, 4, 5))
        },
        **{
            f"bipartite, LLM {', '.join(map(str, layers))}": partial(_anywhere, llm_layers=layers)
            for layers in ((1,), (4,), (2, 4), (2, 3, 5), (0, 1, 2))
        },
        **{
            f"bipartite, encoder share {share}": partial(_anywhere, encoder_share=share)
            for share in (0.2, 0.6, 0.8)
        },
        **{
            f"bipartite, encoder 2, 3, 4, 5, LLM 2, 4, encoder share 0.5{said}": partial(
                _anywhere,
                vit_layers=(2, 3, 4, 5),
                llm_layers=(2, 4),
                encoder_share=0.5,
                proportional=bool(said),
            )
            for said in ("", ", proportional")
        },
        "bipartite, proportional": partial(_anywhere, proportional=True),
        "bipartite, encoder only": partial(_anywhere, llm_layers=(), encoder_share=1.0),
        "bipartite, LLM only": partial(_anywhere, vit_layers=(), encoder_share=0.0),
    },
    "likeness": {  # neighbours first: where, of pictures and of videos
        _named(vit, llm, share): partial(_likeness, vit_layers=vit, llm_layers=llm, encoder_share=share)
        for vit, llm, share in (
            ((1, 2, 3), (1, 2, 4), 0.4),
            ((3, 4, 5), (1, 2, 3), 0.5),
            ((2, 3, 4, 5), (1, 2, 4), 0.5),
            ((2, 3, 4, 5), (2, 4), 0.5),
            ((2, 3, 4, 5), (2, 4), 0.6),
            ((2, 3, 4, 5, 6), (2, 4), 0.6),
        )
    },
    "distance": {  # penalties on what are no neighbours, in four blocks in the middle of the encoder
        f"middle, distance penalty {penalty}": partial(_middle, distance_penalty=penalty)
        for penalty in (0.0, 0.1, 0.2, 0.5, 1.0)
    },
    "recycled": {
        **{
            f"recycled {share}": partial(_ranked, recycled=share)
            for share in (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
        },
        **{
            f"recycled {share}, keeping 0.8 of itself": partial(_ranked, **keeping(0.8, share))
            for share in (0.05, 0.3)
        },
    },
    "members": {f"members {count}": partial(_ranked, members=count) for count in (2, 3, 5, 8, 12)},
    "score": {
        "score: attention": partial(_ranked, score="attention"),
        "score: lse": partial(_ranked, score="lse"),
        "paper, score: lse": partial(_paper, score="lse"),
    },
    "selection": {
        "selection: a unit's best patch": partial(_ranked, score=best_patch),
        "selection: every frame alike": partial(_ranked, score=every_frame_alike),
    },
    "queries": {
        f"queries: {name}": partial(_ranked, queries=name) for name in ("text", "all", "visual", "last")
    },
}
PLANS: dict[str, Maker] = {name: make for group in GROUPS.values() for name, make in group.items()}
