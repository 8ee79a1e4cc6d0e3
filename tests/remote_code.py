"""Small random models that run the code published in their own repositories, where a copy is at hand.

That code is no part of this project. The environment variable ILLAVA_REMOTE_CODE names a folder with the
repositories' files in folders of the names below; the tests that need one skip where it is missing. What is
used is a temporary copy of the `.py` files, with a small config and a tokenizer written beside them, through
transformers' own Auto classes: as a user would who passes `trust_remote_code=True`.

On transformers 5 `from_pretrained` fails with both ("object has no attribute 'all_tied_weights_keys'": the
published classes never call `post_init`), while `from_config`, which serves here, works. InternLM2 as
published has no `generate` on either version, and is refused.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import sys
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import pre_tokenizers

import illava
from zoo.common import V5, scale_weights

VARIABLE = "ILLAVA_REMOTE_CODE"
PATCH = 14


@dataclass(frozen=True)
class Published:
    """Where a folder's files come from, and what they need to be imported."""

    repository: str
    main_file: str
    packages: tuple[str, ...]


CODE = {
    "internvl2_5_qwen2": Published(
        "OpenGVLab/InternVL2_5-4B", "modeling_internvl_chat.py", ("einops", "timm")
    ),
    "internvl2_5": Published(
        "OpenGVLab/InternVL2_5-8B", "modeling_internvl_chat.py", ("einops", "timm", "sentencepiece")
    ),
    "minicpmv2_6": Published("openbmb/MiniCPM-V-2_6", "modeling_minicpmv.py", ("torchvision",)),
}


class InternVLChat:
    """What the unpatched model cannot do, for the table of what each family is capable of."""

    CANNOT = {
        "video": "see videos: its code takes their frames as pictures",
        "turns with new pictures": "go on with a cache: `chat` reads the whole conversation again",
        "eager and sdpa": "choose: its encoder has an attention of its own",
    }
    LIMITS = {"turns": "go on with a cache: `chat` reads the whole conversation again"}


class MiniCPMV:
    """The same."""

    CANNOT = {
        "video": "see videos: its code takes their frames as pictures",
        "turns with new pictures": "go on with a cache: `chat` reads the whole conversation again",
    }
    LIMITS = {"turns": "go on with a cache: `chat` reads the whole conversation again"}


FAMILIES = {"internvl_chat": InternVLChat, "minicpmv": MiniCPMV}
_CAPABILITIES = {
    "several pictures": "pictures",
    "batch_chat": "padded batch",
    "batch": "padded batch",
    "beams": "beams",
    "several answers": "beams",
    "turns": "turns",
    "text only": "text only",
    "precomputed features": "features first",
    "labels and gradients": "labels",
}


def capabilities(use: str) -> tuple[Any, ...]:
    """The mark of a test that puts a model to this use."""
    return (pytest.mark.capability(_CAPABILITIES[use]),) if use in _CAPABILITIES else ()


CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
INTERNVL = (*QWEN, "<img>", "</img>", "<IMG_CONTEXT>")
MINICPMV = ("<unk>", *QWEN, *(f"<{end}{x}>" for x in ("image", "slice", "image_id") for end in ("", "/")))


@contextlib.contextmanager
def folders(work: Path):
    """A function from a name of `CODE` to a folder in `work` with its `.py` files; it skips without them."""
    cache = str(work / "modules")
    with pytest.MonkeyPatch.context() as patch:
        # Where transformers copies code before it imports it: by default in the user's home.
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", cache)
        # resampler.py takes `List` from `torch.nn.functional import *`, which newer torch no longer gives.
        patch.setattr(torch.nn.functional, "List", typing.List, raising=False)  # noqa: UP006
        yield lambda name: _copy(name, work)
    with contextlib.suppress(ValueError):
        sys.path.remove(cache)


def _copy(name: str, work: Path) -> Path:
    code = CODE[name]
    asks = (
        f"set {VARIABLE} to a folder that holds {name}/ with the .py files of the model repository "
        f"{code.repository}, and install {', '.join(code.packages)}"
    )
    if not os.environ.get(VARIABLE):
        pytest.skip(f"{VARIABLE} is not set: {asks}")
    source = Path(os.environ[VARIABLE]) / name
    if not (source / code.main_file).is_file():
        pytest.skip(f"{source / code.main_file} is missing: {asks}")
    missing = [package for package in code.packages if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} cannot be imported: {asks}")
    folder = work / name
    if not folder.exists():
        folder.mkdir()
        for file in source.glob("*.py"):
            shutil.copy(file, folder)
    return folder


# ---------------------------------------------------------------- files beside the code


def write(folder: Path, name: str, content) -> None:
    (folder / name).write_text(json.dumps(content))


