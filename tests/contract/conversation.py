"""A second turn that goes on from the cache of the first."""

from __future__ import annotations

import inspect

import torch


def follow_up(model, first: dict, sequences: torch.Tensor, second: dict, cache) -> dict:
    """Inputs for what the cache has not seen yet, at the positions Hugging Face gives it in the whole text.

    Args:
        first: inputs of the first turn.
        sequences: `[B, L]` prompt and answer of the first turn.
        second: inputs of the second turn, made as if it stood alone.
        cache: of the first turn; it lacks the answer's last token.
    """
    ids = torch.cat([sequences, second["input_ids"]], dim=1)
    rows, between = len(ids), sequences.shape[1] - first["input_ids"].shape[1]
    known = cache.get_seq_length()
    assert known == sequences.shape[1] - 1
    whole = {"input_ids": ids}
    for name, between_turns in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        if name in first:
            answer = torch.full((rows, between), between_turns, dtype=first[name].dtype)
            whole[name] = torch.cat([first[name], answer, second[name]], dim=1)
    inputs = {name: x for name, x in second.items() if name not in whole}
    inputs |= {name: x[:, known:] for name, x in whole.items() if name != "attention_mask"}
    return inputs | {
        "attention_mask": whole["attention_mask"],
        "position_ids": positions(model, whole, first, second)[..., known:],
        "past_key_values": cache,
    }


def positions(model, whole: dict, first: dict, second: dict) -> torch.Tensor:
    """Positions of a whole conversation, `[B, L]` or `[3, B, L]`."""
    if not hasattr(model.model, "get_rope_index"):
        return (whole["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    known = dict(whole)
    for name in (
        "image_grid_thw",
        "video_grid_thw",
        "second_per_grid_ts",
        "target_sizes",
        "target_sizes_videos",
    ):
        parts = [turn[name] for turn in (first, second) if name in turn]
        if parts:
            known[name] = torch.cat([torch.as_tensor(part) for part in parts])
    taken = inspect.signature(model.model.get_rope_index).parameters
    return model.model.get_rope_index(**{name: x for name, x in known.items() if name in taken})[0]
