"""Where every surviving token came from: what `report.provenance` holds after a call with `trace=True`.

Pure bookkeeping on small sparse tensors on the CPU; no model in sight. A token's sources say of which
of the picture's patches its feature is made, by the weights of the merges it went through: what would
come out if "which patch am I" were a feature and were merged along. What attention and feed-forward
networks carry from one token to another is not counted.

Notation for tensor shapes: n tokens left after a merge, P patches of a picture.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from illava.sparse import entries

# What has become of a patch. The larger one wins where several tokens stand on one patch.
GONE, RECYCLED, INFORMATIVE = 0, 1, 2


@dataclass(frozen=True, eq=False)
class Step:
    """The tokens of one picture after one merge.

    Attributes:
        stage: `"vit"` for the encoder, `"llm"` for the language model, `"entry"` for what enters it.
        layer: the layer that merged, from 0; the encoder's depth for its output, -1 for the language
            model's input.
        tokens: `[n]` which tokens are left, ascending: in the encoder merge units in raster order, frame
            by frame; afterwards the picture's visual tokens.
        recycled: `[n]` bool, those that took in others in this merge; the others are informative.
        mixed: `[n]` bool, those with features of others in them, from this merge or from earlier ones.
        sources: `[n, P]` sparse, of which patches each token is made. Every row sums to 1.
        stands: `[n, P]` sparse, the patches in whose place each token stands, likewise: those of its merge
            unit, or behind packing, pooling or a resampler those it reads.
        state: `[P]` uint8, `INFORMATIVE` or `RECYCLED` where such a token stands, `GONE` elsewhere.
        importance: `[P]` by what this merge ranked the tokens standing there, NaN where none stood any
            more; `None` where nothing was ranked.
    """

    stage: str
    layer: int
    tokens: Tensor
    recycled: Tensor
    mixed: Tensor
    sources: Tensor
    stands: Tensor
    state: Tensor
    importance: Tensor | None = None

    @property
    def name(self) -> str:
        """Where in the model this is, as a reader would say it."""
        if self.stage == "entry":
            return "into the language model"
        return f"{'encoder block' if self.stage == 'vit' else 'decoder layer'} {self.layer}"

    @property
    def share(self) -> Tensor:
        """`[P]` how much of the tokens left is made of each patch, in tokens; their sum is n."""
        _, patches, weights = entries(self.sources)
        return torch.zeros(self.sources.shape[1]).index_add(0, patches, weights)

    @property
    def absorbed(self) -> Tensor:
        """`[P]` bool: gone, but living on in a token that took it in."""
        return (self.state == GONE) & (self.share > 0)


@dataclass(frozen=True, eq=False)
class Provenance:
    """Of one picture or video of one batch row: which patches its tokens stand for, merge by merge.

    Patches are those the encoder cut the picture into, numbered frame by frame and line by line. Where
    the features came from the caller, nothing is known of patches: there visual tokens count as such.

    Attributes:
        kind: `"image"` or `"video"`.
        row: batch row, beams counted as rows.
        model_type: the family, which tells how frames lie on the picture.
        frames: `(height, width)` in patches of every frame, tile or slice; their product summed is P.
        unit_side: patches along one side of a merge unit.
        merges: one step per merging layer, as in the picture's `PictureRecord.layers`.
        entry: what the language model was given, through projector, packing, pooling or resampler.
        known: whether the encoder call is known; not where features came from the caller.
    """

    kind: str
    row: int
    model_type: str
    frames: tuple[tuple[int, int], ...]
    unit_side: int
    merges: tuple[Step, ...]
    entry: Step
    known: bool = True

    @property
    def patches(self) -> int:
        """P."""
        return sum(h * w for h, w in self.frames)

    def maps(self, values: Tensor) -> list[Tensor]:
        """`[P]`, something with a value per patch, as one `[height, width]` per frame."""
        parts = values.split([h * w for h, w in self.frames])
        return [part.unflatten(0, size) for part, size in zip(parts, self.frames, strict=True)]
