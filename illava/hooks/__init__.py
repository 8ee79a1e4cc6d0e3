"""What each hook does: shorten what flows between a model's modules, and put it back at the seams.

Changes no module. What is known about a call lives in context variables (one call per thread and
task); what is known about a sequence lives in its cache.
"""

from illava.hooks.attention import ATTENTION_NAME, ENCODER_ATTENTION_NAME, ConfigView, attention
from illava.hooks.encoder import EncoderHooks
from illava.hooks.language import LanguageHooks
from illava.hooks.state import OfOneModel, State

__all__ = [
    "ATTENTION_NAME",
    "ENCODER_ATTENTION_NAME",
    "ConfigView",
    "EncoderHooks",
    "LanguageHooks",
    "OfOneModel",
    "State",
    "attention",
]