def write_tokenizer(folder: Path, special: tuple[str, ...], **config) -> dict[str, int]:
    """A byte-level tokenizer without merges, one token a byte, then `special`: in files as Qwen2's.

    Returns:
        The ids of the special tokens.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    assert alphabet[0] == "!", "token 0, as in Qwen2's own vocabulary"
    write(folder, "vocab.json", {byte: i for i, byte in enumerate(alphabet)})
    (folder / "merges.txt").write_text("#version: 0.2\n")
    ids = {token: len(alphabet) + i for i, token in enumerate(special)}
    flags = dict(lstrip=False, rstrip=False, normalized=False, single_word=False, special=True)
    config |= dict(
        added_tokens_decoder={str(i): {"content": token, **flags} for token, i in ids.items()},
        additional_special_tokens=list(special),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT,
        clean_up_tokenization_spaces=False,
        model_max_length=100_000,
    )
    write(folder, "tokenizer_config.json", config)
    return ids


def qwen2(ids: dict[str, int], hidden_size: int) -> dict:
    """Config of a language model of 4 layers."""
    return dict(
        vocab_size=256 + len(ids), hidden_size=hidden_size, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, rope_theta=1e6,
        bos_token_id=ids["<|endoftext|>"], eos_token_id=ids["<|im_end|>"], tie_word_embeddings=False,
        use_sliding_window=False,
    )  # fmt: skip


def spread_weights(model, special: dict[str, int], *, seed: int = 0):
    """Weights as in the zoo, and a model that does not stop early: it never says a special token, nor "!"."""
    scale_weights(model, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if name.endswith(("class_embedding", "position_embedding", "position_embedding.weight", "query")):
            weight.data = 0.5 * noise
        elif name.endswith(("ls1", "ls2")):
            weight.data = 0.8 + 0.2 * noise
        elif weight.ndim == 1 and name.endswith("weight"):  # norms
            weight.data = 1 + 0.2 * noise
        elif name.endswith("lm_head.weight"):
            weight.data[[0, *special.values()]] = 0  # of all the logits some other is above zero
    return model.eval()


# ---------------------------------------------------------------- models


def internvl(folder: Path, *, seed: int = 0, qk_norm: bool = False, select_layer: int = -1):
    """`InternVLChatModel` with Qwen2, of 4 encoder blocks and 4 decoder layers, and its tokenizer.

    A tile is 112 x 112 pixels, 8 x 8 patches, 16 tokens of the language model.

    Args:
        qk_norm: as the large encoder: norms on queries and keys, RMS norms, no biases on q, k and v.
        select_layer: which of the encoder's hidden states the projector reads.
    """
    ids = write_tokenizer(folder, INTERNVL, tokenizer_class="Qwen2Tokenizer")
    write_internvl(folder, dict(qwen2(ids, 32), architectures=["Qwen2ForCausalLM"], model_type="qwen2"))
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    config.select_layer = select_layer
    config.vision_config.qk_normalization = qk_norm
    config.vision_config.qkv_bias = not qk_norm
    config.vision_config.norm_type = "rms_norm" if qk_norm else "layer_norm"
    torch.manual_seed(seed)
    # Flash attention, if it is installed, is not for the CPU.
    model = transformers.AutoModel.from_config(config, trust_remote_code=True, use_flash_attn=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True, use_fast=False)
    model.img_context_token_id = ids["<IMG_CONTEXT>"]
    return spread_weights(model, ids, seed=seed), tokenizer


def write_internvl(folder: Path, llm: dict) -> None:
    vision = dict(
        model_type="intern_vit_6b", architectures=["InternVisionModel"], hidden_size=32, intermediate_size=48,
        num_hidden_layers=4, num_attention_heads=4, image_size=112, patch_size=PATCH, use_flash_attn=False,
        norm_type="layer_norm", qkv_bias=True, qk_normalization=False, drop_path_rate=0.0,
    )  # fmt: skip
    code = "modeling_internvl_chat.InternVLChatModel"
    config = dict(
        model_type="internvl_chat", architectures=["InternVLChatModel"], template="internvl2_5",
        auto_map={"AutoConfig": "configuration_internvl_chat.InternVLChatConfig", "AutoModel": code},
        downsample_ratio=0.5, force_image_size=112, ps_version="v2", select_layer=-1,
        vision_config=vision, llm_config=llm,
    )  # fmt: skip
    write(folder, "config.json", config)


def internvl_internlm2(folder: Path):
    """`InternVLChatModel` with InternLM2, to be refused: no weights worth a name, no tokenizer."""
    llm = dict(
        model_type="internlm2", architectures=["InternLM2ForCausalLM"], attn_implementation="eager",
        auto_map={"AutoConfig": "configuration_internlm2.InternLM2Config"}, vocab_size=300, hidden_size=32,
        intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, bias=False,
        rope_scaling={"type": "dynamic", "factor": 2.0},
    )  # fmt: skip
    write_internvl(folder, llm)
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    return transformers.AutoModel.from_config(config, trust_remote_code=True, use_flash_attn=False).eval()


QUERIES = 16


def minicpmv(folder: Path, *, seed: int = 0, attention: str = "sdpa"):
    """`MiniCPMV` 2.6 of 4 encoder blocks and 4 decoder layers, and its processor.

    A slice is about 8 x 8 patches, in any shape; the resampler makes 16 tokens of it. The language model
    is 256 wide, since the resampler has a head per 128.
    """
    special = MINICPMV
    ids = write_tokenizer(
        folder, special, tokenizer_class="MiniCPMVTokenizerFast", bos_token="<|im_start|>", unk_token="<unk>",
        auto_map={"AutoTokenizer": ["tokenization_minicpmv_fast.MiniCPMVTokenizerFast", None]},
    )  # fmt: skip
    code = "modeling_minicpmv.MiniCPMV"
    vision = dict(
        model_type="siglip", hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        image_size=980, patch_size=PATCH,
    )  # fmt: skip
    config = qwen2(ids, 256) | dict(
        model_type="minicpmv", architectures=["MiniCPMV"], version=2.6, query_num=QUERIES, patch_size=PATCH,
        auto_map={"AutoConfig": "configuration_minicpm.MiniCPMVConfig", "AutoModel": code},
        image_size=448, slice_mode=True, drop_vision_last_layer=False, vision_config=vision,
        slice_config=dict(max_slice_nums=9, patch_size=PATCH, scale_resolution=112),
    )  # fmt: skip
    write(folder, "config.json", config)
    maps = {
        "AutoProcessor": "processing_minicpmv.MiniCPMVProcessor",
        "AutoImageProcessor": "image_processing_minicpmv.MiniCPMVImageProcessor",
    }
    processing = dict(
        image_processor_type="MiniCPMVImageProcessor", processor_class="MiniCPMVProcessor", auto_map=maps,
        max_slice_nums=9, scale_resolution=112, patch_size=PATCH, image_feature_size=QUERIES, version=2.6,
        use_image_id=True, slice_mode=True,
    )  # fmt: skip
    write(folder, "preprocessor_config.json", processing)
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    config._attn_implementation = attention
    torch.manual_seed(seed)
    model = transformers.AutoModel.from_config(config, trust_remote_code=True)
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    return spread_weights(model, ids, seed=seed), processor


def from_checkpoint(model, folder: Path, where: Path):
    """The same model by `from_pretrained`, the way it comes to its users; skips where that cannot work."""
    if V5:
        pytest.skip(
            "from_pretrained of the published code fails on transformers 5: no 'all_tied_weights_keys', "
            "since its classes never call post_init; from_config, which the other tests use, works"
        )
    where = where / folder.name
    shutil.copytree(folder, where)
    save_file(model.state_dict(), where / "model.safetensors", metadata={"format": "pt"})
    loaded = transformers.AutoModel.from_pretrained(where, trust_remote_code=True, torch_dtype=torch.float32)
    loaded.img_context_token_id = getattr(model, "img_context_token_id", None)
    return loaded.eval()


# ---------------------------------------------------------------- states that must not show

NOTHING = {
    "reduction 0": dict(reduction=0),
    "every merge idle": dict(
        vit_tokens_removed=0, llm_tokens_removed=0, vit_layers=(0, 1), llm_layers=(0, 2)
    ),
}
STATES = (*NOTHING, "removed", "removed after an exception")
MERGING = dict(vit_layers=(0, 1), llm_layers=(0, 2), reduction=0.8)


@contextlib.contextmanager
def state(model, name: str, last_layer: torch.nn.Module, call):
    """Put a model into one of `STATES`: outputs must be those of the model as it was.

    Args:
        last_layer: of its decoder.
        call: something to do while it merges.
    """
    if name in NOTHING:
        with illava.patch(model, **NOTHING[name]):
            yield
        return
    with illava.patch(model, **MERGING) as handle:
        if "exception" in name:
            fail_inside(last_layer, call)
        else:
            call()
            assert handle.report.reduction > 0.6
    yield


def fail_inside(last_layer: torch.nn.Module, call) -> None:
    def fail(*_):
        raise KeyError("failure of the test's own")

    hook = last_layer.register_forward_hook(fail)
    with pytest.raises(KeyError, match="test's own"):
        call()
    hook.remove()


def same(one, other) -> bool:
    """Whether two results, tensors or texts or lists of them, are the same to the last bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other
