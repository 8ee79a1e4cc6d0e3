"""Attention over packed spans that also yields each query's log-sum-exp.

Which kernel gives it (`/` means that torch ships it):

=============== ============================================ =========================
backend         call                                         where
=============== ============================================ =========================
`torch_cpu`     `aten::_scaled_dot_product_flash_attention_  CPU, any floating type
                for_cpu`
`torch_varlen`  `torch.nn.attention.varlen.varlen_attn`      CUDA, fp16/bf16, torch 2.10
`torch_flash`   `aten::_scaled_dot_product_flash_attention`  CUDA, fp16/bf16, older torch
`flash_attn_2`  `flash_attn.flash_attn_varlen_func`          where flash-attn 2 is installed
`flash_attn_3`  `flash_attn_interface.flash_attn_varlen_     where flash-attn 3 is installed
                func`
`flash_attn_4`  `flash_attn.cute.flash_attn_varlen_func`     where flash-attn-4 is installed
`blocks`        plain torch, streamed over queries           anywhere
=============== ============================================ =========================

All of them are differentiable in their output; the log-sum-exp carries no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from illava.attention import column_sums, streaming
from illava.attention.choice import PACKAGES, varlen_function
from illava.attention.spans import Spans

BACKENDS = (
    "torch_cpu",
    "torch_varlen",
    "torch_flash",
    "flash_attn_2",
    "flash_attn_3",
    "flash_attn_4",
    "blocks",
)


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, spans: Spans, *, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Attention within each span, all spans together.

    Args:
        q, k, v: `[N, H, D]` packed tokens.
        spans: which tokens attend to each other.
        scale: factor on the scores.
        backend: one of `BACKENDS`.

    Returns:
        Output `[N, H, D]` and log-sum-exp `[N, H]` in fp32.
    """
    if backend.startswith("flash_attn"):
        return _flash_attn(backend, q, k, v, spans, scale)
    if backend == "torch_varlen":
        return _torch_varlen(q, k, v, spans, scale)
    dense = {"torch_cpu": _dense_cpu, "torch_flash": _torch_flash}.get(backend, _dense_blocks)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
    for index, real in spans.tables(padded=backend != "torch_flash"):
        a, b, c = (x[index].transpose(1, 2) for x in (q, k, v))  # [s, H, l, D]
        o, level = dense(a, b, c, real, scale)
        place = index.flatten() if real is None else index[real]
        chosen = slice(None) if real is None else real.flatten()
        out = out.index_copy(0, place, o.transpose(1, 2).flatten(0, 1)[chosen].to(q.dtype))
        lse = lse.index_copy(0, place, level.transpose(1, 2).flatten(0, 1)[chosen].float())
    return out, lse


def varlen_attention_received(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    spans: Spans,
    *,
    scale: float,
    unit: int = 1,
    backend: str | None = None,
) -> Tensor:
    """S_avg within each span, `[N / unit]` in fp32.

    Args:
        q, k: `[N, H, D]` packed tokens.
        lse: `[N, H]` as `varlen_attention` yields it.
        spans: which tokens attend to each other.
        scale: factor on the scores.
        unit: consecutive tokens averaged into one number; must divide N.
        backend: `"triton"` or `"torch"`; `None` for what `column_sum_backend` chooses.
    """
    if column_sums.chosen_backend(backend, q, k) == "triton":
        found = column_sums.KERNELS.run_or_warn(
            lambda: column_sums.column_sums(
                _one_row(q), _one_row(k), scale=scale, lse=_one_row(lse), spans=spans, unit=unit
            ),
            q.device,
            required=backend is not None,
        )
        if found is not None:
            return found[0]
    received = q.new_empty(q.shape[0], dtype=torch.float32)
    for index, real in spans.tables():
        positions = None if real is None else real.long() - 1  # padding is -1, the rest 0
        table = streaming.attention_received(
            q[index].transpose(1, 2),  # [s, H, l, D]
            k[index].transpose(1, 2),
            scale=scale,
            lse=lse[index].transpose(1, 2),  # [s, H, l]
            q_positions=positions,
            k_positions=positions,
            backend="torch",
        )
        chosen = index if real is None else index[real]
        received[chosen] = table if real is None else table[real]
    return received if unit == 1 else received.unflatten(0, (-1, unit)).mean(dim=1)


