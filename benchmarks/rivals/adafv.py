"""AdaFV: not run here.

Han et al., arXiv 2501.09532: mixes the class token's attention with the likeness of each visual feature to
the question in CLIP's joint space of pictures and text. That likeness needs CLIP's text tower beside its
vision tower; Qwen's and InternVL's encoders have none, so the method is not defined on them.
"""

from __future__ import annotations

REASON = "needs CLIP's text tower, which the encoders of Qwen-VL and InternVL do not have"
