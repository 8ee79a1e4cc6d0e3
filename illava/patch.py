"""The only file that changes a model: hooks in, hooks out.

Compact inside, full at the seams. Hooks shorten what flows between a model's own modules and put it
back at the caller's length where Hugging Face code expects that; no `forward` is replaced. What is
known about a call lives in context variables (one call per thread and task), what is known about a
sequence lives in its cache.
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

from illava import families, sequence
from illava.errors import AlreadyPatchedError, SeamError, UnsupportedInputError, UnsupportedModelError
from illava.families.seams import Seams, VisualInput, arguments
from illava.language import LanguageCall, refuse_unserved
from illava.plan import ModelPlan, Plan, resolve
from illava.report import Report, build_report
from illava.vision import VisionCall, is_dead

# The name under which a merging attention module finds illava's attention function. It is read from
# that module's own view of its config, only while it merges; no other model ever carries it.
ATTENTION_NAME = "illava"
# Where a patched model keeps its handle; gone again after removal.
HANDLE_ATTRIBUTE = "_illava_handle"
_NUMBERS = itertools.count()


def patch(model: nn.Module, *, plan: Plan | None = None, **settings: Any) -> Handle:
    """Make a vision-language model merge redundant visual tokens, from the next call on.

    Only this instance is touched; text-only calls and later decoding run as before. Patching a
    patched model replaces its plan.

    Args:
        model: a Hugging Face `...ForConditionalGeneration` or bare `...Model` of a supported family,
            also wrapped by PEFT, `torch.compile` or (Distributed)DataParallel.
        plan: a ready-made `illava.Plan`, for example `illava.Plan.paper(0.778)`.
        **settings: the fields of `illava.Plan`, instead of `plan`: `vit_layers`, `llm_layers`,
            `reduction` (2/3), `encoder_share` (0.4), `recycled` (0.05), `members` (5), `score`,
            `merge`, `queries`, `window_score`, and the other two budgets `vit_keep_ratio` with
            `llm_keep_ratio`, `vit_tokens_removed` with `llm_tokens_removed`.

    Returns:
        A handle with `.plan`, `.report` and `.remove()`, usable in `with`.

    Raises:
        UnsupportedModelError: not a model of a supported family.
        PlanError: a plan this model cannot carry out.
        SeamError: this version of transformers lacks a part illava needs.
        AlreadyPatchedError: another tool has replaced code at one of those parts.
        TypeError: a setting that does not exist, or both `plan` and settings.
    """
    if plan is not None and settings:
        raise TypeError(f"give plan= or single settings, not both (got plan and {', '.join(settings)})")
    plan = Plan(**settings) if plan is None else plan
    core = _unwrap(model)
    family = families.family_of(getattr(getattr(core, "config", None), "model_type", None), type(core).__name__)
    seams = family.find_seams(core)
    resolved = resolve(
        plan,
        vit_default=seams.vit_default,
        llm_default=seams.llm_default,
        vit_depth=len(seams.blocks),
        llm_depth=len(seams.layers),
        merge_size=seams.merge_size,
    )
    previous = getattr(seams.model, HANDLE_ATTRIBUTE, None)
    _check_untouched(seams)
    _check_attention(seams)
    if previous is not None:
        previous.remove()
    handle = Handle(resolved, seams, family)
    if _is_compiled(model) or _is_compiled(core):
        torch.compiler.reset()  # code compiled before the hooks were there would not call them
    return handle


def unpatch(model: nn.Module) -> None:
    """Remove illava from a model; nothing happens if it is not patched."""
    core = _unwrap(model)
    for module in (core, getattr(core, "model", None)):
        handle = getattr(module, HANDLE_ATTRIBUTE, None)
        if handle is not None:
            handle.remove()


class Handle:
    """A patched model's plan, report and way back.

    Attributes:
        plan: the plan with its layers settled; `plan.schedule(grids)` tells what it does to pictures
            of given sizes, layer by layer.
    """

    def __init__(self, plan: ModelPlan, seams: Seams, family: Any) -> None:
        self.plan = plan
        self._seams, self._family = seams, family
        self._number = next(_NUMBERS)
        self._undo: list[Callable[[], None]] = []
        self._last: Report | None = None
        self._vision: ContextVar[VisionCall | None] = ContextVar("illava_vision", default=None)
        self._visual: ContextVar[VisualInput | None] = ContextVar("illava_visual", default=None)
        self._language: ContextVar[LanguageCall | None] = ContextVar("illava_language", default=None)
        self._encoded: ContextVar[deque[VisionCall] | None] = ContextVar("illava_encoded", default=None)
        setattr(seams.model, HANDLE_ATTRIBUTE, self)
        try:
            self._install()
        except BaseException:
            self.remove()
            raise

    @property
    def report(self) -> Report | None:
        """What the last call that brought pictures did; `None` before the first."""
        return self._last

    @property
    def active(self) -> bool:
        """Whether the model is patched by this handle."""
        return getattr(self._seams.model, HANDLE_ATTRIBUTE, None) is self

    def remove(self) -> None:
        """Leave the model exactly as it was. May be called again."""
        while self._undo:
            self._undo.pop()()
        if self.active:
            delattr(self._seams.model, HANDLE_ATTRIBUTE)
            if _is_compiled(self._seams.model):
                torch.compiler.reset()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"<illava.Handle {'on' if self.active else 'removed from'} {type(self._seams.model).__name__}: {self.plan}>"

    def __deepcopy__(self, memo: Any) -> Handle:
        raise AlreadyPatchedError(
            "a patched model cannot be copied, since its hooks would go on working for the original; "
            "call handle.remove(), copy, and patch both"
        )

    # Hooks in -----------------------------------------------------------------------------------

    def _install(self) -> None:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        if self.plan.removes_nothing:
            return
        seams = self._seams
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, _attention)
        self._before(seams.tower, self._enter_tower)
        self._after(seams.tower, self._leave_tower, always=True)
        if self.plan.vit_layers:
            self._after(seams.projector, self._leave_projector)
            for number, block in enumerate(seams.blocks[self.plan.vit_layers[0] :], self.plan.vit_layers[0]):
                self._hook_block(number, block)
        self._before(seams.model, self._enter_model)
        self._after(seams.model, self._leave_model, always=True)
        self._before(seams.language_model, self._enter_language)
        self._after(seams.language_model, self._leave_language, always=True)
        for number, layer in enumerate(seams.layers):
            self._hook_layer(number, layer)

    def _hook_block(self, number: int, block: nn.Module) -> None:
        self._before(block, lambda m, a, k: self._enter_block(number, a, k))
        if number not in self.plan.vit_layers:
            return
        names = self._seams
        attention = getattr(block, names.block_attention)
        self._view_config(attention, lambda: self._attending(self._vision, number))
        self._before(attention, lambda m, a, k: self._enter_block_attention(number, a, k))
        self._after(attention, lambda m, a, k, out: self._leave_attention(self._vision))
        self._before(getattr(block, names.block_norm), lambda m, a, k: self._merge_block(number, a, k))
        self._after(getattr(block, names.block_ffn), lambda m, a, k, out: self._leave_ffn(number, out))
        self._after(block, lambda m, a, k, out: self._leave_block(number, out))

    def _hook_layer(self, number: int, layer: nn.Module) -> None:
        self._before(layer, lambda m, a, k: self._enter_layer(number, a, k))
        if number not in self.plan.llm_layers:
            return
        attention = getattr(layer, self._seams.layer_attention)
        self._view_config(attention, lambda: self._attending(self._language, number))
        self._after(attention, lambda m, a, k, out: self._leave_attention(self._language))
        self._after(layer, lambda m, a, k, out: self._merge_layer(number, out))

    def _before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        self._undo.append(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def _after(self, module: nn.Module, hook: Callable[..., Any], *, always: bool = False) -> None:
        # First in line, so that hooks which record hidden states see what the next layer will see.
        handle = module.register_forward_hook(hook, with_kwargs=True, always_call=always, prepend=True)
        self._undo.append(handle.remove)

    def _view_config(self, attention: nn.Module, merging: Callable[[], bool]) -> None:
        config = attention.config
        attention.config = _ConfigView(config, merging, self)

        def restore() -> None:
            attention.config = config

        self._undo.append(restore)

    @staticmethod
    def _attending(variable: ContextVar[Any], number: int) -> bool:
        call = variable.get()
        return call is not None and call.attending == number

    # The vision encoder -------------------------------------------------------------------------

    def _enter_tower(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        call_args = arguments(module, args, kwargs)
        pixels = next(iter(call_args.values()))
        call = VisionCall(
            self.plan,
            self._seams,
            self._family.tower_grids(call_args),
            pixels.device,
            module.config._attn_implementation,
        )
        if call.removes and getattr(module, "gradient_checkpointing", False) and module.training:
            refuse_unserved(None, None, True, 0)
        encoded = self._encoded.get()
        if encoded is None:
            self._encoded.set(encoded := deque(maxlen=64))
        encoded.append(call)
        self._vision.set(call if call.removes else None)

    def _enter_block(self, number: int, args: Any, kwargs: Any) -> Any:
        call = self._vision.get()
        if call is None:
            return None
        stage = call.stage(number)
        if stage.first_block == 0:
            return None
        cos, sin = kwargs["position_embeddings"]
        kwargs["position_embeddings"] = (stage.select(cos, call.unit), stage.select(sin, call.unit))
        kwargs["cu_seqlens"] = stage.recount(kwargs["cu_seqlens"], call.unit, call.total_units)
        return args, kwargs

    def _enter_block_attention(self, number: int, args: Any, kwargs: Any) -> Any:
        call = self._vision.get()
        if call is None or not call.merges_at(number):
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        spans = kwargs["cu_seqlens"]
        call.begin_attention(number, spans)
        # One span over everything: the module hands all tokens to illava's attention function,
        # which attends within the real spans together.
        kwargs["cu_seqlens"] = spans.new_tensor([0, hidden.shape[0]])
        return args, kwargs

    @staticmethod
    def _leave_attention(variable: ContextVar[Any]) -> None:
        call = variable.get()
        if call is not None:
            call.attending = None

    def _merge_block(self, number: int, args: Any, kwargs: Any) -> Any:
        call = self._vision.get()
        if call is None or not call.merges_at(number):
            return None
        return (call.merge(number, args[0]), *args[1:]), kwargs

    def _leave_ffn(self, number: int, output: torch.Tensor) -> Any:
        call = self._vision.get()
        if call is None or not call.merges_at(number):
            return None
        call.merged[number] = call.merged[number] + output
        return output.new_zeros(())  # the block adds this to its unmerged input, then drops the sum

    def _leave_block(self, number: int, output: Any) -> Any:
        call = self._vision.get()
        if call is None or not call.merges_at(number):
            return None
        merged = call.merged.pop(number)
        return (merged, *output[1:]) if isinstance(output, tuple) else merged

    def _leave_projector(self, module: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> Any:
        call = self._vision.get()
        return None if call is None else call.full_grid(output, 1)

    def _leave_tower(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        call = self._vision.get()
        self._vision.set(None)
        if call is None or getattr(output, "last_hidden_state", None) is None:
            return output  # 4.57 returns the projector's output alone, which is full already
        output.last_hidden_state = call.full_grid(output.last_hidden_state, call.unit)
        if getattr(output, "hidden_states", None) is not None:
            inner = [
                None if x is None else call.full_grid(x, call.unit, block)
                for block, x in enumerate(output.hidden_states[:-1])
            ]
            output.hidden_states = (*inner, output.last_hidden_state)
        return output

    # The language model -------------------------------------------------------------------------

    def _enter_model(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        call_args = arguments(module, args, kwargs)
        visual = self._family.visual_input(self._seams, call_args)
        embeds = call_args.get("inputs_embeds")
        if visual is None and embeds is not None and embeds.is_floating_point() and bool(is_dead(embeds).any()):
            raise UnsupportedInputError(
                "inputs_embeds holds features the patched encoder marked as merged away, but nothing says "
                "which of its rows are pictures; pass the features as mm_encoder_outputs (or the pixels) "
                "with input_ids, or patch with vit_layers=()"
            )
        self._visual.set(visual)

    def _leave_model(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        self._visual.set(None)
        return output

    def _enter_language(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        self._language.set(None)
        visual = self._visual.get()
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
            self.plan, embeds, visual, mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None,
            past, module.config._attn_implementation, self._number,
        )  # fmt: skip
        if visual is not None:
            self._last = build_report(self.plan, self._seams, call, self._encoded.get(), embeds.shape[0])
            self._encoded.set(None)
        if not merged and not call.changes_length:
            return None
        sequence.check_cache(cache)
        positions = call_args.get("position_ids")
        checkpointing = bool(getattr(module, "gradient_checkpointing", False) and module.training)
        refuse_unserved(mask, positions if visual is not None else None, checkpointing, embeds.shape[0])
        if positions is None:
            positions = torch.arange(past, past + call.length, device=embeds.device).expand(embeds.shape[0], -1)
        call_args["input_ids"] = None
        call_args["inputs_embeds"] = call.enter(embeds)
        call_args["position_ids"] = call.enter(positions[..., None])[..., 0]
        # A ready-made dictionary keeps Hugging Face from making a mask of the caller's length.
        call_args["attention_mask"] = {"full_attention": None, "sliding_attention": None}
        self._language.set(call)
        return (), call_args

    def _enter_layer(self, number: int, args: Any, kwargs: Any) -> Any:
        call = self._language.get()
        if call is None:
            return None
        stage = call.stage(number)
        cache, cached = kwargs.get("past_key_values"), None
        if cache is not None:
            sequence.check_cache(cache)
            cached = sequence.cache_layer(cache, number, stage.positions.shape[0], stage.positions.device)
        if stage.first_layer > 0:
            cos, sin = kwargs["position_embeddings"]
            kwargs["position_embeddings"] = (
                sequence.take_rows(cos, stage.entry),
                sequence.take_rows(sin, stage.entry),
            )
        kwargs["position_ids"] = None  # gaps in them would be taken for packed sequences
        kwargs["attention_mask"] = call.mask(number, cached)
        if call.merges_at(number):
            call.begin_attention(number, cached)
        if cached is not None:
            call.announce(number, cached)
        return args, kwargs

    def _merge_layer(self, number: int, output: Any) -> Any:
        call = self._language.get()
        if call is None or not call.merges_at(number):
            return None
        if isinstance(output, tuple):
            return (call.merge(number, output[0]), *output[1:])
        return call.merge(number, output)

    def _leave_language(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        call = self._language.get()
        self._language.set(None)
        if call is None or output is None:
            return output
        depth = len(self._seams.layers)
        if isinstance(output, tuple):
            return (call.leave(output[0], depth), *output[1:])
        output.last_hidden_state = call.leave(output.last_hidden_state, depth)
        if output.hidden_states is not None:
            inner = [None if x is None else call.leave(x, i) for i, x in enumerate(output.hidden_states[:-1])]
            output.hidden_states = (*inner, output.last_hidden_state)
        return output


class _ConfigView:
    """One attention module's view of its config: illava's attention function while it merges."""

    def __init__(self, config: Any, merging: Callable[[], bool], handle: Handle) -> None:
        self.__dict__.update(_config=config, _merging=merging, illava_handle=handle)

    @property
    def _attn_implementation(self) -> str:
        return ATTENTION_NAME if self._merging() else self._config._attn_implementation

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_config"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._config, name, value)


def _attention(
    module: nn.Module, query: Any, key: Any, value: Any, attention_mask: Any = None, **kwargs: Any
) -> tuple[Any, Any]:
    """The attention function of a merging module: the user's own, plus the statistics.

    Args:
        query, key, value: `[B, H, L, D]` as Hugging Face hands them over, rotated.

    Returns:
        `[B, L, H, D]`, and the weights if the user's own function returns them.
    """
    handle: Handle = module.config.illava_handle
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    vision = handle._vision.get()
    if vision is not None and vision.attending is not None:
        packed = [x[0].transpose(0, 1) for x in (query, key, value)]  # [N, H, D]
        return vision.attend(*packed, scale)[None], None
    call = handle._language.get()
    if call is None or call.attending is None:
        raise RuntimeError("illava's attention function called outside a merging layer")
    layer, call.attending = call.attending, None  # from here on the config tells the user's own name
    result = _own_attention(module)(module, query, key, value, attention_mask, **kwargs)
    with torch.no_grad():
        call.decide(layer, query.detach(), key.detach(), scale)
    return result


def _own_attention(module: nn.Module) -> Callable[..., Any]:
    """The attention function the user chose for this module."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = module.config._attn_implementation
    if name == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]


