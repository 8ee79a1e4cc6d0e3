"""What of a prompt goes into the decoder, read off the features that the encoder left.

Notation for tensor shapes as in `illava.language`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from illava import merge, sequence
from illava.families.visual import VisualInput
from illava.language_stage import Stage
from illava.tracing import LanguageTrace
from illava.transfer import on, to_host
from illava.vision import is_broken, is_dead


@dataclass(frozen=True)
class Entry:
    """A prompt without its padding and without what the encoder merged away, row by row.

    Attributes:
        stage: the slots the first layer is given.
        columns: `[B, n]` of which column of the caller each slot is.
        tokens: visual tokens of each segment at the caller's length.
        counts: those that are left.
        table: `[S, N]` flat slots of each segment, ascending.
        segment_rows: the batch row of each segment.
        text: `[B, n]` which slots ask about pictures as text.
        text_width: the most such slots of a row.
        has_later_text: of each segment, whether text that asks comes after it.
        unpadded: whether the caller's mask hides nothing.
        lost_any: whether the encoder merged a token away.
        broken: tokens whose features are NaN or infinite, by segment.
        trace: what each column of the caller is, if it is to be written down.
    """

    stage: Stage
    columns: Tensor
    tokens: list[int]
    counts: list[int]
    table: Tensor
    segment_rows: list[int]
    text: Tensor
    text_width: int
    has_later_text: Sequence[bool]
    unpadded: bool
    lost_any: bool
    broken: dict[int, int]
    trace: LanguageTrace | None


def enter(
    embeds: Tensor,
    visual: VisualInput,
    padding_mask: Tensor | None,
    newline: Tensor | None,
    past: int,
    asking_end: int,
    traced: bool,
) -> Entry:
    """Find what the encoder left, and lay out the segments' slots.

    Args:
        embeds: `[B, L, d]` tokens at the caller's length; rows the encoder merged away are -inf.
        visual: which tokens are visual.
        padding_mask: `[B, past + L]` the caller's 2-D attention mask, or `None`.
        newline: `[d]` the feature the model inserts between rows of features.
        past: tokens of the caller already in the cache.
        asking_end: the caller's position behind the last token that asks.
    """
    device, length = embeds.device, embeds.shape[1]
    segment = visual.segment  # [B, L] on the CPU
    marks = {"dead": is_dead(embeds), "broken": is_broken(embeds)}
    if padding_mask is not None:
        marks["real"] = padding_mask[:, -length:].bool().to(device)
        cached = padding_mask[:, :-length].bool().all(dim=1, keepdim=True)  # true of no columns
        marks["unpadded before"] = cached.to(device).expand(-1, length)
    if newline is not None:
        marks["newline"] = (embeds == newline.to(embeds)).all(dim=-1)
    found = dict(zip(marks, to_host(torch.stack(list(marks.values()))), strict=True))  # one transfer
    real = found.get("real", torch.ones_like(segment, dtype=torch.bool))
    broken = segment[found["broken"] & (segment >= 0)]
    dead = found["dead"] & (segment >= 0)
    text = (segment < 0) & real
    text[:, asking_end - past :] = False
    if newline is not None:  # behind a newline is no picture: it belongs to none, and always stays
        segment = segment.masked_fill(found["newline"], -1)
    # The caller's padding leaves as well, or a short row would keep the whole batch long. Only in
    # the last column it stays: generation goes on from there.
    real_or_last = real.clone()
    real_or_last[:, -1] = True
    keep = real_or_last & ~dead
    row_lengths = keep.sum(dim=1).tolist()
    width = max(row_lengths)
    index = merge.compact(keep, width)  # [B, n] on the CPU
    positions = (index + past).masked_fill(~keep.gather(1, index), -1)
    slots = segment.gather(1, index).masked_fill(positions < 0, -1)  # [B, n] segment per slot
    number = len(visual.tokens)
    trace = LanguageTrace.entered(segment, number, keep) if traced else None
    entry = torch.arange(width, device=device).expand(len(row_lengths), -1)

    own, flat = segment.flatten(), slots.flatten()
    counts = torch.bincount(flat[flat >= 0], minlength=number)
    order = flat.argsort(stable=True)[(flat < 0).sum() :]  # visual slots, segment by segment
    starts = (counts.cumsum(0) - counts)[:, None]
    step = torch.arange(max(1, int(counts.max())))
    table = order[(starts + step).clamp(max=max(0, len(order) - 1))] if len(order) else starts + step * 0
    return Entry(
        stage=Stage(0, on(device, positions), entry, tuple(row_lengths)),
        columns=on(device, index),
        tokens=torch.bincount(own[own >= 0], minlength=number).tolist(),
        counts=counts.tolist(),
        table=on(device, table),
        segment_rows=(table[:, 0] // width).tolist(),
        text=on(device, text.gather(1, index) & (positions >= 0)),
        text_width=int(text.sum(dim=1).max()),
        has_later_text=sequence.later_text(segment, text, number),
        unpadded=bool(real.all()) and bool(found.get("unpadded before", real).all()),
        lost_any=bool(dead.any()),
        broken=dict(Counter(broken.tolist())),
        trace=trace,
    )
