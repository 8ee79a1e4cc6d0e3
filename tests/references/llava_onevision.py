"""Visual token merging in LLaVA-OneVision: SigLIP, pictures and videos. `references.llava` spells it out."""

from references.llava import forward, generate, reader

__all__ = ["forward", "generate", "reader"]
