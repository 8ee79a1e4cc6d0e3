"""Generating greedily with every step's distribution kept, and generating an answer that is given.

Teacher forcing goes through `generate` as well: the prompt is prefilled without the answer, so that the
answer has no part in choosing visual tokens, and the same code runs in every family, patched or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from illava.evaluate.loading import Loaded
from illava.generation import GREEDY, answer_lengths, padding_of, tokenizer_of


@dataclass(frozen=True)
class Spoken:
    """Answers of a batch.

    Attributes:
        ids: `[B, n]` new tokens; padding after an answer's end.
        lengths: of each answer in tokens, its end-of-answer token included.
        scores: of each step `[B, vocabulary]`: what the next token was chosen by.
    """

    ids: Tensor
    lengths: list[int]
    scores: list[Tensor]

    def texts(self, loaded: Loaded) -> list[str]:
        """The answers, without special tokens."""
        tokenizer = tokenizer_of(loaded.processor)
        return [text.strip() for text in tokenizer.batch_decode(self.ids, skip_special_tokens=True)]


class _Listener(LogitsProcessor):
    """The last to see a step's scores. Given an answer, it leaves no choice but the answer's next token."""

    def __init__(self, answer: Tensor | None) -> None:
        self.answer, self.heard = answer, list[Tensor]()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.heard.append(scores)
        if self.answer is None:
            return scores
        forced = torch.full_like(scores, float("-inf"))
        step = self.answer[:, len(self.heard) - 1, None]
        return forced.scatter_(1, step, 0.0)


@torch.inference_mode()
def speak(
    loaded: Loaded, inputs: Mapping[str, Any], max_new_tokens: int, *, answer: Tensor | None = None
) -> Spoken:
    """Generate greedily, or say a given answer and keep what would have been chosen instead.

    Args:
        loaded: whose model may be patched.
        inputs: of `generate`.
        max_new_tokens: longest answer.
        answer: `[B, n]`, as `Spoken.ids` of the same inputs.
    """
    listener = _Listener(answer)
    longest = max_new_tokens if answer is None else answer.shape[1]
    ids = loaded.model.generate(
        **inputs,
        **GREEDY,
        max_new_tokens=longest,
        logits_processor=LogitsProcessorList([listener]),
        pad_token_id=padding_of(loaded.model, loaded.processor),
    )
    # Some models' `generate` gives the new tokens alone.
    start = inputs["input_ids"].shape[1] if ids.shape[1] > len(listener.heard) else 0
    new = ids[:, start:]
    return Spoken(new, answer_lengths(loaded.model, new), listener.heard)
