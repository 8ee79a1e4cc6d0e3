"""Other ways to say which units stay (accuracy_selection.py), on real merges and against plain loops."""

import accuracy_selection as selection
import pytest
import torch

import illava
from contract import tools
from zoo.common import Image, Video


def merges(score, family, visual, monkeypatch):
    """What every merge of a call by `score` chose from, and what it decided."""
    seen = tools.watch_decisions(monkeypatch)
    model = tools.build(family)
    layers = {"vit_layers": (1,), "llm_layers": (0, 1)}
    with illava.patch(model, reduction=0.6, score=score, merge="recycle", **layers):
        tools.forward(model, tools.prompt(family, [5, visual, 7]))
    return seen


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision"])
def test_a_unit_s_patches_receive_what_the_unit_does(family, monkeypatch):
    """Their mean is illava's own measure, where the block attends to the whole picture."""
    means, best = [], []

    def score(c):
        if c.stage == "vit":
            means.append(selection.by_patch(c, lambda received: received.mean(dim=1)))
            best.append(selection.best_patch(c))
            torch.testing.assert_close(means[-1][c.real], c.attention[c.real], rtol=1e-4, atol=1e-7)
        return c.attention

    merges(score, family, Image(140, 168, 1), monkeypatch)
    assert means
    for mean, top in zip(means, best, strict=True):
        assert (top >= mean - 1e-7).all()
        assert family != "qwen2_5_vl" or not torch.equal(top.argsort(1), mean.argsort(1))


def test_every_frame_keeps_as_many_and_its_most_attended(monkeypatch):
    seen = merges(selection.every_frame_alike, "qwen2_5_vl", Video(8, 112, 112, 1), monkeypatch)
    in_llm = [(c, decision) for c, decision in seen if c.stage == "llm"]
    assert len(in_llm) == 2
    for c, decision in in_llm:
        units, keep = c.counts[0], c.keep_counts[0]
        kept = {int(i) for i in c.index[0, :units] if decision.keep[i]}
        assert len(kept) == keep
        by_frame = {}
        for place, unit in enumerate(c.index[0, :units].tolist()):
            by_frame.setdefault(int(c.place[0, place, 0]), []).append((float(c.attention[0, place]), unit))
        assert len(by_frame) > 2
        stay = [sum(unit in kept for _, unit in frame) for frame in by_frame.values()]
        assert max(stay) - min(stay) <= 1
        for frame, count in zip(by_frame.values(), stay, strict=True):
            assert {unit for _, unit in sorted(frame, reverse=True)[:count]} <= kept


def test_of_all_frames_together_some_keep_more(monkeypatch):
    """What `every_frame_alike` changes: by attention alone the frames of this clip differ."""
    seen = merges("attention", "qwen2_5_vl", Video(8, 112, 112, 1), monkeypatch)
    c, decision = next((c, decision) for c, decision in seen if c.stage == "llm")
    frames = c.place[0, : c.counts[0], 0]
    kept = frames[decision.keep[c.index[0, : c.counts[0]]]].tolist()
    assert max(map(kept.count, set(kept))) - min(map(kept.count, range(4))) > 1