def varlen_log_sum_exp(
    q: Tensor, k: Tensor, spans: Spans, *, scale: float, backend: str | None = None
) -> Tensor:
    """L_i of each query over its span, `[N, H]` in fp32, without computing an output."""
    if column_sums.chosen_backend(backend, q, k) == "triton":
        found = column_sums.KERNELS.run_or_warn(
            lambda: column_sums.log_sum_exp(_one_row(q), _one_row(k), scale=scale, spans=spans),
            q.device,
            required=backend is not None,
        )
        if found is not None:
            return found[0].T
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    for index, real in spans.tables():
        positions = None if real is None else real.long() - 1
        level = streaming.log_sum_exp(
            q[index].transpose(1, 2),
            k[index].transpose(1, 2),
            scale=scale,
            q_positions=positions,
            k_positions=positions,
            backend="torch",
        ).transpose(1, 2)  # [s, l, H]
        lse[index if real is None else index[real]] = level if real is None else level[real]
    return lse


def _one_row(x: Tensor) -> Tensor:
    """Packed tokens as one row of a batch: `[N, H, ...]` to `[1, H, N, ...]`, no copy."""
    return x.transpose(0, 1)[None]


def _dense_cpu(q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    mask = None
    if real is not None:
        mask = torch.zeros_like(real, dtype=q.dtype).masked_fill(~real, float("-inf"))
        mask = mask[:, None, None].expand(-1, 1, q.shape[2], -1)  # [s, 1, l, l], no copy
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, False, attn_mask=mask, scale=scale
    )


def _dense_blocks(
    q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    hidden = None if real is None else ~real[:, None, None]  # [s, 1, 1, l]
    step = streaming.block_rows(q.device, q.shape[0] * q.shape[1], k.shape[2])
    outputs, levels = [], []
    for start in range(0, q.shape[2], step):
        scores = q[:, :, start : start + step].float() @ k.float().transpose(-1, -2) * scale
        if hidden is not None:
            scores = scores.masked_fill(hidden, float("-inf"))
        levels.append(scores.detach().logsumexp(dim=-1))
        outputs.append(scores.softmax(dim=-1).to(v.dtype) @ v)
    return torch.cat(outputs, dim=2), torch.cat(levels, dim=2)


def _torch_varlen(q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float) -> tuple[Tensor, Tensor]:
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    out, lse = varlen_attn(
        q, k, v, spans.cu_seqlens, spans.cu_seqlens, spans.longest, spans.longest,
        scale=scale, return_aux=AuxRequest(lse=True),
    )  # fmt: skip
    return out, lse.transpose(0, 1)  # [H, N] -> [N, H]


def _torch_flash(q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """torch's flash attention of equally long spans, `[s, H, l, D]`; it takes no mask."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, scale=scale)
    return out, lse[..., : q.shape[2]]


def _flash_attn(
    backend: str, q: Tensor, k: Tensor, v: Tensor, spans: Spans, scale: float
) -> tuple[Tensor, Tensor]:
    """flash-attn's own packages. All give `[H, N]` in fp32 behind the output; 2 adds a dropout mask."""
    module, option = next((m, o) for name, m, o, _ in PACKAGES.values() if name == backend)
    out, lse, *_ = varlen_function(module)(
        q, k, v, cu_seqlens_q=spans.cu_seqlens, cu_seqlens_k=spans.cu_seqlens,
        max_seqlen_q=spans.longest, max_seqlen_k=spans.longest,
        softmax_scale=scale, causal=False, **{option: True},
    )  # fmt: skip
    return out, lse.transpose(0, 1)  # [H, N] -> [N, H]
