"""What every slow reference shares: full attention matrices, Python loops, the paper's rules.

One sequence, no padding, no cache. Nothing is shared with the package under test.

Sizes in the shape comments: S tokens or patches alive now, H heads, d head size, D hidden size, g patches of a unit.
"""

from dataclasses import dataclass

import torch


@dataclass
class Options:
    """How to choose and how to merge; these are the keyword options of `forward` and `generate`."""

    recycled: float = 0.05  # share of the kept units that absorb others
    members: int = 5  # units in a recycled unit's group, itself included
    score: str = "attention"  # or "lse"
    merge: str = "recycle"  # or "prune", "linear", "bipartite"
    queries: str = "text"  # LLM: or "all", "visual", "last"
    window_score: str = "window"  # encoder: or "picture"
    vit_merge: str | None = None  # encoder: another rule than `merge`
    distance_penalty: float = 0.0  # "bipartite": taken from the cosine of two that are no neighbours
    proportional: bool = False  # encoder: in merging blocks units attract as much as all they stand for


@dataclass
class Merge:
    """What one merge did to one segment; a segment from which nothing is removed leaves no entry.

    `kept` and `recycled` number the segment's original units: the frame's units in window order in the encoder,
    the picture's units in raster order in the LLM. `recycled` is empty for merge="prune" and, for merge="linear",
    holds the one unit that carries the sum. `segment` counts from 0 within one encoder call, or over the prompt.
    """

    stage: str  # "vit" or "llm"
    layer: int
    segment: int
    kept: list[int]
    recycled: list[int]
    features: torch.Tensor  # [len(kept) * g, D] of the encoder, [len(kept), D] of the LLM
    source: str  # "image" or "video": which of the two encoder calls, or what the LLM segment shows


@dataclass
class Result:
    """What `forward` returns."""

    logits: torch.Tensor  # [L, vocab]; a position merged away has a zero final hidden state
    merges: list[
        Merge
    ]  # images' blocks, then videos' blocks, then decoder layers; segments ascending in each
    alive: list[
        list[bool]
    ]  # alive[l][position]: is it an input of decoder layer l; alive[-1]: after the last layer
    features: (
        torch.Tensor
    )  # [n_units, D] after the merger: images' units, then videos', raster order; dead rows -inf


@torch.no_grad()
def greedy(run, new_tokens):
    """The likeliest token after prompt and answer, `new_tokens` times; `run` is what a `reader` gives."""
    answer = []
    for _ in range(new_tokens):
        answer.append(run(answer)[-1].argmax().item())
    return answer


# ---------------------------------------------------------------- attention


def asking_queries(held, segment_of, segment, prompt_length, queries):
    """Which alive tokens count as queries for this segment, `[S]` bool; causality is the caller's."""
    prompt = [position for position in held if position < prompt_length]
    text = [position for position in prompt if segment_of[position] is None]
    end = max(position for position in held if segment_of[position] == segment)
    if queries == "visual":
        asking = [position for position in prompt if segment_of[position] is not None]
    elif queries == "last":
        asking = prompt[-1:]
    elif queries == "text" and any(position > end for position in text):
        asking = text
    else:  # "all", and "text" for a segment that no text follows
        asking = prompt
    return torch.tensor([position in asking for position in held])


def rotate(x, angles):
    """Rotary embedding of `x [H, S, d]`; feature i is paired with feature i + d/2."""
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()


def same(labels):
    """`[S, S]` bool: do two tokens carry the same label."""
    return torch.tensor([[a == b for b in labels] for a in labels])


def scores_of(q, k, allowed):
    """Scaled scores `[H, S, S]`, -inf where query i (row) may not attend to key j (column)."""
    return (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).masked_fill(~allowed, float("-inf"))


def attend(q, k, v, allowed, copies=None):
    """Softmax attention with the heads joined again, `[S, H * d]`.

    Args:
        copies: how many tokens each key stands for, `[S]`: it is attended to as if it were there so often.
    """
    probs = scores_of(q, k, allowed).softmax(-1)  # [H, S, S]
    if copies is not None:
        probs = probs * torch.tensor(copies)
        probs = probs / probs.sum(-1, keepdim=True)
    return (probs @ v).transpose(0, 1).flatten(1)


def copies_of(stand_for, g, layer, plan, options, first=0):
    """What `attend` takes for `copies` in an encoder block: `None` where every token counts once.

    Args:
        stand_for: how many of the first units each unit alive stands for.
        g: tokens of a unit, each of which stands for as many as its unit.
        plan: {encoder block: units to remove}. Every block named there counts, also one that removes none.
        first: tokens ahead of the units, as CLS: each stands for itself.
    """
    if not options.proportional or layer not in plan:
        return None
    return [1] * first + [number for number in stand_for for _ in range(g)]


