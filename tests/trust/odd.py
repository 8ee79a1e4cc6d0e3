"""Odd prompts and plans drawn by hypothesis, and an eye on what illava does to them."""

from __future__ import annotations

from unittest import mock

import torch
from hypothesis import strategies as st

import illava.merge
from contract import tools
from contract.methods import evenly, whole_mean
from illava.language import LanguageCall
from illava.vision import VisionCall
from zoo.common import Image, Video

# From less than one merge unit to strips: families resize, cut into tiles or slice each in its own way.
SIDES = st.sampled_from([4, 14, 28, 31, 56, 84, 120, 170])
IMAGES = st.builds(Image, SIDES, SIDES, st.integers(0, 3)) | st.sampled_from(
    [Image(28, 28), Image(28, 420), Image(560, 28), Image(12, 300), Image(200, 8)]
)
VIDEOS = {"llava_next": None}  # no videos there
MAX_PICTURES = 4  # per call


@st.composite
def prompts(draw, family: str, rows: int = 3):
    """Rows of a batch: words, pictures, the same picture twice, rows of text alone, no text between."""
    count = draw(st.integers(1, rows))
    pictures = draw(st.lists(IMAGES, min_size=1, max_size=MAX_PICTURES))
    if draw(st.booleans()):
        pictures.append(pictures[0])
    if VIDEOS.get(family, Video) is not None and draw(st.booleans()):
        pictures.append(
            Video(draw(st.integers(2, 4)), 64, draw(st.sampled_from([32, 84])))
        )  # 4.57 refuses sides below 32
    table = [[draw(st.integers(1, 4))] for _ in range(count)]
    for picture in pictures:
        row = table[draw(st.integers(0, count - 1))]
        row.append(picture)
        if draw(st.booleans()):
            row.append(draw(st.integers(1, 5)))
    return table


LAST = 3  # encoder block and decoder layer of all models here
SHARES = (0.9, 0.6, 0.3, 0.01)
FAST = ("qwen", "minicpm")  # families whose encoder attends in spans that could be run together

# What `plans` never draws, for `illava.patch` refuses it: settings, and what the error says.
REFUSED = {
    "the last block and the output, both ranked by that block's attention": (
        dict(vit_layers=(LAST, "output")), "leave one of them out",
    ),
    "the input, where nothing attends, ranked by attention": (
        dict(llm_layers=("input",), merge="prune"), "give a function as score",
    ),
    "the input, where nothing attends, recycled by attention": (
        dict(llm_layers=("input",), score=evenly, merge="recycle"), "and 'prune' or a function as merge",
    ),
}  # fmt: skip


@st.composite
def plans(draw, family: str) -> dict:
    """What `illava.patch` is given: layers and the two ends, one of the four budgets, and all the rest."""
    first = 1 if family.startswith("minicpm") else 0  # its layer 0 is linear and ranks nothing

    def layers(start):
        numbers = st.lists(st.integers(start, LAST), max_size=3, unique=True)
        return tuple(sorted(draw(numbers)))

    def shares(layers):
        some = st.lists(st.sampled_from([1, *SHARES]), min_size=len(layers), max_size=len(layers))
        return tuple(sorted(draw(some), reverse=True))

    vit, llm = layers(0), layers(first)
    score = draw(st.sampled_from(["attention", "attention", "lse", evenly]))
    merge = draw(st.sampled_from(["recycle", "prune", "linear", "bipartite", whole_mean]))
    if LAST not in vit and draw(st.booleans()):
        vit = (*vit, "output")
    if (merge == "bipartite" or (callable(score) and merge != "recycle")) and draw(st.booleans()):
        llm = ("input", *llm)
    settings = dict(vit_layers=vit, llm_layers=llm, merge=merge)
    way = draw(st.sampled_from(["reduction", "keep_ratio", "tokens_removed", "shares"]))
    if way == "reduction":
        settings["reduction"] = draw(st.sampled_from([0.01, 0.3, 0.667, 0.889, 0.999]))
        settings["encoder_share"] = draw(st.sampled_from([None, 0, 0.4, 1]))
    elif way == "shares":
        settings |= dict(vit_shares=shares(vit), llm_shares=shares(llm))
    else:
        values = [0.01, 0.5, 0.85, 1] if way == "keep_ratio" else [0, 1, 3, 10**6]
        settings |= {f"{stage}_{way}": draw(st.sampled_from(values)) for stage in ("vit", "llm")}
    vit_merge = draw(st.sampled_from([None, "bipartite", "prune"]))
    if "bipartite" in (merge, vit_merge):
        settings["distance_penalty"] = draw(st.sampled_from([None, 0, 0.2, 2]))
    if {merge, vit_merge or merge} != {"bipartite"}:  # what only a rule that ranks tokens reads
        settings |= dict(
            score=score,
            queries=draw(st.sampled_from(["text", "all", "visual", "last"])),
            window_score=draw(st.sampled_from(["window", "picture"])),
            recycled=draw(st.sampled_from([0.01, 0.3, 1])),
            members=draw(st.sampled_from([1, 2, 5, 50])),
        )
    counts = (vit_merge or merge) in ("bipartite", whole_mean)  # whom its tokens stand for
    return settings | dict(
        vit_merge=vit_merge,
        proportional=draw(st.sampled_from([None, False, True] if counts else [None, False])),
        fast_windows=family.startswith(FAST) and draw(st.booleans()),
        trace=draw(st.booleans()),
    )


class Watch:
    """Everything illava decides while this is entered, and the rotary embeddings each layer is given."""

    def __init__(self, model) -> None:
        self.decisions: list[illava.merge.Merge] = []
        self.vision: list[VisionCall] = []
        self.language: list[LanguageCall] = []
        self.rotary: dict[int, torch.Tensor] = {}
        self.model = model

    def __enter__(self) -> Watch:
        watch, select = self, illava.merge.select
        see, read = VisionCall.__init__, LanguageCall.__init__

        def selecting(*args, **kwargs):
            watch.decisions.append(select(*args, **kwargs))
            return watch.decisions[-1]

        def seeing(call, *args, **kwargs):
            see(call, *args, **kwargs)
            watch.vision.append(call)

        def reading(call, *args, **kwargs):
            read(call, *args, **kwargs)
            watch.language.append(call)

        self._patches = [
            mock.patch.object(illava.merge, "select", selecting),
            mock.patch.object(VisionCall, "__init__", seeing),
            mock.patch.object(LanguageCall, "__init__", reading),
        ]
        for patch in self._patches:
            patch.start()
        self._hooks = [
            layer.register_forward_pre_hook(self._rotary(number), with_kwargs=True)
            for number, layer in enumerate(tools.layers(self.model))
        ]
        return self

    def __exit__(self, *_) -> None:
        for patch in self._patches:
            patch.stop()
        for hook in self._hooks:
            hook.remove()

    def _rotary(self, number):
        def hook(module, args, kwargs):
            self.rotary[number] = kwargs["position_embeddings"][0]  # [..., n, D]

        return hook


def real_text(model, inputs) -> torch.Tensor:
    """`[B, L]` tokens that are neither padding nor placeholders: none of them may ever be lost."""
    text = inputs["attention_mask"].bool().clone()
    for kind in ("image", "video"):
        token = getattr(model.config, f"{kind}_token_id", None)
        if token is not None:
            text &= inputs["input_ids"] != token
    return text
