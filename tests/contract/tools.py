"""What the tests of the contract share: models, prompts, plans, and what a patch could leave behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import illava
import illava.candidates
import zoo
from zoo.common import Image, Video

LAYERS = {
    name: dict(vit_layers=family.VIT_LAYERS, llm_layers=family.LLM_LAYERS)
    for name, family in zoo.FAMILIES.items()
}
# The paper's rule, as it is and where it recycles more; and what is merged unless a rule is named.
MAIN = dict(reduction=0.667, merge="recycle")
DEEP = dict(reduction=0.778, merge="recycle", recycled=0.3, members=3)
DEFAULT = dict(reduction=0.778)

# Two ways to remove nothing: no merge at all, and merges that find nothing to remove in any picture.
NOTHING = {
    "reduction 0": dict(reduction=0),
    "every merge idle": dict(vit_tokens_removed=0, llm_tokens_removed=0),
}


# Models and prompts ---------------------------------------------------------------------------------


_BUILT: dict[tuple, nn.Module] = {}


def build(family: str, attention: str = "sdpa", dtype=torch.float32) -> nn.Module:
    """The family's model. Tests share it, and `conftest.py` sees to it that they leave it unpatched."""
    key = family, attention, dtype
    if key not in _BUILT:
        _BUILT[key] = zoo.FAMILIES[family].build(attention=attention, dtype=dtype)
    return _BUILT[key]


def built() -> list[nn.Module]:
    """Every model that tests have used so far."""
    return list(_BUILT.values())


def prompt(family: str, *rows, **options) -> dict:
    return zoo.FAMILIES[family].prompt(*rows, **options)


def prompt_of(family: str, kind: str, **options) -> dict:
    return prompt(family, *zoo.FAMILIES[family].KINDS[kind], **options)


def beams_of(family: str) -> dict:
    return prompt(family, *zoo.FAMILIES[family].BEAMS)


def pictures_of(rows) -> list:
    return [part for row in rows for part in row if isinstance(part, (Image, Video))]


def patch(model, family: str, **settings) -> illava.Handle:
    """Patch, where nothing else is said at the layers that the zoo names."""
    return illava.patch(model, **(LAYERS[family] | settings))


def visual_places(model, inputs: dict) -> torch.Tensor:
    """Where placeholders stand in a row: those of images, then those of videos."""
    ids, places = inputs["input_ids"][0], []
    for kind in ("image", "video"):
        token = getattr(model.config, f"{kind}_token_id", None)
        if token is not None:
            places.append((ids == token).nonzero().flatten())
    return torch.cat(places)


def removed_by(plan) -> tuple:
    """The counts of a plan as the references take them."""
    return (
        lambda units: dict(zip(plan.vit_layers, plan.vit_removed(units), strict=True)),
        lambda tokens, alive: dict(zip(plan.llm_layers, plan.llm_removed(tokens, alive), strict=True)),
    )


# Parametrisation ------------------------------------------------------------------------------------


def capabilities_of(rows) -> list:
    """Marks for what a prompt shows, for the support table (see `tests/conftest.py`)."""
    pictures = pictures_of(rows)
    names = {"video" if isinstance(part, Video) else "pictures" for part in pictures} or {"text only"}
    if len(rows) > 1:
        names.add("padded batch")
    return [pytest.mark.capability(name) for name in sorted(names)]


def each_kind(wanted=lambda kind, rows: True):
    """Parametrise over every family and those of its prompts that are wanted."""
    return pytest.mark.parametrize(
        ("family", "kind"),
        [
            pytest.param(name, kind, id=f"{name}-{kind}", marks=capabilities_of(rows))
            for name, family in zoo.FAMILIES.items()
            for kind, rows in family.KINDS.items()
            if wanted(kind, rows)
        ],
    )


