"""Visual token merging in LLaVA-NeXT: CLIP with CLS, pictures only. `references.llava` spells it out."""

from references.llava import forward, generate, reader

__all__ = ["forward", "generate", "reader"]
