"""What illava needs to know of a model: where its parts are. Filled in by one file per family."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from illava.families.layout import Survivors
from illava.plan import Plan
from illava.schedule import ModelPlan, resolve


@dataclass(frozen=True)
class Projector:
    """A module that turns the encoder's units into visual tokens.

    Attributes:
        module: the module.
        block: the encoder block whose output it reads.
        squeeze: makes its arguments those of the survivors; `None` where they are so already.
        spread: puts its output back to what the full grid would have given.
        reads: where its output rows are made of units by weights (a resampler), those weights, frame by
            frame `[rows, units]`, given its output and who was alive; `None` where a unit is a row.
    """

    module: nn.Module
    block: int
    squeeze: Callable[[dict[str, Any], Survivors], dict[str, Any]] | None = None
    spread: Callable[[Any, Survivors], Any] = lambda output, alive: alive.spread(output)
    reads: Callable[[Any, Survivors], list[Tensor]] | None = None


@dataclass(frozen=True)
class Regrid:
    """A module between two encoder blocks that joins 2 x 2 patches into one token.

    Attributes:
        module: the module.
        block: the block after which it runs.
        squeeze: makes its arguments those of the survivors, given `[W, 2, 2]`, where the patches of
            each surviving window stand among the surviving tokens.
    """

    module: nn.Module
    block: int
    squeeze: Callable[[dict[str, Any], Tensor], dict[str, Any]]


@dataclass(frozen=True)
class Observed:
    """How to read queries and keys off an attention that does not use transformers' interface.

    Attributes:
        modules: names of modules inside the attention whose outputs hold them.
        queries_keys: from the attention and those outputs by name, queries and keys
            `[rows, width, H, D]` as they meet, and the factor on their products.
    """

    modules: tuple[str, ...]
    queries_keys: Callable[[Any, Mapping[str, Tensor]], tuple[Tensor, Tensor, float]]


@dataclass(frozen=True)
class Additions:
    """Features that a model adds to the outputs of its first decoder layers.

    Attributes:
        layers: how many layers.
        places, features: arguments of the language model: `[B, L]` bool where to, and a list with
            `[visual tokens, d]` per layer.
    """

    layers: int
    places: str
    features: str


@dataclass(frozen=True)
class Seams:
    """The parts of one model that merging touches.

    Attributes:
        model: the module that takes pictures and text (`...Model`).
        tower: the vision encoder; `blocks` those of its blocks whose output is used, each with an
            attention, a second norm and a feed-forward network under the names given, joined as
            `h = h + tail(ffn(norm(h)))`.
        ffn_tail: modules and scales of a block that its feed-forward output passes, in order.
        projectors: the modules that turn merge units into visual tokens.
        language_model: the decoder stack; `layers` its layers.
        merge_size: patches along one side of a merge unit, in the patches the encoder starts with.
        full_attention_blocks: encoder blocks that attend over a whole frame; the others attend in
            windows of `window_patches` patches.
        vit_ranked, llm_ranked: where tokens merge by attention unless layers are named.
        scoring_layers: decoder layers with softmax attention, which alone can tell importance.
        dead_rows: what rows merged away hold where the encoder's output is full again: -inf, which no
            encoder writes, so that the mark travels with features through whatever is done to them; 0
            where nobody reads it and -inf would do harm.
        unread_blocks: further blocks of the tower that run though nobody reads their output.
        regrid: a module inside the encoder that joins patches.
        packing: names of the model's methods that crop, interpolate or pool features.
        newline: name of the feature the model inserts between rows of features; no picture is behind it.
        block_observed: how to read the blocks' queries and keys, where their attention is their own.
        additions: visual features the model adds to the outputs of its first decoder layers.
    """

    model: nn.Module
    tower: nn.Module
    blocks: Sequence[nn.Module]
    block_attention: str
    block_norm: str
    block_ffn: str
    projectors: tuple[Projector, ...]
    language_model: nn.Module
    layers: Sequence[nn.Module]
    layer_attention: str
    merge_size: int
    vit_ranked: tuple[int, ...]
    llm_ranked: tuple[int, ...]
    full_attention_blocks: frozenset[int]
    scoring_layers: frozenset[int]
    window_patches: int = 0
    ffn_tail: tuple[str, ...] = ()
    dead_rows: float = float("-inf")
    unread_blocks: int = 0
    regrid: Regrid | None = None
    packing: tuple[str, ...] = ()
    newline: str | None = None
    block_observed: Observed | None = None
    additions: Additions | None = None

    def finish_ffn(self, block: nn.Module, output: Tensor) -> Tensor:
        """What a block does to its feed-forward output before adding it."""
        for name in self.ffn_tail:
            step = getattr(block, name)
            output = step(output) if isinstance(step, nn.Module) else step * output
        return output

    def settle(self, plan: Plan) -> ModelPlan:
        """A plan's layers settled for this model.

        Raises:
            PlanError: the model cannot carry it out, see `illava.schedule.resolve`.
        """
        return resolve(
            plan,
            vit_ranked=self.vit_ranked,
            llm_ranked=self.llm_ranked,
            vit_depth=len(self.blocks),
            llm_depth=len(self.layers),
            merge_size=self.merge_size,
            scoring_layers=self.scoring_layers,
            weighable=self.block_observed is None,
        )