each_family = pytest.mark.parametrize("family", zoo.FAMILIES)
each_rule = pytest.mark.parametrize("settings", [DEEP, DEFAULT], ids=["by attention", "by likeness"])
each_kind_with_pictures = each_kind(lambda kind, rows: pictures_of(rows))
each_single_row = each_kind(lambda kind, rows: len(rows) == 1)
each_single_row_with_pictures = each_kind(lambda kind, rows: len(rows) == 1 and pictures_of(rows))


def mixed(family: str) -> str:
    """The prompt with most in it of a family: several pictures, and a video where there are videos."""
    kinds = zoo.FAMILIES[family].KINDS
    return "pictures and video" if "pictures and video" in kinds else "several pictures"


# Calls ----------------------------------------------------------------------------------------------


def watch_decisions(monkeypatch) -> list[tuple]:
    """Fills with every merge from now on: what was to choose from, and the decision."""
    seen = []

    def decide(c, plan):
        decision = illava.candidates.decide(c, plan)
        seen.append((c, decision))
        return decision

    monkeypatch.setattr("illava.vision.decide", decide)
    monkeypatch.setattr("illava.language.decide", decide)
    return seen


def forward(model, inputs: dict, **extra):
    with torch.no_grad():
        return model(**inputs, **extra)


def generate(model, inputs: dict, *, tokens: int = 6, **extra):
    torch.manual_seed(7)
    return model.generate(**inputs, max_new_tokens=tokens, **extra)


def greedy(model, inputs: dict, *, tokens: int = 6, **extra) -> tuple:
    """Ids of the answer `[B, tokens]`, the logits they were chosen from, and the cache."""
    extra |= dict(do_sample=False, return_dict_in_generate=True, output_logits=True)
    out = generate(model, inputs, tokens=tokens, **extra)
    answer = out.sequences[:, inputs["input_ids"].shape[1] :]
    return answer, torch.stack(out.logits, dim=1), out.past_key_values


def held(cache) -> list[int | None]:
    """Keys in each layer of a cache, `None` where a layer attends linearly and keeps none."""
    return [None if getattr(layer, "keys", None) is None else layer.keys.shape[2] for layer in cache.layers]


# The parts of a model -------------------------------------------------------------------------------


def tower(model) -> nn.Module:
    return getattr(model.model, "visual", None) or model.model.vision_tower


def blocks(model) -> nn.ModuleList:
    lists = [m for m in tower(model).named_modules() if isinstance(m[1], nn.ModuleList)]
    return next(m for name, m in lists if name.rsplit(".", 1)[-1] in ("blocks", "layer", "layers"))


def layers(model) -> nn.ModuleList:
    return model.model.language_model.layers


def fail_inside(model, module: nn.Module, inputs: dict, *, restore: bool = True, **extra) -> None:
    """A call that ends with an exception inside `module`.

    Args:
        restore: to record hidden states transformers 4.57 replaces `forward` of blocks and layers, and does
            not put it back after an exception, patched or not. Whether to do that here.
    """

    def fail(*_):
        raise KeyError("failure of the test's own")

    own = {m: m.__dict__.get("forward") for m in model.modules()}
    hook = module.register_forward_hook(fail)
    try:
        with pytest.raises(KeyError, match="test's own"):
            forward(model, inputs, **extra)
    finally:
        hook.remove()
        for part, before in own.items() if restore else ():
            part.__dict__.pop("forward", None)
            if before is not None:
                part.__dict__["forward"] = before


def trace(model) -> dict:
    """Everything a patch could leave behind: types, `__dict__` keys, hooks, configs, forwards, methods."""
    seen = {}
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        seen[name] = (
            type(module),
            sorted(module.__dict__),
            {
                key: list(value.values())
                for key, value in module.__dict__.items()
                if "hooks" in key and isinstance(value, dict) and value
            },
            type(config),
            id(config),
            config.to_dict() if config is not None else None,
            module.forward.__func__,
            {key: value for key, value in module.__dict__.items() if callable(value)},
        )
    return seen
