"""The only file that changes a model: hooks in, hooks out.

Compact inside, full at the seams. Hooks shorten what flows between a model's own modules and put it
back at the caller's length where Hugging Face code expects that; no `forward` is replaced. What is
known about a call lives in context variables (one call per thread and task), what is known about a
sequence lives in its cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from illava import checks, families
from illava.attention import AttentionChoice
from illava.families.seams import Seams
from illava.hooks import (
    ATTENTION_NAME,
    ENCODER_ATTENTION_NAME,
    ConfigView,
    EncoderHooks,
    LanguageHooks,
    OfOneModel,
    State,
    attention,
)
from illava.hooks.tracing import Hook, class_like, reads_context
from illava.plan import Plan
from illava.report import Report
from illava.schedule import ModelPlan

# Where a patched model keeps its handle; gone again after removal.
HANDLE_ATTRIBUTE = "_illava_handle"


def patch(
    model: nn.Module,
    *,
    plan: Plan | Mapping[str, Any] | str | None = None,
    fast_windows: bool = False,
    trace: bool = False,
    **settings: Any,
) -> Handle:
    """Make a vision-language model merge redundant visual tokens, from the next call on.

    Only this instance is touched; text-only calls and later decoding run as before. Patching a
    patched model replaces its plan. Patching and removing make `torch.compile` forget what it compiled
    in this process; it compiles again, with the hooks, when next called.

    Args:
        model: a Hugging Face `...ForConditionalGeneration` or bare `...Model` of a supported family,
            also wrapped by PEFT, `torch.compile` or (Distributed)DataParallel.
        plan: a ready-made `illava.Plan`, for example `illava.Plan.paper(0.778)`; or what
            `Plan.to_dict` or `Plan.to_json` made of one.
        fast_windows: run each encoder block's attention over all windows, frames and pictures in one
            call, merging or not. Hugging Face's SDPA and eager attention loop over them one by one;
            results differ by rounding.
        trace: write down where every token came from, for `handle.report.provenance` and
            `illava.visualize`. A traced call waits for the device at every merge.
        **settings: the fields of `illava.Plan`, instead of `plan`: `vit_layers`, `llm_layers`,
            `reduction` (2/3), `encoder_share`, `merge` (`"bipartite"`; the paper's rule is `"recycle"`),
            `vit_merge`, `proportional`, `distance_penalty`, `score`, `queries`, `window_score`, `recycled`
            (0.05), `members` (5), and the other three budgets `vit_keep_ratio` with `llm_keep_ratio`,
            `vit_tokens_removed` with `llm_tokens_removed`, `vit_shares` with `llm_shares`.

    Returns:
        A handle with `.plan`, `.report` and `.remove()`, usable in `with`.

    Raises:
        UnsupportedModelError: not a model of a supported family.
        PlanError: a plan this model cannot carry out, or `fast_windows` where there is nothing to run
            together.
        SeamError: this version of transformers lacks a part illava needs.
        AlreadyPatchedError: another tool has replaced code at one of those parts.
        TypeError: a setting that does not exist, or both `plan` and settings.
    """
    if plan is not None and settings:
        raise TypeError(f"give plan= or single settings, not both (got plan and {', '.join(settings)})")
    if plan is None:
        plan = Plan(**settings)
    elif not isinstance(plan, Plan):
        plan = Plan.from_json(plan) if isinstance(plan, str) else Plan.from_dict(plan)
    core = checks.unwrap(model)
    model_type = getattr(getattr(core, "config", None), "model_type", "unknown")
    family = families.family_of(model_type, type(core).__name__)
    seams = family.find_seams(core)
    resolved = seams.settle(plan)
    previous = getattr(seams.model, HANDLE_ATTRIBUTE, None)
    checks.check_untouched(seams)
    checks.check_attention(seams)
    if fast_windows:
        checks.check_spans(seams)
    if plan.proportional:
        checks.check_proportional(seams)
    if previous is not None:
        previous.remove()
    return Handle(resolved, seams, family, fast_windows, trace, core)


def unpatch(model: nn.Module) -> None:
    """Remove illava from a model; nothing happens if it is not patched."""
    core = checks.unwrap(model)
    for module in (core, getattr(core, "model", None)):
        handle = getattr(module, HANDLE_ATTRIBUTE, None)
        if handle is not None:
            handle.remove()


class Handle(OfOneModel):
    """A patched model's plan, report and way back.

    Attributes:
        plan: the plan with its layers settled; `plan.schedule(grids)` tells what it does to pictures
            of given sizes, layer by layer.
    """

    def __init__(
        self,
        plan: ModelPlan,
        seams: Seams,
        family: Any,
        fast_windows: bool,
        trace: bool,
        outermost: nn.Module,
    ) -> None:
        self.plan = plan
        self._seams, self._outermost = seams, outermost
        self._state = State(plan, seams, family, fast_windows, trace)
        self._undo: list[Callable[[], None]] = []
        self._choose_statistics()
        try:
            setattr(seams.model, HANDLE_ATTRIBUTE, self)
            self._install()
        except BaseException:
            self.remove()
            raise

    @property
    def report(self) -> Report | None:
        """What the last call that brought pictures did; `None` before the first."""
        return self._state.last

    @property
    def attention(self) -> AttentionChoice | None:
        """How the encoder's attention statistics are computed, chosen when the model was patched.

        Changing the model's attention, type or device afterwards changes it with the next call. `None`
        where the encoder merges nothing, has an attention of its own, or is not on a device yet.
        """
        return self._state.choices.last

    @property
    def active(self) -> bool:
        """Whether the model is patched by this handle."""
        return getattr(self._seams.model, HANDLE_ATTRIBUTE, None) is self

    def remove(self) -> None:
        """Leave the model exactly as it was. May be called again."""
        # Each step may be done twice, and is crossed off when it is done: who is interrupted calls again.
        while self._undo:
            self._undo[-1]()
            self._undo.pop()
        if self.active:
            self._state.forget()
            torch.compiler.reset()
            delattr(self._seams.model, HANDLE_ATTRIBUTE)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "on" if self.active else "removed from"
        attention = "" if self.attention is None else f"; {self.attention}"
        return f"<illava.Handle {state} {type(self._seams.model).__name__}: {self.plan}{attention}>"

    def _choose_statistics(self) -> None:
        """Choose the kernel that gives attention statistics, for the encoder as it stands."""
        tower: Any = self._seams.tower
        weights = (p for p in tower.parameters() if p.is_floating_point() and p.device.type != "meta")
        merges = self.plan.vit_layers and not self.plan.removes_nothing and self._seams.block_observed is None
        if merges and (weight := next(weights, None)) is not None:
            self._state.choices(tower.config._attn_implementation, weight.device, weight.dtype)

    # Hooks in -----------------------------------------------------------------------------------

    def _install(self) -> None:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        if self.plan.removes_nothing and not self._state.fast_windows:
            return
        torch.compiler.reset()  # code compiled before the hooks were there would not call them
        seams, encoder, language = self._seams, EncoderHooks(self._state), LanguageHooks(self._state)
        self._traced = reads_context()
        for name in (ATTENTION_NAME, ENCODER_ATTENTION_NAME):
            ALL_ATTENTION_FUNCTIONS.register(
                name, attention if self._traced else torch.compiler.disable(attention)
            )
        self._before(seams.tower, encoder.enter_tower)
        self._after(seams.tower, encoder.leave_tower, always=True)
        if not self.plan.removes_nothing:
            for seam in seams.projectors:
                self._before(seam.module, partial(encoder.enter_projector, seam))
                self._after(seam.module, lambda m, a, k, out, seam=seam: encoder.leave_projector(seam, out))
        if seams.regrid is not None and (self.plan.vit_layers or self._state.fast_windows):
            self._before(seams.regrid.module, partial(encoder.enter_regrid, seams.regrid))
        depth = len(seams.blocks)
        first = min((*self.plan.vit_layers, depth - 1)) if self.plan.vit_layers else depth
        for number in range(0 if self._state.fast_windows else first, depth):
            self._hook_block(number, encoder)
        if self.plan.removes_nothing:
            return
        for name in seams.packing:
            self._wrap_method(seams.model, name, encoder.pack)
        for module, name, wrapper in getattr(self._state.family, "joining_methods", lambda state: ())(
            self._state
        ):
            self._wrap_method(module, name, wrapper)
        for module in self._outermost.modules():
            if hasattr(module, "generate"):
                generate = partial(language.generate, module)
                self._wrap_method(module, "generate", generate, compiled_inside=True)
        self._before(seams.model, language.enter_model)
        self._after(seams.model, language.leave_model, always=True)
        self._after(self._outermost, language.leave_outermost, always=True)
        self._before(seams.language_model, language.enter_language)
        self._after(seams.language_model, language.leave_language, always=True)
        for number in range(len(seams.layers)):
            self._hook_layer(number, language)

    def _hook_block(self, number: int, hooks: EncoderHooks) -> None:
        seams, block = self._seams, self._seams.blocks[number]
        traced = self._traced and seams.block_observed is None
        at_output = {number + 1} & {len(seams.blocks)} & set(self.plan.vit_layers)
        if not (number in self.plan.vit_layers or at_output or self._state.fast_windows):
            self._before(block, hooks.enter_block, traced=traced)
            return
        self._mark(block)
        self._before(block, partial(hooks.enter_block, number=number), traced=traced)
        attends = getattr(block, seams.block_attention)
        if seams.block_observed is None:
            self._view_config(attends, lambda: self._state.block_attends(number), ENCODER_ATTENTION_NAME)
        else:
            for name in seams.block_observed.modules:
                if hasattr(attends, name):
                    observe = partial(hooks.observe, name)
                    self._after(getattr(attends, name), lambda m, a, k, out, observe=observe: observe(out))
        self._mark(attends)
        self._before(attends, lambda m, a, k: hooks.enter_block_attention(number, a, k), traced=traced)
        self._after(attends, lambda m, a, k, out: hooks.leave_block_attention(m), traced=traced)
        if at_output:
            self._after(block, lambda m, a, k, out: hooks.leave_block(number, out), traced=traced)
        if number not in self.plan.vit_layers:
            return
        norm, ffn = getattr(block, seams.block_norm), getattr(block, seams.block_ffn)
        for module in (norm, ffn):
            self._mark(module)
        self._before(norm, lambda m, a, k: hooks.merge_block(number, a, k), traced=traced)
        self._after(ffn, lambda m, a, k, out: hooks.leave_ffn(number, out), traced=traced)
        self._after(block, lambda m, a, k, out: hooks.leave_block(number, out), traced=traced)

    def _hook_layer(self, number: int, hooks: LanguageHooks) -> None:
        seams, layer = self._seams, self._seams.layers[number]
        added = seams.additions.layers if seams.additions is not None else 0
        scored = number in self.plan.scored_at.values()
        if scored or number in self.plan.llm_layers:
            self._mark(layer)
        self._before(layer, lambda m, a, k: hooks.enter_layer(number, a, k), traced=self._traced)
        if scored:
            attends = getattr(layer, seams.layer_attention)
            self._view_config(attends, lambda: self._state.layer_attends(number), ATTENTION_NAME)
        if number in self.plan.llm_layers or number < added:
            self._after(layer, lambda m, a, k, out: hooks.leave_layer(number, k, out), traced=self._traced)

    def _mark(self, module: nn.Module) -> None:
        """Give a module a class of its own, so that torch.compile tells it from others of its class."""
        kind = type(module)
        own = class_like(kind)

        def restore() -> None:
            if type(module) is own:
                module.__class__ = kind

        self._undo.append(restore)
        module.__class__ = own

    # One line each: an interruption may come between any two.
    def _before(self, module: nn.Module, hook: Callable[..., Any], *, traced: bool = False) -> None:
        register = module.register_forward_pre_hook
        self._undo.append(register(Hook(hook, traced), with_kwargs=True).remove)

    def _after(
        self, module: nn.Module, hook: Callable[..., Any], *, always: bool = False, traced: bool = False
    ) -> None:
        # First in line, so that hooks which record hidden states see what the next layer will see.
        register = partial(module.register_forward_hook, with_kwargs=True, prepend=True)
        self._undo.append(register(Hook(hook, traced), always_call=always).remove)

    def _wrap_method(
        self, module: nn.Module, name: str, wrapper: Callable[..., Any], *, compiled_inside: bool = False
    ) -> None:
        """A method that is no module has no hooks: the instance gets its own, until removal.

        Args:
            compiled_inside: whether what it calls may be compiled, though it is not itself.
        """
        own = module.__dict__.get(name)  # of another tool's, which comes back
        wrapped = Hook(partial(wrapper, getattr(module, name)), traced=compiled_inside)

        def restore() -> None:
            if module.__dict__.get(name) is not wrapped:
                return  # another tool has wrapped it since; without a call under way it changes nothing
            if own is None:
                del module.__dict__[name]
            else:
                module.__dict__[name] = own

        self._undo.append(restore)
        module.__dict__[name] = wrapped

    def _view_config(self, module: nn.Module, merging: Callable[[], bool], name: str) -> None:
        config: Any = module.config
        merging = merging if self._traced else torch.compiler.disable(merging)
        view: Any = ConfigView(config, merging, self._state, name)

        def restore() -> None:
            if module.config is view:
                module.config = config

        self._undo.append(restore)
        module.config = view
