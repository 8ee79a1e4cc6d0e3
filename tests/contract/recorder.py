"""What the package decided, read off its own state while it runs, against what a reference decided."""

from __future__ import annotations

import torch

from illava.language import LanguageCall
from illava.schedule import ModelPlan
from illava.vision import VisionCall


def options(plan: ModelPlan) -> dict:
    """How a plan chooses and merges, as the references take it; what is asked as `None` is settled there."""
    asked = plan.settings
    return dict(
        recycled=asked.recycled,
        members=asked.members,
        score=asked.score or "attention",
        merge=asked.merge,
        queries=asked.queries,
        window_score=asked.window_score,
        vit_merge=asked.vit_merge,
        proportional=plan.proportional,
        distance_penalty=plan.distance_penalty,
    )


class Recorder:
    """Merges of the calls made while it is installed."""

    def __init__(self, monkeypatch) -> None:
        self.vision: list[tuple] = []  # number of the encoder call, block, kept and features of each frame
        self.language: list[tuple] = []  # layer, positions [n], features of each segment in prompt order
        self.calls: list[VisionCall] = []
        see, read = VisionCall.merge, LanguageCall.merge

        def vision_merge(call, block, hidden):
            out = see(call, block, hidden)
            self._record_vision(call, block, out)
            return out

        def language_merge(call, layer, hidden):
            out = read(call, layer, hidden)
            self._record_language(call, layer, out)
            return out

        monkeypatch.setattr(VisionCall, "merge", vision_merge)
        monkeypatch.setattr(LanguageCall, "merge", language_merge)

    def _record_vision(self, call, block, out) -> None:
        if not any(call is other for other in self.calls):
            self.calls.append(call)
        number = next(i for i, other in enumerate(self.calls) if other is call)
        stage = call.stages[-1]
        rows = stage.pack(out) if out.ndim == 3 else out
        units = rows[stage.members]  # [units kept, patches of a unit, D]
        features = [own.flatten(0, 1) for own in units.split(list(stage.frame_counts))]
        starts = torch.tensor([0, *call.layout.frame_units]).cumsum(0).tolist()
        kept = [
            [unit - first for unit in stage.units.tolist() if first <= unit < end]
            for first, end in zip(starts[:-1], starts[1:], strict=True)
        ]
        self.vision.append((number, block, kept, features))

    def _record_language(self, call, layer, out) -> None:
        positions = call.stages[-1].positions
        slots = [table[:count] for table, count in zip(call.table, call.counts[-1], strict=True)]
        slots.sort(key=lambda own: int(positions[0, own[0]]))
        self.language.append((layer, positions[0].tolist(), [out[0, own] for own in slots]))

    def compare(self, expected) -> None:
        """Against the `Result` of a reference: who is kept, and what the kept have become."""
        # The encoder is called for the images, then for the videos, each kind in one call.
        sources = list(dict.fromkeys(m.source for m in expected.merges if m.stage == "vit"))
        assert len(self.calls) == len(sources)
        found = {}
        for number, block, kept, features in self.vision:
            for frame, (numbers, rows) in enumerate(zip(kept, features, strict=True)):
                found["vit", sources[number], block, frame] = numbers, rows
        for layer, _, features in self.language:
            for segment, rows in enumerate(features):
                found["llm", layer, segment] = None, rows
        for merge in expected.merges:
            key = ("vit", merge.source) if merge.stage == "vit" else ("llm",)
            numbers, rows = found[(*key, merge.layer, merge.segment)]
            assert numbers is None or numbers == merge.kept, (key, merge.layer, merge.segment)
            torch.testing.assert_close(rows, merge.features, atol=1e-5, rtol=1e-5)
        for layer, positions, _ in self.language:
            alive = [False] * len(expected.alive[layer + 1])
            for position in positions:
                alive[position] = True
            assert alive == expected.alive[layer + 1], f"who survives decoder layer {layer}"
        assert len(self.language) == len({m.layer for m in expected.merges if m.stage == "llm"})
