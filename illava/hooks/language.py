"""Hooks of the module that joins pictures and text, and of the language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from illava import sequence
from illava.errors import UnsupportedInputError
from illava.families.parts import arguments
from illava.hooks import in_graph, under_way
from illava.hooks.state import State
from illava.language import LanguageCall
from illava.refusals import (
    refuse_broken,
    refuse_checkpointing,
    refuse_chunks,
    refuse_presses,
    refuse_router_logits,
    refuse_unserved,
)
from illava.report import build_report
from illava.vision import is_dead

RECORDED = ("output_hidden_states", "output_attentions")
FEATURES = ("image_hidden_states", "video_hidden_states")  # fields of the model's output


class LanguageHooks:
    """Hooks take and return what torch's do."""

    def __init__(self, state: State) -> None:
        self.state, self.seams = state, state.seams
        self.scoring = sorted(state.seams.scoring_layers)
        self.number = state.number

    def enter_model(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        call_args = arguments(module, args, kwargs)
        self.state.end_vision()  # of an encoder call that was interrupted: torch runs no hook behind it
        self.state.left.set(())
        visual = self.state.family.visual_input(self.seams, call_args)
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
        self.state.visual.set(visual)

    def leave_model(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        self.state.visual.set(None)
        self.state.left.set(())
        for name in FEATURES:
            if (features := getattr(output, name, None)) is not None:
                setattr(output, name, _without_marks(features))
        return self.restore_recorded(output)

    def restore_recorded(self, output: Any) -> Any:
        """4.57 records layers' outputs once more for the modules around the language model."""
        for name, full in (self.state.recorded.get() or {}).items():
            if getattr(output, name, None) is not None:
                setattr(output, name, full)
        return output

    def leave_outermost(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        output = self.restore_recorded(output)
        self.state.recorded.set(None)
        return output

    def enter_language(self, module: Any, args: Any, kwargs: Any) -> Any:
        self.state.end_language()  # of a call that was interrupted: torch runs no hook behind it
        self.state.recorded.set(None)
        if self.state.vision.get() is not None:  # interrupted in there, and called without its model now
            self.state.end_vision()
            self.state.visual.set(None)
        call_args = arguments(module, args, kwargs)
        visual = self.state.visual.get() or self.state.take_mark(call_args.get("inputs_embeds"))
        self.state.visual.set(None)  # a prompt is read once; what a method announced is read by now
        cache = call_args.get("past_key_values")
        merged = sequence.is_merged(cache)
        if visual is None and not merged:
            return None
        if merged:
            sequence.check_whole(cache, len(self.seams.layers))
        embeds = call_args.get("inputs_embeds")
        if embeds is None:
            embeds = module.get_input_embeddings()(call_args.pop("input_ids"))
        if visual is not None:
            visual = visual.expanded(*embeds.shape[:2])
        past = cache.get_seq_length() if cache is not None else 0
        mask = call_args.get("attention_mask")
        call = LanguageCall(
            self.state.plan, self.seams, embeds, visual,
            mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None,
            past, module.config._attn_implementation, self.state.number,
            wanted=frozenset(name for name in RECORDED if self._wanted(module, call_args, name)),
            prompt=self.state.prompt_end,
            traced=self.state.trace,
        )  # fmt: skip
        if visual is not None:
            if call.broken:
                encoded = self.state.encoded.get() or ()
                self.state.encoded.set(None)
                refuse_broken(call.broken, visual, embeds.dtype, [record.finite for record in encoded])
            self.state.last = build_report(
                self.state.plan, self.state.shape, call, self.state.encoded.get(), embeds.shape[0],
                self.state.model_type,
            )  # fmt: skip
            self.state.encoded.set(None)
            call.grids = [p.token_grid for p in self.state.last.pictures]
        if not merged and not call.changes_length:
            return None
        if call.changes_length:
            refuse_router_logits(self._wanted(module, call_args, "output_router_logits"))
        if cache is None and self._wanted(module, call_args, "use_cache"):  # laid out before layers run
            cache = call_args["past_key_values"] = DynamicCache(config=module.config)
        sequence.check_cache(cache)
        positions = call_args.get("position_ids")
        refuse_checkpointing(module)
        if visual is not None:
            refuse_presses(getattr(self.seams.layers[i], self.seams.layer_attention) for i in self.scoring)
        refuse_unserved(mask, positions if visual is not None else None, embeds.shape[0])
        if positions is None:
            positions = torch.arange(past, past + call.length, device=embeds.device).expand(
                embeds.shape[0], -1
            )
        call_args["input_ids"] = None
        if self.seams.additions is not None:
            call_args = call.take_additions(self.seams.additions, call_args)
        call_args["inputs_embeds"] = call.merge_input(call.enter_features(embeds))
        call_args["position_ids"] = call.enter(positions[..., None])[..., 0]
        call_args["attention_mask"] = self._no_mask(embeds)
        call.begin(cache)
        self.state.begin_language(call)
        return (), call_args

    def generate(self, module: Any, own: Any, *args: Any, **kwargs: Any) -> Any:
        """The module's own `generate`; its calls learn where the prompt ends, whatever stands behind it."""
        named = (kwargs.get(name) for name in ("attention_mask", "input_ids", "inputs", "inputs_embeds"))
        lengths = (
            x.shape[1] for x in (*named, *args[:1]) if isinstance(x, torch.Tensor) and x.ndim in (2, 3)
        )
        config = kwargs.get("generation_config") or getattr(module, "generation_config", None)
        chunk = kwargs.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
        if chunk is not None:
            call = {"input_ids": args[0] if args else kwargs.get("inputs")} | kwargs
            refuse_chunks(self.state.family.visual_input(self.seams, call), chunk)
        with self.state.answering(next(lengths, None)):  # the mask comes first: it covers a cache, too
            return own(*args, **kwargs)

    def _wanted(self, module: Any, call_args: Any, name: str) -> bool:
        """Whether the caller, or else the config, wants it: what every layer gives, or a cache."""
        own = call_args.get(name)
        return bool(getattr(module.config, name, False) if own is None else own)

    def _no_mask(self, embeds: torch.Tensor) -> Any:
        """Keeps Hugging Face from making a mask of the caller's length: a mask it takes for ready."""
        if len(self.seams.scoring_layers) < len(self.seams.layers):
            return {"full_attention": None, "linear_attention": None}
        return embeds.new_zeros((1, 1, 1, 1))

    def enter_layer(self, number: int, args: Any, kwargs: Any) -> Any:
        call = under_way.LANGUAGE.of(self.number)
        if call is None:
            return None
        layers = call.layers
        kwargs["attention_mask"] = layers.now.masks[layers.mask_of[number]]
        if layers.now.rotary is not None:
            kwargs["position_embeddings"] = layers.now.rotary
        kwargs["position_ids"] = None  # gaps in them would be taken for packed sequences
        if number in call.scored:
            call.attending = number
        return args, kwargs

    def leave_layer(self, number: int, kwargs: Any, output: Any) -> Any:
        call = under_way.LANGUAGE.of(self.number)
        if call is None:
            return None
        merges, adds = number in call.merging, number in call.additions
        if not (merges or adds):
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        if adds:
            hidden = call.add(number, hidden)
        if merges:
            rotary = kwargs["position_embeddings"]
            if in_graph.possible(call):
                hidden = in_graph.merge(call, number, hidden, rotary)
            else:
                hidden = self._merge(call, number, hidden, rotary)
        if "output_hidden_states" in call.wanted:
            call.outputs[number] = hidden
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    @torch.compiler.disable
    def _merge(self, call: LanguageCall, number: int, hidden: torch.Tensor, rotary: Any) -> torch.Tensor:
        return call.leave_layer(number, hidden, rotary)

    def leave_language(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        call = self.state.end_language()
        if call is None or output is None:
            return output
        depth = len(self.seams.layers)
        if isinstance(output, tuple):
            return (call.leave(output[0], depth), *output[1:])
        output.last_hidden_state = call.leave(output.last_hidden_state, depth)
        recorded: dict[str, Any] = {}
        if getattr(output, "attentions", None):  # an empty tuple where the kernel has no weights to give
            # One entry a layer, or (Qwen3.5) one for each layer that has such weights.
            given = self.scoring if len(output.attentions) == len(self.scoring) else range(depth)
            pairs = zip(output.attentions, given, strict=True)
            output.attentions = tuple(call.leave_weights(x, layer) for x, layer in pairs)
            recorded["attentions"] = output.attentions
        if output.hidden_states is not None:
            # A caller who asks for some layers alone gets None for the others, here as there.
            asked = list(enumerate(output.hidden_states[:-1]))
            seen = [None if x is None else call.outputs.get(i - 1, x) for i, x in asked]
            inner = [None if x is None else call.leave(x, i) for i, x in enumerate(seen)]
            last = None if output.hidden_states[-1] is None else output.last_hidden_state
            output.hidden_states = (*inner, last)
            recorded["hidden_states"] = output.hidden_states
        self.state.recorded.set(recorded)
        return output


def _without_marks(features: Any) -> Any:
    """Features as a caller may read them: zero, like hidden states, where the encoder merged a token away."""
    if isinstance(features, torch.Tensor):
        return features.masked_fill(is_dead(features)[..., None], 0.0)
    return type(features)(_without_marks(x) for x in features)