# Finding and checking the model ------------------------------------------------------------------


def _unwrap(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside `torch.compile`, PEFT and DataParallel wrappers."""
    while isinstance(model, nn.Module):
        if "_orig_mod" in model._modules:
            model = model._orig_mod
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
            model = model.get_base_model()
        else:
            return model
    raise UnsupportedModelError(
        f"{type(model).__name__} is not a model; pass the Hugging Face model itself, not its name or path"
    )


def _is_compiled(model: nn.Module) -> bool:
    return any(
        "_orig_mod" in m._modules
        or getattr(m, "_compiled_call_impl", None) is not None
        or hasattr(m.__dict__.get("forward"), "_torchdynamo_orig_callable")
        for m in model.modules()
    )


def _check_untouched(seams: Seams) -> None:
    """Another tool's `forward` at a place illava needs would be fed what it does not expect."""
    places = [("vision encoder", seams.tower), ("language model", seams.language_model)]
    places += [(f"encoder block {i}", b) for i, b in enumerate(seams.blocks)]
    places += [(f"decoder layer {i}", b) for i, b in enumerate(seams.layers)]
    places += [(f"attention of encoder block {i}", getattr(b, seams.block_attention)) for i, b in enumerate(seams.blocks)]
    places += [(f"attention of decoder layer {i}", getattr(b, seams.layer_attention)) for i, b in enumerate(seams.layers)]
    for place, module in places:
        own = module.__dict__.get("forward")
        by_accelerate = hasattr(module, "_hf_hook")
        by_compile = hasattr(own, "_torchdynamo_orig_callable")
        home = getattr(type(module).forward, "__module__", "")
        foreign_class = not home.startswith("transformers.") and home != type(module).__module__
        if (own is not None and not by_accelerate and not by_compile) or foreign_class:
            source = getattr(own, "__module__", None) or home
            raise AlreadyPatchedError(
                f"the {place} ({type(module).__name__}) runs code of {source!r} in place of its own; two tools "
                "cannot shorten the same tokens. Undo the other one, or load the model afresh"
            )


def _check_attention(seams: Seams) -> None:
    """Which attention implementations merging can serve."""
    for name, module in (("vision encoder", seams.tower), ("language model", seams.language_model)):
        implementation = module.config._attn_implementation
        if implementation not in ("eager", "sdpa") and not implementation.startswith("flash_attention"):
            raise SeamError(
                f"the {name} attends with {implementation!r}, whose masks illava cannot shorten; load the model "
                "with attn_implementation='sdpa', 'eager' or 'flash_attention_2'"
            )
    kinds = set(getattr(seams.language_model.config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        raise SeamError(
            f"the language model has {', '.join(sorted(kinds))} layers, whose caches cannot hold merged "
            "sequences; set use_sliding_window=False in its config"
        )
