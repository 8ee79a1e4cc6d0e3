"""What each hook does: shorten what flows between a model's modules, and put it back at the seams.

Changes no module. What is known about a call lives in context variables (one call per thread and
task); what is known about a sequence lives in its cache.
"""

from __future__ import annotations

import itertools
import sys
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from illava import sequence
from illava.errors import AlreadyPatchedError, UnsupportedInputError
from illava.families.packing import pack_over_dead
from illava.families.seams import Projector, Regrid, Seams, VisualInput, arguments
from illava.flops import measure
from illava.language import LanguageCall, refuse_unserved
from illava.plan import ModelPlan
from illava.report import Report, build_report
from illava.vision import EncoderRecord, VisionCall, is_dead

# The name under which a merging attention module finds illava's attention function. It is read from
# that module's own view of its config, only while it merges; no other model ever carries it.
ATTENTION_NAME = "illava"
_NUMBERS = itertools.count()


class Hooks:
    """The state and the hooks of one patched model. Hooks take and return what torch's do."""

    def __init__(self, plan: ModelPlan, seams: Seams, family: Any) -> None:
        self.plan, self.seams, self.family = plan, seams, family
        self.shape = measure(seams)
        self.number = next(_NUMBERS)
        self.last: Report | None = None
        self.vision: ContextVar[VisionCall | None] = ContextVar("illava_vision", default=None)
        self.visual: ContextVar[VisualInput | None] = ContextVar("illava_visual", default=None)
        self.language: ContextVar[LanguageCall | None] = ContextVar("illava_language", default=None)
        self.encoded: ContextVar[deque[EncoderRecord] | None] = ContextVar("illava_encoded", default=None)
        # An encoder call whose features are still on their way through projector and packing.
        self.left: ContextVar[VisionCall | None] = ContextVar("illava_left", default=None)

    def block_attends(self, number: int) -> bool:
        """Whether encoder block `number` is attending and about to merge."""
        call = self.vision.get()
        return call is not None and call.attending == number

    def layer_attends(self, number: int) -> bool:
        """Whether decoder layer `number` is attending and about to merge."""
        call = self.language.get()
        return call is not None and call.attending == number

    # The vision encoder -------------------------------------------------------------------------

    def enter_tower(self, module: Any, args: Any, kwargs: Any) -> None:
        call_args = arguments(module, args, kwargs)
        pixels = next(iter(call_args.values()))
        call = VisionCall(
            self.plan,
            self.seams,
            self.family.layout(self.seams, call_args),
            pixels.device,
            module.config._attn_implementation,
            records=call_args.get("output_hidden_states") not in (None, False),
        )
        if call.removes and _checkpoints(self.seams.tower):
            refuse_unserved(None, None, True, 0)
        self.vision.set(call)
        self.left.set(None)

    def enter_block(self, number: int, args: Any, kwargs: Any) -> Any:
        call = self.vision.get()
        if call is None or (stage := call.stage(number)).first_block == 0:
            return None
        if kwargs.get("position_embeddings") is not None:
            cos, sin = kwargs["position_embeddings"]
            kwargs["position_embeddings"] = (stage.select(cos), stage.select(sin))
        if kwargs.get("cu_seqlens") is not None:
            kwargs["cu_seqlens"] = stage.recount(kwargs["cu_seqlens"])
        return args, kwargs

    def enter_block_attention(self, number: int, args: Any, kwargs: Any) -> Any:
        call = self.vision.get()
        if call is None or not call.merges_at(number):
            return None
        spans = kwargs.get("cu_seqlens")
        call.begin_attention(number, spans)
        if spans is not None:
            # One span over everything: the module hands all tokens to illava's attention function,
            # which attends within the real spans together.
            kwargs["cu_seqlens"] = spans.new_tensor([0, len(call.stage(number).tokens)])
        return args, kwargs

    def leave_block_attention(self) -> None:
        call = self.vision.get()
        if call is not None:
            call.attending = None

    def merge_block(self, number: int, args: Any, kwargs: Any) -> Any:
        call = self.vision.get()
        if call is None or not call.merges_at(number):
            return None
        return (call.merge(number, args[0]), *args[1:]), kwargs

    def leave_ffn(self, number: int, output: torch.Tensor) -> Any:
        call = self.vision.get()
        if call is None or not call.merges_at(number):
            return None
        call.merged[number] = call.merged[number] + self.seams.finish_ffn(self.seams.blocks[number], output)
        return output.new_zeros(())  # the block adds this to its unmerged input, then drops the sum

    def leave_block(self, number: int, output: Any) -> Any:
        call = self.vision.get()
        if call is None or not call.merges_at(number):
            return None
        merged = call.merged.pop(number)
        if call.outputs is not None:
            call.outputs[number] = merged
        return (merged, *output[1:]) if isinstance(output, tuple) else merged

    def enter_regrid(self, regrid: Regrid, module: Any, args: Any, kwargs: Any) -> Any:
        call = self.vision.get()
        if call is None or not call.removes:
            return None
        return (), regrid.squeeze(arguments(module, args, kwargs), call.enter_regrid(regrid.block))

    def enter_projector(self, seam: Projector, module: Any, args: Any, kwargs: Any) -> Any:
        call = self.vision.get() or self.left.get()
        if call is None or not call.removes or seam.squeeze is None:
            return None
        alive = call.stage(seam.block + 1).survivors()
        return (), seam.squeeze(arguments(module, args, kwargs), alive)

    def leave_projector(self, seam: Projector, output: Any) -> Any:
        call = self.vision.get() or self.left.get()
        if call is None or not call.removes:
            return None
        return seam.spread(output, call.stage(seam.block + 1).survivors())

    def leave_tower(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        call = self.vision.get()
        self.vision.set(None)
        if call is None or output is None:
            return output
        encoded = self.encoded.get()
        if encoded is None:
            # Whoever encodes without ever asking the language model must not fill the memory.
            self.encoded.set(encoded := deque(maxlen=1024))
        encoded.append(call.record)
        self.left.set(call)
        if not call.removes:
            return output
        call.forget()
        if getattr(output, "last_hidden_state", None) is None:
            return output  # 4.57 returns a projector's output alone, which is full already
        output.last_hidden_state = call.full_grid(output.last_hidden_state, call.stages[-1])
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = call.full_hidden_states(output.hidden_states)
        return output

    def pack(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A method of the model that crops, interpolates or pools features, run over dead rows."""
        call = self.left.get()
        if call is None:
            return original(*args, **kwargs)
        packed = pack_over_dead(original, args, kwargs) if call.removes else original(*args, **kwargs)
        if isinstance(packed, tuple):
            tiles = [len(features) for features in next(iter([*args, *kwargs.values()]))]
            call.record.packed.extend(zip(tiles, map(len, packed[0]), strict=True))
        return packed

    # The language model -------------------------------------------------------------------------

    def enter_model(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        call_args = arguments(module, args, kwargs)
        self.left.set(None)
        visual = self.family.visual_input(self.seams, call_args)
        embeds = call_args.get("inputs_embeds")
        if (
            visual is None
            and embeds is not None
            and embeds.is_floating_point()
            and bool(is_dead(embeds).any())
        ):
            raise UnsupportedInputError(
                "inputs_embeds holds features the patched encoder marked as merged away, but nothing says "
                "which of its rows are pictures; pass the features as mm_encoder_outputs (or the pixels) "
                "with input_ids, or patch with vit_layers=()"
            )
        self.visual.set(visual)

    def leave_model(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        self.visual.set(None)
        self.left.set(None)
        return output

    def enter_language(self, module: Any, args: Any, kwargs: Any) -> Any:
        self.language.set(None)
        visual = self.visual.get()
        call_args = arguments(module, args, kwargs)
        cache = call_args.get("past_key_values")
        merged = sequence.is_merged(cache)
        if visual is None and not merged:
            return None
        embeds = call_args.get("inputs_embeds")
        if embeds is None:
            embeds = module.get_input_embeddings()(call_args.pop("input_ids"))
        past = cache.get_seq_length() if cache is not None else 0
        mask = call_args.get("attention_mask")
        call = LanguageCall(
            self.plan, self.seams, embeds, visual,
            mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None,
            past, module.config._attn_implementation, self.number,
            records=call_args.get("output_hidden_states") not in (None, False),
        )  # fmt: skip
        if visual is not None:
            self.last = build_report(self.plan, self.shape, call, self.encoded.get(), embeds.shape[0])
            self.encoded.set(None)
        if not merged and not call.changes_length:
            return None
        sequence.check_cache(cache)
        positions = call_args.get("position_ids")
        refuse_unserved(
            mask, positions if visual is not None else None, _checkpoints(module), embeds.shape[0]
        )
        if positions is None:
            positions = torch.arange(past, past + call.length, device=embeds.device).expand(
                embeds.shape[0], -1
            )
        call_args["input_ids"] = None
        call_args["inputs_embeds"] = call.enter_features(embeds)
        call_args["position_ids"] = call.enter(positions[..., None])[..., 0]
        call_args["attention_mask"] = self._no_mask(embeds)
        if self.seams.additions is not None:
            call_args = call.take_additions(self.seams.additions, call_args)
        self.language.set(call)
        return (), call_args

    def _no_mask(self, embeds: torch.Tensor) -> Any:
        """Keeps Hugging Face from making a mask of the caller's length: a mask it takes for ready."""
        if len(self.seams.scoring_layers) < len(self.seams.layers):
            return {"full_attention": None, "linear_attention": None}
        return embeds.new_zeros((1, 1, 1, 1))

    def enter_layer(self, number: int, args: Any, kwargs: Any) -> Any:
        call = self.language.get()
        if call is None:
            return None
        stage = call.stage(number)
        scores = number in self.seams.scoring_layers
        cache, cached = kwargs.get("past_key_values"), None
        if cache is not None:
            if number == 0:
                sequence.check_cache(cache)  # it may have been made since the call began
            if scores:
                cached = sequence.cache_layer(cache, number, stage.positions.shape[0], stage.positions.device)
        if stage.first_layer > 0:
            cos, sin = kwargs["position_embeddings"]
            kwargs["position_embeddings"] = (
                sequence.take_rows(cos, stage.entry),
                sequence.take_rows(sin, stage.entry),
            )
        kwargs["position_ids"] = None  # gaps in them would be taken for packed sequences
        kwargs["attention_mask"] = call.mask(number, cached) if scores else call.padding(number)
        if call.scores_at(number):
            call.begin_attention(number, cached)
        if cached is not None:
            call.announce(number, cached)
        return args, kwargs

    def leave_layer(self, number: int, output: Any) -> Any:
        call = self.language.get()
        if call is None or not (call.merges_at(number) or number in call.additions):
            return None
        if isinstance(output, tuple):
            return (call.leave_layer(number, output[0]), *output[1:])
        return call.leave_layer(number, output)

    def leave_language(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        call = self.language.get()
        self.language.set(None)
        if call is None or output is None:
            return output
        depth = len(self.seams.layers)
        if isinstance(output, tuple):
            return (call.leave(output[0], depth), *output[1:])
        output.last_hidden_state = call.leave(output.last_hidden_state, depth)
        if output.hidden_states is not None:
            seen = [call.outputs.get(i - 1, x) for i, x in enumerate(output.hidden_states[:-1])]
            inner = [None if x is None else call.leave(x, i) for i, x in enumerate(seen)]
            output.hidden_states = (*inner, output.last_hidden_state)
        return output


class ConfigView:
    """One attention module's view of its config: illava's attention function while it merges."""

    def __init__(self, config: Any, merging: Callable[[], bool], hooks: Hooks) -> None:
        self.__dict__.update(_config=config, _merging=merging, illava_hooks=hooks)

    @property
    def _attn_implementation(self) -> str:
        return ATTENTION_NAME if self._merging() else self._config._attn_implementation

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_config"], name)

    def __deepcopy__(self, memo: Any) -> ConfigView:
        raise AlreadyPatchedError(
            "a patched model cannot be copied, since its hooks would go on working for the original; "
            "call handle.remove(), copy, and patch both"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._config, name, value)


def attention(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, **kwargs: Any
) -> tuple[Any, Any]:
    """The attention function of a merging module: the user's own, plus the statistics.

    Args:
        query, key, value: `[B, H, L, D]` as Hugging Face hands them over, rotated.

    Returns:
        `[B, L, H, D]`, and the weights if the user's own function returns them.
    """
    hooks: Hooks = module.config.illava_hooks
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    vision = hooks.vision.get()
    if vision is not None and vision.attending is not None:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # [rows, width, H, D]
        return vision.attend(q, k, v, scale), None
    call = hooks.language.get()
    if call is None or call.attending is None:
        raise RuntimeError("illava's attention function called outside a merging layer")
    layer, call.attending = call.attending, None  # from here on the config tells the user's own name
    result = own_attention(module)(module, query, key, value, attention_mask, **kwargs)
    with torch.no_grad():
        call.score(layer, query.detach(), key.detach(), scale)
    return result


def own_attention(module: Any) -> Callable[..., Any]:
    """The attention function the user chose for this module."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = module.config._attn_implementation
    if name == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]


def _checkpoints(module: nn.Module) -> bool:
    """Whether a forward pass would be run again for its gradients."""
    return module.training and any(getattr(m, "gradient_checkpointing", False) for m in module.modules())
