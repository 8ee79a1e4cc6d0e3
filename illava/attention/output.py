"""Attention over packed spans where nobody asks for its statistics: one call for all spans."""

from __future__ import annotations

import torch
from torch import Tensor

from illava.attention.choice import has_varlen
from illava.attention.flash import varlen_attention
from illava.attention.spans import Spans


def span_attention(q: Tensor, k: Tensor, v: Tensor, spans: Spans, *, scale: float, eager: bool) -> Tensor:
    """Attention within each span.

    On CUDA in half precision torch's varlen kernel takes all spans as they are; elsewhere spans of like
    length share a padded table and a call of `scaled_dot_product_attention`.

    Args:
        q, k, v: `[N, H, D]` packed tokens.
        spans: which tokens attend to each other.
        scale: factor on the scores.
        eager: leave torch's fused kernels alone, as a model that attends with `"eager"` does.

    Returns:
        `[N, H, D]`.
    """
    if eager:
        return varlen_attention(q, k, v, spans, scale=scale, backend="blocks")[0]
    if q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16) and has_varlen():
        from torch.nn.attention.varlen import varlen_attn

        bounds, longest = spans.cu_seqlens, spans.longest
        out = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scale)
        return out if isinstance(out, Tensor) else out[0]
    out = torch.empty_like(q)
    for index, real in spans.tables():
        a, b, c = (x[index].transpose(1, 2) for x in (q, k, v))  # [s, H, l, D]
        mask = None if real is None else real[:, None, None]  # [s, 1, 1, l]
        o = torch.nn.functional.scaled_dot_product_attention(a, b, c, attn_mask=mask, scale=scale)
        o = o.transpose(1, 2)  # [s, l, H, D]
        place = index.flatten() if real is None else index[real]
        out = out.index_copy(0, place, o.flatten(0, 1) if real is None else o[real])
    return out