def importance_of(q, k, allowed, counted, score):
    """Importance `[S]` of every token.

    "attention": the probability that key j receives, averaged over the heads and over the queries i with
    `counted[i, j]`; the probabilities are those over all that `allowed` admits. "lse": of token i's own query row.
    """
    scores = scores_of(q, k, allowed)
    if score == "lse":
        return scores.logsumexp(-1).mean(0)
    received = scores.softmax(-1).mean(0) * counted  # [S, S]
    return received.sum(0) / counted.sum(0)  # nan for a key that nobody asks about: text, never read


# ---------------------------------------------------------------- selecting and merging


def merge_segment(
    x, q, k, importance, removed, g, options, sizes=None, stage="vit", matched=None, where=None
):
    """Merge one segment of N units: indices of the kept and the recycled units, and the features of the kept.

    Args:
        x: features `[N * g, D]`.
        q, k: rotated queries and keys of the same layer, `[H, N * g, d]`.
        importance: of every member, `[N * g]`.
        removed: units to remove, at least 1.
        g: members of a unit.
        sizes: how many units each already stands for, in the language model from 1 anew; becomes that of the kept,
            which only "bipartite" lets grow.
        stage: "vit" or "llm".
        matched: how many of the features tell by "bipartite" what is alike; `None` for all.
        where: `(frame, row, column)` of each unit, for `distance_penalty`.
    """
    n = len(x) // g
    keep = n - removed
    units = x.reshape(n, g, -1)
    rule = options.merge if sizes is None or stage == "llm" else options.vit_merge or options.merge
    if rule == "bipartite":
        return pairs_joined(units, removed, sizes, matched, options.distance_penalty, where)
    unit_importance = importance.reshape(n, g).mean(1).tolist()
    order = sorted(
        range(n), key=lambda u: -unit_importance[u]
    )  # stable: of equals the earlier unit comes first
    merged = units.clone()
    recycled = []

    if rule == "linear":
        ascending = order[keep - 1 :][::-1]  # the R + 1 least important, the least first
        weights = torch.arange(len(ascending), 0, -1).float()  # R + 1, R, ..., 1
        weights = weights / weights.sum()
        recycled = [ascending[-1]]
        merged[ascending[-1]] = (weights[:, None, None] * units[ascending]).sum(0)
    elif rule == "recycle":
        n_recycled = min(keep, max(1, round(options.recycled * keep)))
        recycled = sorted(order[keep - n_recycled : keep])
        targets = sorted(order[keep - n_recycled :])  # recycled and discarded ones, in held order
        target_rows = [u * g + slot for u in targets for slot in range(g)]
        for unit in recycled:
            scores = q[:, unit * g : (unit + 1) * g] @ k[:, target_rows].transpose(1, 2) * q.shape[-1] ** -0.5
            probs = scores.softmax(-1)  # [H, g, T * g]
            affinity = probs.reshape(len(q), g, len(targets), g).mean((0, 1, 3))  # [T]
            own = targets.index(unit)
            others = [t for t in range(len(targets)) if t != own]
            others = sorted(others, key=lambda t: -affinity[t].item())  # stable again
            group = [own] + others[: options.members - 1]
            weights = affinity[group] / affinity[group].sum()
            members = units[[targets[t] for t in group]]  # [group, g, D]: slot s of a member goes into slot s
            merged[unit] = (weights[:, None, None] * members).sum(0)

    kept = sorted(order[:keep])
    if sizes is not None:
        sizes[:] = [sizes[unit] for unit in kept]
    return kept, recycled, merged[kept].flatten(0, 1)


def pairs_joined(units, removed, sizes, matched=None, penalty=0.0, where=None):
    """The rule "bipartite" on `units [N, g, D]`; as `merge_segment`, and `sizes` is changed in place."""
    features, weight, alive, grown = units.clone(), list(sizes), list(range(len(units))), set()
    while removed:
        evens, odds = alive[0::2], alive[1::2]
        match, likeness = {}, {}
        for even in evens if odds else []:
            cosines = [
                torch.cosine_similarity(
                    features[even][:, :matched].flatten(), features[odd][:, :matched].flatten(), dim=0
                ).item()
                - (penalty if penalty and steps(where[even], where[odd]) > 1 else 0)
                for odd in odds
            ]
            likeness[even] = max(cosines)
            match[even] = odds[cosines.index(likeness[even])]
        number = min(removed, len(alive) // 2)
        order = sorted(evens, key=lambda even: -likeness[even], reverse=True)  # of equals the later goes
        going = order[len(order) - number :]
        before, weights = features.clone(), list(weight)
        for odd in odds:
            group = [odd, *(even for even in going if match[even] == odd)]
            total = sum(weights[unit] for unit in group)
            features[odd] = sum(weights[unit] * before[unit] for unit in group) / total
            weight[odd] = total
            grown |= {odd} if len(group) > 1 else set()
        alive = [unit for unit in alive if unit not in going]
        removed -= number
    sizes[:] = [weight[unit] for unit in alive]
    return alive, [unit for unit in alive if unit in grown], features[alive].flatten(0, 1)


def steps(one, other):
    """How far two places `(frame, row, column)` are: as a king walks, and a step for every frame."""
    return abs(one[0] - other[0]) + max(abs(one[1] - other[1]), abs(one[2] - other[2]))
