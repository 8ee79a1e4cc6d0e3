"""From what was measured of an arm to its rows, beside what its plan's arithmetic says."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from speed_inputs import Batch
from speed_measure import Peak
from speed_rows import figure
from speed_run import Trial

import illava


def figures(trial: Trial, unpatched: Trial) -> list[dict[str, str]]:
    """The rows of an arm that was measured: every figure that is there, and no other."""
    if not trial.prefills or trial.side is None:
        return []
    rows, flops = [], trial.report.flops if trial.report is not None else None
    idle = trial.plan is not None and flops is None  # reduction 0: nothing is there to be faster
    bounds = {"encoder_ms": None, "llm_ms": None, "ttft_ms": 1.0 if idle else None}
    if flops is not None:
        bounds["encoder_ms"] = flops.vision.without / flops.vision.with_ if flops.vision.with_ else None
        bounds["llm_ms"] = flops.language.without / flops.language.with_
        bounds["ttft_ms"] = flops.speedup_bound
    for name, bound in bounds.items():
        values = [getattr(own, name) for own, _ in trial.prefills]
        others = [(getattr(own, name), getattr(ref, name)) for own, ref in trial.prefills if ref is not None]
        reference = statistics.median(r for _, r in others) if others else None
        rows.append(figure(name, "ms", values, reference, [r / own for own, r in others], bound))
    rows += _decoding(trial)
    rows += _memory(trial, unpatched)
    if trial.own_shares:
        rows.append(figure("own_share", "share", trial.own_shares))
    return rows


def _decoding(trial: Trial) -> list[dict[str, str]]:
    if not trial.decodings:
        return []
    pairs = [(own, ref) for own, ref in trial.decodings if ref is not None]
    steps = [x for own, _ in trial.decodings for x in own.tokens_per_s]
    others = [x for _, ref in pairs for x in ref.tokens_per_s]
    middle = statistics.median
    speeds = [middle(own.tokens_per_s) / middle(ref.tokens_per_s) for own, ref in pairs]
    requests = [own.requests_per_s for own, _ in trial.decodings]
    before = [ref.requests_per_s for _, ref in pairs]
    return [
        figure("decode", "tokens/s", steps, middle(others) if others else None, speeds),
        figure(
            "requests", "requests/s", requests, middle(before) if before else None,
            [own.requests_per_s / ref.requests_per_s for own, ref in pairs],
        ),
    ]  # fmt: skip


def _memory(trial: Trial, unpatched: Trial) -> list[dict[str, str]]:
    """Cache and peak, as measured and as the plan's arithmetic has them."""
    rows, side = [], trial.side
    if side is None:
        return []
    held, kv = _arithmetic(trial)
    measured = trial.prefills[0][0].kv_bytes
    whole, full_kv, full, peak = None, [], [], unpatched.peak
    if unpatched.prefills and unpatched.side is not None:
        whole = unpatched.prefills[0][0].kv_bytes
        full, full_kv = _arithmetic(unpatched)
    bound = sum(full_kv) / sum(kv) if full_kv and trial.plan is not None else None
    ratio = [whole / measured] if whole is not None else []
    rows.append(figure("kv_cache", "bytes", [measured], whole, ratio, bound))
    rows.append(figure("kv_cache_by_plan", "bytes", [sum(kv)]))
    if trial.peak is None:
        return rows
    if peak is None or not full:
        return [*rows, figure("peak_memory", "bytes", [trial.peak.total])]
    bound = None
    if trial.plan is not None:
        expected = peak_arithmetic(peak, full, full_kv, trial.peak.base, held, kv)
        rows.append(figure("peak_memory_by_plan", "bytes", [expected]))
        bound = peak.total / expected
    ratio = [peak.total / trial.peak.total]
    return [*rows, figure("peak_memory", "bytes", [trial.peak.total], peak.total, ratio, bound)]


def _arithmetic(trial: Trial) -> tuple[list[int], list[int]]:
    """Tokens that each decoder layer is given, and the bytes of its cache."""
    side = trial.side
    if side is None:
        raise ValueError("nothing was measured")
    held = widths(trial.report, side.batch, len(side.seams.layers))
    return held, cache_arithmetic(side.model.config, side.batch.rows, held, side.model.dtype.itemsize)


def tokens_of(trial: Trial) -> tuple[str, str]:
    """Visual tokens of one row, before and after."""
    if trial.side is None:
        return "", ""
    rows, tokens = trial.side.batch.rows, trial.side.batch.tokens
    left = tokens if trial.report is None else trial.report.final_tokens // rows
    return str(tokens if trial.report is None else trial.report.tokens // rows), str(left)


def widths(report: illava.Report | None, batch: Batch, layers: int) -> list[int]:
    """Tokens each decoder layer is given, the longest row's; all of them without a report."""
    if report is None:
        return [batch.length] * layers
    rows: list[list[int]] = [[batch.length] * layers for _ in range(batch.rows)]
    for picture in report.pictures:
        gone = picture.tokens - picture.entered_tokens
        merges = {r.layer: r.tokens_removed for r in picture.layers if r.stage == "llm"}
        for layer in range(layers):
            rows[picture.row][layer] -= gone
            gone += merges.get(layer, 0)
    return [max(row[layer] for row in rows) for layer in range(layers)]


def cache_arithmetic(config: Any, rows: int, held: Sequence[int], itemsize: int) -> list[int]:
    """Bytes of keys and values in each decoder layer that holds so many tokens."""
    text = config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return [2 * rows * n * text.num_key_value_heads * head * itemsize for n in held]


def peak_arithmetic(unpatched: Peak, held_unpatched: Sequence[int], kv_unpatched: Sequence[int],
                    base: int, held: Sequence[int], kv: Sequence[int]) -> float:  # fmt: skip
    """The peak that a plan allows, from the unpatched model's.

    The encoder's peak is in its first blocks, which see every patch under any plan. The language model's
    is, unpatched, in its last layer: the whole cache and what a layer needs per token. With merging it is
    in the layer where the cache so far and what that layer needs are most.
    """
    per_token = (unpatched.llm - unpatched.base - sum(kv_unpatched)) / held_unpatched[-1]
    so_far = [sum(kv[: layer + 1]) + per_token * n for layer, n in enumerate(held)]
    return base + max(unpatched.encoder - unpatched.base, *so_far)
