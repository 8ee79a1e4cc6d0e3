"""What illava needs to know of a model: where its parts are. Filled in by one file per family."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from illava.errors import SeamError, UnsupportedInputError
from illava.families.layout import Layout


@dataclass(frozen=True)
class Survivors:
    """What is alive at one seam of the encoder.

    Attributes:
        layout: of the tokens at that place.
        units: `[U]` surviving units, numbered over the whole call.
        tokens: `[N]` surviving tokens, likewise.
        members: `[U, g]` where each unit's tokens stand among the survivors.
        frame_counts: units of each frame, known on the host.
    """

    layout: Layout
    units: Tensor
    tokens: Tensor
    members: Tensor
    frame_counts: tuple[int, ...]

    def followed_by(self, others: Sequence[Survivors]) -> Survivors:
        """These and those of further encoder calls, as if all had been one."""
        every = [self, *others]
        if not others:
            return self
        grids = tuple(g for alive in every for g in alive.layout.grids)
        return Survivors(
            replace(self.layout, grids=grids),
            _shifted([a.units for a in every], [a.layout.total_units for a in every]),
            _shifted([a.tokens for a in every], [a.layout.total_tokens for a in every]),
            _shifted([a.members for a in every], [len(a.tokens) for a in every]),
            tuple(n for alive in every for n in alive.frame_counts),
        )

    def squeeze(self, x: Tensor) -> Tensor:
        """Survivors' rows of something with a row per unit or per token: `[..., d]` to `[1, n, d]`."""
        flat = x.flatten(0, -2)  # [rows, d]
        chosen = self.units if flat.shape[0] == self.layout.total_units else self.tokens
        return flat[chosen.to(x.device)][None]

    def spread(self, rows: Tensor) -> Tensor:
        """`[U, d]` rows of surviving units to all of them; those merged away are -inf."""
        full = rows.new_full((self.layout.total_units, rows.shape[-1]), float("-inf"))
        return full.index_copy(0, self.units.to(rows.device), rows)


