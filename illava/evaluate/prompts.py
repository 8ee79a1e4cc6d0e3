"""Items as a processor makes inputs of `generate` of them, a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from illava.errors import CheckpointError, DataError
from illava.evaluate.loading import Loaded
from illava.generation import processed
from illava.jobs import Item, Skipped, decode
from illava.memory import is_memory
from illava.weights import first_line

Made = TypeVar("Made")


def decoded(item: Item | Skipped) -> Item:
    """An item with its pictures and videos read.

    Raises:
        DataError: one of them cannot be read; says which and why.
    """
    ready: Item | Skipped = item if isinstance(item, Item) and (item.pictures or item.clips) else decode(item)
    if isinstance(ready, Skipped):
        raise DataError(ready.reason)
    return ready


def batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """So many at a time, in order."""
    batch: list[Any] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def together(do: Callable[[list[Item]], list[Made]], items: list[Item]) -> list[Made]:
    """What `do` makes of items; where a processor refuses them together, of one after the other.

    Some make no batch of videos of different lengths, and take each by itself.

    Raises:
        DataError: what `do` raises for one item alone.
    """
    try:
        return do(items)
    except DataError:
        if len(items) == 1:
            raise
    return [made for item in items for made in do([item])]


def build_inputs(loaded: Loaded, items: Sequence[Item]) -> dict[str, Any]:
    """Inputs of `generate` for items: pictures and videos first, then what is asked.

    Args:
        loaded: a model with its processor.
        items: rows of the batch, padded on the left; what is not decoded yet is read here.

    Returns:
        Tensors on the model's device by name, pixels in the model's dtype.

    Raises:
        CheckpointError: no processor, or one without a chat template.
        DataError: an item that cannot be read, a video for a model that takes none, or what the processor
            refuses.
    """
    processor = loaded.processor
    if processor is None:
        raise CheckpointError(
            f"{loaded.name} has no processor, so it cannot be shown pictures; copy its "
            "preprocessor_config.json, tokenizer.json and chat template beside config.json"
        )
    items = [decoded(item) for item in items]
    films = [item for item in items if item.clips]
    if films and getattr(processor, "video_processor", None) is None:
        others = f" and {len(films) - 1} more" if len(films) > 1 else ""
        raise DataError(f"{loaded.name} takes pictures only; leave {films[0].source}{others} out")
    texts = [_written(loaded, item) for item in items]
    pictures = [item.pictures for item in items]
    clips = [clip for item in films for clip in item.clips]
    try:
        return processed(loaded.model, processor, texts, pictures, clips)
    except (ValueError, RuntimeError, TypeError) as error:
        if is_memory(error):
            raise
        # Of several, nobody says which.
        where = items[0].source if len(items) == 1 else f"one of {', '.join(x.source for x in items)}"
        raise DataError(f"{loaded.name}'s processor refuses {where}: {first_line(error)}") from error


def _written(loaded: Loaded, item: Item) -> str:
    content = [{"type": "image"} for _ in item.pictures] + [{"type": "video"} for _ in item.clips]
    content.append({"type": "text", "text": item.prompt})
    message = [{"role": "user", "content": content}]
    try:
        return loaded.processor.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    except ValueError as error:
        raise CheckpointError(
            f"{loaded.name} has no chat template, so nobody can tell how it is asked; copy its "
            "chat_template.jinja beside its tokenizer.json"
        ) from error
