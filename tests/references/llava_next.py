"""Visual token merging in LLaVA-NeXT: CLIP with CLS, pictures only. `references.llava` spells it out."""

from references.llava import forward, generate

__all__ = ["forward", "generate"]