def _shifted(numbers: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    starts = accumulate(sizes, initial=0)
    return torch.cat([x + start for x, start in zip(numbers, starts, strict=False)])


@dataclass(frozen=True)
class Projector:
    """A module that turns the encoder's units into visual tokens.

    Attributes:
        module: the module.
        block: the encoder block whose output it reads.
        squeeze: makes its arguments those of the survivors; `None` where they are so already.
        spread: puts its output back to what the full grid would have given.
    """

    module: nn.Module
    block: int
    squeeze: Callable[[dict[str, Any], Survivors], dict[str, Any]] | None = None
    spread: Callable[[Any, Survivors], Any] = lambda output, alive: alive.spread(output)


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
        vit_default, llm_default: the family's default merging layers.
        scoring_layers: decoder layers with softmax attention, which alone can tell importance.
        unread_blocks: further blocks of the tower that run though nobody reads their output.
        regrid: a module inside the encoder that joins patches.
        packing: names of the model's methods that crop, interpolate or pool features.
        newline: a feature the model inserts between rows of features; no picture is behind it.
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
    vit_default: tuple[int, ...]
    llm_default: tuple[int, ...]
    full_attention_blocks: frozenset[int]
    scoring_layers: frozenset[int]
    window_patches: int = 0
    ffn_tail: tuple[str, ...] = ()
    unread_blocks: int = 0
    regrid: Regrid | None = None
    packing: tuple[str, ...] = ()
    newline: Tensor | None = None
    block_observed: Observed | None = None
    additions: Additions | None = None

    def finish_ffn(self, block: nn.Module, output: Tensor) -> Tensor:
        """What a block does to its feed-forward output before adding it."""
        for name in self.ffn_tail:
            step = getattr(block, name)
            output = step(output) if isinstance(step, nn.Module) else step * output
        return output


@dataclass(frozen=True)
class VisualInput:
    """Which tokens of one call came from pictures.

    Attributes:
        segment: `[B, L]` int64 on the CPU: the number of the picture or video a token belongs to,
            -1 for text and padding.
        kinds: `"image"` or `"video"` per segment.
        tokens: visual tokens per segment in this call.
        encoded_units: per segment, the merge units of each grid it was encoded as (one grid, or a
            picture's tiles), in the encoder's order; `None` where the model's packing tells.
    """

    segment: Tensor
    kinds: tuple[str, ...]
    tokens: tuple[int, ...]
    encoded_units: tuple[tuple[int, ...] | None, ...]

    def expanded(self, rows: int, length: int) -> VisualInput:
        """The same for a batch whose rows were repeated one by one, as for beams.

        Raises:
            UnsupportedInputError: of another length, or rows that are no multiple.
        """
        own = len(self.segment)
        if self.segment.shape[1] != length or rows % own:
            raise UnsupportedInputError(
                f"the language model is called with {rows} x {length} tokens where its pictures are known "
                f"for {own} x {self.segment.shape[1]}; pass the prompt in one call (no prefill_chunk_size)"
            )
        repeats = rows // own
        if repeats == 1:
            return self
        order: list[int] = []
        lines: list[Tensor] = []
        for row in self.segment:
            numbers = sorted(set(row[row >= 0].tolist()))
            for _ in range(repeats):
                table = torch.full((len(self.kinds) + 1,), -1)  # the last for text, which is -1
                table[numbers] = torch.arange(len(order), len(order) + len(numbers))
                lines.append(table[row])
                order += numbers
        return VisualInput(
            torch.stack(lines),
            tuple(self.kinds[i] for i in order),
            tuple(self.tokens[i] for i in order),
            tuple(self.encoded_units[i] for i in order),
        )


# Of each picture its visual tokens, and the merge units of each grid it is encoded as, if known.
Pictures = Sequence[tuple[int, tuple[int, ...] | None]]


def visual_input(
    model: nn.Module, call: Mapping[str, Any], pictures: Mapping[str, Pictures]
) -> VisualInput | None:
    """Find the tokens of pictures in a call by its placeholders; `None` if it brings no picture.

    Args:
        model: the model called, for its placeholder tokens.
        call: its arguments by name.
        pictures: for `"image"` and `"video"`, those the call brings.
    """
    return visual_tokens({kind: placeholders(model, call, kind) for kind in pictures}, pictures)


def visual_tokens(places: Mapping[str, Tensor], pictures: Mapping[str, Pictures]) -> VisualInput | None:
    """Which tokens belong to which picture; `None` if there is no picture.

    Placeholders and features correspond in reading order, so the sizes of the features say where one
    picture ends and the next begins.

    Args:
        places: for `"image"` and `"video"`, where its tokens stand, `[B, L]` bool on the CPU.
        pictures: likewise, those the call brings.
    """
    segment: Tensor | None = None
    kinds: list[str] = []
    tokens: list[int] = []
    units: list[tuple[int, ...] | None] = []
    for kind, found in pictures.items():
        place = places[kind]
        if segment is None:
            segment = torch.full(place.shape, -1, dtype=torch.long)
        counts = torch.tensor([count for count, _ in found], dtype=torch.long)
        numbers = torch.arange(len(kinds), len(kinds) + len(found)).repeat_interleave(counts)
        if int(place.sum()) != len(numbers):
            return None  # the model itself reports features and placeholders that do not match
        segment[place] = numbers
        kinds += [kind] * len(found)
        tokens += counts.tolist()
        units += [grids for _, grids in found]
    if segment is None or not tokens:
        return None
    return VisualInput(segment, tuple(kinds), tuple(tokens), tuple(units))


def placeholders(model: nn.Module, call: Mapping[str, Any], kind: str) -> Tensor:
    """Where a call's tokens stand for an `"image"` or a `"video"`: `[B, L]` bool on the CPU."""
    config: Any = model.config
    token = getattr(config, f"{kind}_token_id", None)
    if token is None:
        token = getattr(config, f"{kind}_token_index")
    if call.get("input_ids") is not None:
        return call["input_ids"].cpu() == token
    embedding = model.get_input_embeddings().weight[token]
    return (call["inputs_embeds"] == embedding.to(call["inputs_embeds"].device)).all(-1).cpu()


def runs(place: Tensor) -> list[int]:
    """Lengths of the runs of placeholders in `[B, L]`, in reading order; a run ends with its row."""
    edges = torch.nn.functional.pad(place.long(), (1, 1)).diff(dim=1)  # [B, L + 1]
    starts, ends = (edges == 1).nonzero(), (edges == -1).nonzero()
    return (ends - starts)[:, 1].tolist()


def used_blocks(depth: int, feature_layer: int | Sequence[int]) -> int:
    """How many blocks lie below the hidden states a model reads from its encoder.

    Args:
        depth: blocks of the encoder.
        feature_layer: index, or indices, into its `depth + 1` hidden states.
    """
    indices = [feature_layer] if isinstance(feature_layer, int) else list(feature_layer)
    return max(index % (depth + 1) for index in indices)


def spread_tiles(output: Tensor, alive: Survivors) -> Tensor:
    """A projector's `[1, U, d]` of survivors to `[tiles, units, d]`."""
    return alive.spread(output[0]).unflatten(0, (len(alive.layout.frames), -1))


def feature_lengths(features: Any) -> list[int]:
    """Tokens per picture of a model's features: one tensor per picture, or a batch of them."""
    if isinstance(features, Tensor) and features.ndim == 2:
        return [len(features)]
    return [len(f) for f in features]


def part(root: nn.Module, path: str, why: str, *alternatives: str) -> Any:
    """`root.path` or the first of the alternatives it has, or an error that names what is missing.

    Raises:
        SeamError: this version of transformers has no such part.
    """
    for candidate in (path, *alternatives):
        current: Any = root
        for name in candidate.split("."):
            current = getattr(current, name, None)
        if current is not None:
            return current
    import transformers

    raise SeamError(
        f"{type(root).__name__} has no {path!r} in transformers {transformers.__version__}; illava needs "
        f"it {why}. Install a version it was run on (4.57.6 or 5.23), or report this at the project's "
        "issue tracker."
    )


def core_of(model: nn.Module) -> nn.Module:
    """The module that joins pictures and text, in `...ForConditionalGeneration` or itself.

    Raises:
        SeamError: it has none.
    """
    if hasattr(model, "lm_head") or not hasattr(model, "language_model"):
        return part(model, "model", "as the module that joins pictures and text")
    return model


@lru_cache(maxsize=256)
def _signature(forward: Any) -> inspect.Signature:
    return inspect.signature(forward)


def arguments(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Everything a module was called with, by name, whether it came by position or by keyword."""
    names = [n for n in _signature(type(module).forward).parameters if n != "self"]
    return dict(zip(names, args, strict=False)) | dict(kwargs)
