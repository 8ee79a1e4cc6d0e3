"""Patched models in VLMEvalKit: register one under a name, then run VLMEvalKit as ever.

    from illava.harness import vlmevalkit
    vlmevalkit.register("illava-7b", pretrained="Qwen/Qwen2.5-VL-7B-Instruct", reduction=0.778)

    import sys
    from vlmeval.run import main
    sys.argv = ["run", "--model", "illava-7b", "--data", "MMBench_DEV_EN"]
    main()

VLMEvalKit has no entry points for models; a script of a few lines is how it takes others'. Its inference
gives a model one question at a time.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from vlmeval.config import supported_VLM
from vlmeval.vlm.base import BaseModel

from illava.errors import DataError
from illava.harness.answering import Answerer
from illava.harness.arguments import plan_for
from illava.patching import patch
from illava.plan import Plan

MAX_NEW_TOKENS = 2048  # as VLMEvalKit's own Qwen2.5-VL has it


class PatchedModel(BaseModel):
    """A checkpoint of any supported family, patched.

    Args:
        pretrained: a folder, or a name on the hub.
        device: by default the first GPU VLMEvalKit lets this process see, or the CPU.
        system_prompt: said before each question.
        max_new_tokens, generation: for `generate`; greedy unless `do_sample` is given.
        frames, dtype, attn, device_map: see `Answerer.load`.
        plan: see `illava.harness.arguments.plan_for`.
    """

    is_api = False
    INTERLEAVE = True
    VIDEO_LLM = True

    def __init__(
        self,
        pretrained: str,
        *,
        device: str | None = None,
        device_map: str | None = None,
        dtype: str = "auto",
        attn: str | None = None,
        frames: int = 32,
        system_prompt: str | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        generation: dict[str, Any] | None = None,
        **plan: Any,
    ) -> None:
        super().__init__()
        self.system_prompt = system_prompt
        self.generation = {"do_sample": False, "max_new_tokens": max_new_tokens} | (generation or {})
        self.answerer = Answerer.load(
            pretrained, plan_for(plan),
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            device_map=device_map, dtype=dtype, attn=attn, frames=frames,
        )  # fmt: skip

    def generate_inner(self, message: list[dict[str, Any]], dataset: str | None = None) -> str:
        """An answer to a message of VLMEvalKit: parts with `type`, `value` and perhaps `role`."""
        ((text, _),) = self.answerer.answer([self.conversation(message)], **self.generation)
        return text

    def conversation(self, message: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """A message in transformers' form; neighbouring parts of one role are one turn."""
        turns: list[dict[str, Any]] = []
        if self.system_prompt:
            turns.append({"role": "system", "content": [{"type": "text", "text": self.system_prompt}]})
        for part in message:
            kind, role = part["type"], part.get("role") or "user"
            if kind not in ("text", "image", "video"):
                raise DataError(f"a {kind} cannot be shown to this model; texts, images and videos can")
            if not turns or turns[-1]["role"] != role:
                turns.append({"role": role, "content": []})
            turns[-1]["content"].append({"type": kind, kind: part["value"]})
        return turns


def register(name: str, **arguments: Any) -> None:
    """Let VLMEvalKit know a patched model by a name; `arguments` as `PatchedModel` takes them.

    The model is loaded when VLMEvalKit first asks for it; a plan that cannot be is refused now.
    """
    named = {key: value for key, value in arguments.items() if key not in _OF_MODEL}
    plan_for(named)
    supported_VLM[name] = partial(PatchedModel, **arguments)


def register_patched(name: str, original: str, **plan: Any) -> None:
    """Let VLMEvalKit know one of its own models, patched: its prompts and its loading stay as they are.

    For models whose code is published beside their weights, such as MiniCPM-V 2.6, which VLMEvalKit loads.

    Args:
        original: the name VLMEvalKit has for it, such as `"MiniCPM-V-2_6"`.
        plan: see `illava.harness.arguments.plan_for`.

    Raises:
        DataError: VLMEvalKit has no such model; and, when it is loaded, one that holds no `model`.
    """
    if original not in supported_VLM:
        raise DataError(f"VLMEvalKit has no model {original!r}; `vlmutil mlist all` prints those it has")
    supported_VLM[name] = partial(_loaded_and_patched, supported_VLM[original], plan_for(plan))


def _loaded_and_patched(load: Any, plan: Any, **arguments: Any) -> Any:
    loaded = load(**arguments)
    model = getattr(loaded, "model", None)
    if not isinstance(model, torch.nn.Module):
        raise DataError(
            f"{type(loaded).__name__} holds its model elsewhere than in .model; patch it yourself"
        )
    loaded.illava_handle = patch(model, plan=plan if isinstance(plan, Plan) else plan(model))
    return loaded


_OF_MODEL = frozenset(
    ("pretrained", "device", "device_map", "dtype", "attn", "frames", "system_prompt", "max_new_tokens",
     "generation")
)  # fmt: skip
