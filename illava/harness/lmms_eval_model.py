"""Patched models in lmms-eval (0.7): `lmms-eval --model illava --model_args pretrained=...,reduction=0.778`.

lmms-eval finds them through `lmms_eval_names`; nothing of lmms-eval is changed.
One class serves every family: prompts come from the checkpoint's own chat template, pictures and videos
go through its own processor.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from lmms_eval.utils import Collator
from rich.console import Console
from rich.progress import Progress

from illava.harness.answering import Answerer
from illava.harness.arguments import plan_for

MAX_NEW_TOKENS = 128  # where a task says nothing, as lmms-eval's own Qwen2.5-VL has it


class PatchedModel(lmms):
    """A checkpoint of any supported family, patched."""

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        device_map: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        max_num_frames: int = 32,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        system_prompt: str | None = None,
        **plan: Any,
    ) -> None:
        """What `--model_args` may say.

        Args:
            pretrained: a folder, or a name on the hub.
            device: by default the GPU of this process, or the CPU where there is none.
            batch_size: prompts answered at once; also `--batch_size`.
            dtype: as `from_pretrained` takes it.
            max_num_frames: of each video, spread evenly over it.
            min_pixels, max_pixels: for the processor, in families that have them.
            system_prompt: a text, or a file that holds one.
            plan: see `illava.harness.arguments.plan_for`; `reduction=0` leaves the model as it is.
        """
        super().__init__()
        settled = plan_for(plan)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        several = self._world_size > 1
        self.device = torch.device(self.accelerator.device if several or device is None else device)
        self.batch_size = int(batch_size)
        self.system_prompt = self._resolve_system_prompt(system_prompt or "")
        pixels = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        self.answerer = Answerer.load(
            pretrained, settled, device=self.device, device_map=device_map, dtype=dtype,
            attn=attn_implementation, frames=max_num_frames,
            **{name: value for name, value in pixels.items() if value is not None},
        )  # fmt: skip
        if self._rank == 0:
            Console(stderr=True).print(self.answerer.handle, markup=False)

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers in the order of the requests; batches hold requests with the same generation settings."""
        order = Collator([r.args for r in requests], lambda x: x[3], group_fn=lambda x: x[2], grouping=True)
        results: list[GenerationResult] = []
        began = time.perf_counter()
        with Progress(console=Console(stderr=True), disable=self._rank != 0) as progress:
            bar = progress.add_task("answering", total=len(requests))
            for batch in order.get_batched(n=self.batch_size):
                results += self._answer(batch)
                progress.advance(bar, len(batch))
        seconds = time.perf_counter() - began
        tokens = sum(result.token_counts.output_tokens for result in results)
        log_metrics(
            total_gen_tokens=tokens, total_elapsed_time=seconds, avg_speed=tokens / max(seconds, 1e-9),
            additional_metrics={"rank": self._rank},
        )  # fmt: skip
        return order.get_original(results)

    def _answer(self, batch: list[Any]) -> list[GenerationResult]:
        conversations = []
        for _, to_messages, _, document, task, split in batch:
            messages = ChatMessages(messages=to_messages(self.task_dict[task][split][document]))
            conversation = messages.to_hf_messages()
            conversations.append(self._apply_system_prompt(conversation, self.system_prompt))
        asked = batch[0][2]
        answers = self.answerer.answer(conversations, **generation_settings(asked))
        return [
            GenerationResult(cut(text, asked.get("until")), TokenCounts(output_tokens=tokens))
            for text, tokens in answers
        ]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not here, as in lmms-eval's own classes of these families."""
        raise NotImplementedError(
            "illava's models answer by generation; choose a task with output_type: generate_until"
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not here, as in lmms-eval's own classes of these families."""
        raise NotImplementedError("illava's models answer one round; choose a task with one")


def generation_settings(asked: dict[str, Any]) -> dict[str, Any]:
    """A task's `generation_kwargs` as `generate` takes them; greedy unless a temperature is asked for."""
    settings: dict[str, Any] = {
        "max_new_tokens": asked.get("max_new_tokens", MAX_NEW_TOKENS),
        "num_beams": asked.get("num_beams") or 1,
    }
    temperature = asked.get("temperature") or 0
    if temperature > 0:
        chosen = {name: asked[name] for name in ("top_p", "top_k") if asked.get(name) is not None}
        return settings | {"do_sample": True, "temperature": temperature} | chosen
    return settings | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def cut(text: str, until: str | list[str] | None) -> str:
    """A text up to the first of a task's stop strings.

    A blank line, lmms-eval's default for every task, is no stop, as in its own classes: chat models write
    them in the middle of an answer.
    """
    stops = [until] if isinstance(until, str) else until or []
    for stop in stops:
        if stop and stop != "\n\n":
            text = text.split(stop)[0]
    return text
