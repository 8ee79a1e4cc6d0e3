"""A patched model's plain definition, as a model: every call runs all anew, from the family's reference.

No cache, no hooks, no batch: the logits of each row come from `references`, which shares nothing with the
package. Hugging Face's own `generate` runs on it, so that every way of decoding has its definition.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

import zoo
from contract import tools
from contract.recorder import options


class Plain(PreTrainedModel, GenerationMixin):
    """Answers to the prompts it was made for, and to no others.

    Args:
        model: the patched model; its weights are read, its hooks do not run.
        family: its name in the zoo.
        inputs: the prompts together, as the patched model is given them.
        rows: what they are made of, one list of parts for each batch row.
        plan: the handle's.
    """

    config_class = PretrainedConfig
    main_input_name = "input_ids"

    def __init__(self, model, family: str, inputs: dict, rows, plan) -> None:
        super().__init__(PretrainedConfig(vocab_size=model.config.get_text_config().vocab_size))
        self.generation_config = copy.deepcopy(model.generation_config)
        self.held = torch.nn.Parameter(torch.zeros(1))  # so that it has a device
        self.prompts, self.length = inputs["input_ids"].tolist(), inputs["input_ids"].shape[1]
        self.runs = [
            zoo.reference(family).reader(
                model, tools.prompt(family, row, seeds=[number]), *tools.removed_by(plan), **options(plan)
            )
            for number, row in enumerate(rows)
        ]
        self.known: dict[tuple, torch.Tensor] = {}

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return {"input_ids": input_ids}

    def forward(self, input_ids, attention_mask=None, **kwargs):
        """Logits `[B, 1, vocab]` of the last position: beams and several answers are rows as any other."""
        return CausalLMOutputWithPast(logits=torch.stack([self._last(row) for row in input_ids.tolist()]))

    def _last(self, row: list[int]) -> torch.Tensor:
        number, answer = self.prompts.index(row[: self.length]), row[self.length :]
        return self.logits(answer, number)[-1:]

    def logits(self, answer: list[int], number: int = 0) -> torch.Tensor:
        """`[L, vocab]` over prompt `number`, unpadded, and an answer."""
        key = number, tuple(answer)
        if key not in self.known:
            self.known[key] = self.runs[number](answer)
        return self.known[key]

    def answer(self, inputs: dict, *, tokens: int = 6, seed: int = 7, **settings):
        """What `generate` makes of it; only ids and mask are read, the pictures are known."""
        torch.manual_seed(seed)
        return self.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
            max_new_tokens=tokens, **settings | {"use_cache": False},
        )  # fmt: skip


# The rest of the zoo runs with `-m slow`.
FAMILIES = ("qwen2_5_vl", "qwen3_vl", "internvl", "llava_onevision")
each_family = pytest.mark.parametrize(
    "family",
    [name if name in FAMILIES else pytest.param(name, marks=pytest.mark.slow) for name in zoo.FAMILIES],
)


@functools.cache
def plain_of(family: str, kind: str) -> Plain:
    """The plain definition of one of a family's prompts, merged as `tools.DEEP` says.

    Args:
        kind: of the zoo's prompts, or "beams" for the batch that this version can repeat.
    """
    module = zoo.FAMILIES[family]
    rows = module.BEAMS if kind == "beams" else module.KINDS[kind]
    # A model of its own tells the plan: the one that tests share may be patched by who asks.
    with tools.patch(module.build(), family, **tools.DEEP) as handle:
        plan = handle.plan
    return Plain(tools.build(family), family, inputs_of(family, kind), rows, plan)


def inputs_of(family: str, kind: str) -> dict:
    return tools.beams_of(family) if kind == "beams" else tools.prompt_of(family, kind)


def patched(family: str):
    """The family's model, merging as its plain definition does: `with patched(family) as handle`."""
    return tools.patch(tools.build(family), family, **tools.DEEP)
