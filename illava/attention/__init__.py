"""Statistics of attention: their definition, their streaming form, and the kernels that yield them.

Needs nothing but torch.
"""

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
    "varlen_attention",
    "varlen_attention_received",
    "varlen_log_sum_exp",
]
