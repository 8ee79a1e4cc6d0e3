"""Statistics of attention: their definition, their streaming form, and the kernels that yield them.

Needs nothing but torch; on CUDA a Triton kernel computes what it can.
"""

from illava.attention.choice import AttentionChoice, Choices, choose
from illava.attention.column_sums import column_sum_backend
from illava.attention.flash import (
    BACKENDS,
    varlen_attention,
    varlen_attention_received,
    varlen_log_sum_exp,
)
from illava.attention.output import span_attention
from illava.attention.spans import Spans

__all__ = [
    "AttentionChoice",
    "BACKENDS",
    "Choices",
    "Spans",
    "choose",
    "span_attention",
    "column_sum_backend",
    "varlen_attention",
    "varlen_attention_received",
    "varlen_log_sum_exp",
]
