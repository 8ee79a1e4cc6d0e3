"""Hooks of the vision encoder, its projector and its packing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from illava.families.layout import Survivors, never_dead
from illava.families.packing import pack_over_dead, weights_of_packing
from illava.families.parts import arguments, call_by_name
from illava.families.seams import Projector, Regrid
from illava.hooks import in_graph, under_way
from illava.hooks.state import State
from illava.refusals import refuse_checkpointing
from illava.vision import VisionCall


class EncoderHooks:
    """Hooks take and return what torch's do."""

    def __init__(self, state: State) -> None:
        self.state, self.seams, self.number = state, state.seams, state.number

    def enter_tower(self, module: Any, args: Any, kwargs: Any) -> None:
        call_args = arguments(module, args, kwargs)
        pixels = next(iter(call_args.values()))
        call = VisionCall(
            self.state.plan,
            self.seams,
            self.state.family.layout(self.seams, call_args),
            pixels.device,
            module.config._attn_implementation,
            records=call_args.get("output_hidden_states") not in (None, False),
            traced=self.state.trace,
            choices=self.state.choices,
            plan_id=self.state.number,
        )
        if call.removes:
            refuse_checkpointing(module)
        self.state.begin_vision(call)

    # Hooks of blocks know no number where they need none: blocks whose hooks are alike share what
    # torch.compile made of one of them.

    def enter_block(self, module: Any, args: Any, kwargs: Any, number: int | None = None) -> Any:
        """`number`: of a block that may attend by illava."""
        call = under_way.VISION.of(self.number)
        if call is None or call.now is None:
            return None
        if call.padded:
            named = arguments(module, args, kwargs)
            args, kwargs = args[:1], {k: v for k, v in named.items() if v is not args[0]}
            kwargs["attention_mask"] = call.now.padding_mask(kwargs["attention_mask"])
        if kwargs.get("position_embeddings") is not None:
            cos, sin = kwargs["position_embeddings"]
            kwargs["position_embeddings"] = (call.now.select(cos), call.now.select(sin))
        if kwargs.get("cu_seqlens") is not None:
            ours = number is not None and (number in call.own_attention or self.state.fast_windows)
            keep_empty = ours or call.implementation.startswith("flash")
            kwargs["cu_seqlens"] = call.now.recount(kwargs["cu_seqlens"], keep_empty)
        return args, kwargs

    def enter_block_attention(self, number: int, args: Any, kwargs: Any) -> Any:
        call = under_way.VISION.of(self.number)
        if call is None or not (number in call.own_attention or self.state.fast_windows):
            return None
        call.attending, call.bounds = number, kwargs.get("cu_seqlens")
        if call.bounds is None:
            return None
        # The module is to hand all tokens to illava's attention function, which attends within the real
        # spans together. 5.x does so where attention is called flash; 4.57 goes by spans: here, by one.
        # That one stays on the CPU, where reading it back waits for nothing.
        if "max_seqlen" in kwargs:
            kwargs["max_seqlen"] = 0  # nobody reads it
        else:
            kwargs["cu_seqlens"] = torch.tensor([0, len(call.stage(number).tokens)], dtype=torch.int32)
        return args, kwargs

    def observe(self, name: str, output: Tensor) -> None:
        """Keep what a module inside a merging block's attention puts out."""
        call = self.state.vision.get()
        if call is not None and call.attending is not None:
            call.observed[name] = output.detach()

    def leave_block_attention(self, module: Any) -> None:
        call = under_way.VISION.of(self.number)
        if call is None or call.attending is None:
            return
        if self.seams.block_observed is not None:
            call.begin_attention(call.attending, None)
            call.decide_observed(*self.seams.block_observed.queries_keys(module, call.observed))
            call.observed.clear()
        call.attending = None

    def merge_block(self, number: int, args: Any, kwargs: Any) -> Any:
        call = under_way.VISION.of(self.number)
        if call is None or number not in call.merging:
            return None
        return (self._merged(call, number, args[0]), *args[1:]), kwargs

    def _merged(self, call: VisionCall, number: int, hidden: Tensor) -> Tensor:
        return (
            in_graph.merge_units(call, number, hidden)
            if in_graph.possible(call)
            else self._merge(call, number, hidden)
        )

    @torch.compiler.disable
    def _merge(self, call: VisionCall, number: int, hidden: Tensor) -> Tensor:
        return call.merge(number, hidden)

    def leave_ffn(self, number: int, output: torch.Tensor) -> Any:
        call = under_way.VISION.of(self.number)
        if call is None or number not in call.merging:
            return None
        call.merged[number] = call.merged[number] + self.seams.finish_ffn(self.seams.blocks[number], output)
        return output.new_zeros(())  # the block adds this to its unmerged input, then drops the sum

    def leave_block(self, number: int, output: Any) -> Any:
        call = under_way.VISION.of(self.number)
        if call is None or number not in call.scoring:
            return None
        if number in call.merging:
            merged = call.merged.pop(number)
        else:
            merged = self._merged(call, number + 1, output[0] if isinstance(output, tuple) else output)
            call.merged.clear()
        if call.outputs is not None:
            call.outputs[number] = merged
        return (merged, *output[1:]) if isinstance(output, tuple) else merged

    def enter_regrid(self, regrid: Regrid, module: Any, args: Any, kwargs: Any) -> Any:
        call = self.state.vision.get()
        if call is None or not (call.removes or self.state.fast_windows):
            return None
        return (), regrid.squeeze(arguments(module, args, kwargs), call.enter_regrid(regrid.block))

    def enter_projector(self, seam: Projector, module: Any, args: Any, kwargs: Any) -> Any:
        alive = self._survivors(seam)
        if alive is None or seam.squeeze is None:
            return None
        return call_by_name(module, seam.squeeze(arguments(module, args, kwargs), alive))

    def leave_projector(self, seam: Projector, output: Any) -> Any:
        if seam.reads is not None and any(c.trace is not None for c in self._calls()):
            self._trace_reads(seam.reads(output, self._standing(seam)))
        alive = self._survivors(seam)
        if alive is not None:
            return seam.spread(output, alive)
        if isinstance(output, (list, tuple)):
            return type(output)(never_dead(x) if isinstance(x, Tensor) else x for x in output)
        return never_dead(output) if isinstance(output, Tensor) else output

    def _survivors(self, seam: Projector) -> Survivors | None:
        """What is alive where a projector reads: in the encoder call under way, or those just left."""
        return self._standing(seam) if any(c.removes for c in self._calls()) else None

    def _standing(self, seam: Projector) -> Survivors:
        """The same of calls that merged nothing; there must be one."""
        first, *others = (c.stage(seam.block + 1).survivors() for c in self._calls())
        return first.followed_by(others)

    def _calls(self) -> tuple[VisionCall, ...]:
        call = self.state.vision.get()
        return self.state.left.get() if call is None else (call,)

    def _trace_reads(self, reads: list[Tensor]) -> None:
        """Write down what visual tokens are made of, frame by frame, with the calls the frames are of."""
        for call in self._calls():
            if call.trace is not None:
                call.trace.reads.extend(reads[: len(call.layout.frames)])
                reads = reads[len(call.layout.frames) :]

    def leave_tower(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        call = self.state.end_vision()
        if call is None or output is None:
            return output
        self.state.remember(call.record)
        before = self.state.left.get() if self.state.joining.get() else ()
        self.state.left.set((*before, call))
        try:
            return self._full(call, output) if call.removes else output
        finally:
            call.forget()

    def _full(self, call: VisionCall, output: Any) -> Any:
        """What the tower puts out, at the caller's length."""
        if getattr(output, "last_hidden_state", None) is None:
            return output  # 4.57 returns a projector's output alone, which is full already
        output.last_hidden_state = call.full_grid(output.last_hidden_state, call.stages[-1])
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = call.full_hidden_states(output.hidden_states)
        return output

    def pack(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A method of the model that crops, interpolates or pools features, run over dead rows."""
        if not (calls := self.state.left.get()):
            return original(*args, **kwargs)
        call = calls[-1]
        if call.trace is not None:
            call.trace.reads.extend(weights_of_packing(original, args, kwargs))
        packed = pack_over_dead(original, args, kwargs) if call.removes else original(*args, **kwargs)
        if isinstance(packed, tuple):
            tiles = [len(features) for features in next(iter([*args, *kwargs.values()]))]
            call.record.packed.extend(zip(tiles, map(len, packed[0]), strict=True))
        return packed
