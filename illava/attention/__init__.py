"""Statistics of attention: their definition, their streaming form, and the kernels that yield them.

Needs nothing but torch; on CUDA a Triton kernel computes what it can.
"""

from illava.attention.column_sums import column_sum_backend
from illava.attention.flash import (
    BACKENDS,
    choose_backend,
    varlen_attention,
    varlen_attention_received,
    varlen_log_sum_exp,
)
from illava.attention.output import span_attention
from illava.attention.spans import Spans

__all__ = [
    "BACKENDS",
    "Spans",
    "choose_backend",
    "span_attention",
    "column_sum_backend",
    "varlen_attention",
    "varlen_attention_received",
    "varlen_log_sum_exp",
]
