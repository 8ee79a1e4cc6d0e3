"""Build a small Qwen2.5-VL (or Qwen2-VL) checkpoint with random weights, offline.

The folder is an ordinary one: the model is the genuine class, and so are its tokenizer, image
processor and video processor, so every tool that takes the path of a checkpoint takes this one:

    python tiny_checkpoint.py tiny-qwen
    AutoProcessor.from_pretrained("tiny-qwen")
    AutoModelForImageTextToText.from_pretrained("tiny-qwen")

It answers nonsense (nobody trained it), at the speed that its shape deserves. The same folder
loads in transformers 4.57 and 5.x, whichever of the two built it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

PROCESSORS = {"qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen2_vl": "Qwen2VLProcessor"}

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# How Qwen cuts text into words before the byte pairs are merged.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Gives the tokenizer a few whole words; bytes cover everything else.
TEXT = """
You are a helpful assistant. Describe this image. Describe this picture in one sentence.
What is in this image? What happens in this video? How many people are in the picture?
The photograph shows a building with a red roof, a green tree and a blue sky above the water.
The video shows a flower with white and yellow petals; the camera moves slowly to the right.
What colour is the flower on the left? Answer with a single word. Yes or no? The answer is no.
"""

# ChatML: <|im_start|>role\n...<|im_end|>\n, with one placeholder for each picture or video, which
# the processor repeats once for each visual token.
CHAT_TEMPLATE = r"""
{%- if messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'video' -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif part['type'] == 'text' -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\n' -}}
{%- endif -%}
""".lstrip()


def build(
    folder: str | Path,
    family: str = "qwen2_5_vl",
    *,
    hidden: int = 64,
    heads: int = 4,
    seed: int = 0,
    vision: Mapping[str, Any] | None = None,
    text: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint with random weights to `folder`, and return the folder.

    Args:
        folder: where to write; created if it does not exist.
        family: "qwen2_5_vl" or "qwen2_vl".
        hidden: width of the encoder and of the language model, 16 layers each.
        heads: attention heads of either; the language model has half as many for keys and values.
        seed: of the random weights; the same seed gives the same weights.
        vision: fields of the encoder's configuration to set otherwise, e.g. `{"depth": 8}`.
        text: the same for the language model, e.g. `{"hidden_size": 256}`.
    """
    if family not in PROCESSORS:
        raise ValueError(f"family={family!r} has no tiny checkpoint; choose one of {', '.join(PROCESSORS)}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    config = _config(family, tokenizer, hidden, heads, vision or {}, text or {})

    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in _processor_files(family).items():
        _write_json(folder / name, content)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    _write_json(folder / "config.json", config)
    _random_model(folder, seed).save_pretrained(folder)
    # save_pretrained wrote the configuration and the generation defaults in the dialect of the
    # installed transformers; these read the same in both.
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", _generation_config(tokenizer))
    return folder


def _tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer with Qwen's special tokens, trained on `TEXT`."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    # After training, as in Qwen: the special tokens follow the ordinary ones.
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL_TOKENS])
    return tokenizer


def _config(
    family: str,
    tokenizer: Tokenizer,
    hidden: int,
    heads: int,
    vision: Mapping[str, Any],
    text: Mapping[str, Any],
) -> dict[str, Any]:
    """config.json as the hub's checkpoints have it: transformers 5 converts `rope_scaling`."""
    text_config = {
        "model_type": f"{family}_text",
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 16,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "vocab_size": tokenizer.get_vocab_size(),
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
        **text,
    }
    # Each pair of rotary dimensions follows time, height or width, in Qwen's 2 : 3 : 3.
    pairs = text_config["hidden_size"] // text_config["num_attention_heads"] // 2
    height = width = 3 * pairs // 8
    text_config.setdefault(
        "rope_scaling",
        {"type": "default", "mrope_section": [pairs - height - width, height, width]},
    )

    vision_config = {
        # 4.57 calls the encoder's configuration like the model's, and 5.x accepts that.
        "model_type": family,
        "depth": 16,
        "num_heads": heads,
        "in_channels": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    # Qwen2-VL says `embed_dim` for the encoder's own width and `hidden_size` for what leaves it.
    if family == "qwen2_vl":
        vision_config |= {
            "embed_dim": hidden,
            "hidden_size": text_config["hidden_size"],
            "mlp_ratio": 2,
        }
    else:
        vision_config |= {
            "hidden_size": hidden,
            "out_hidden_size": text_config["hidden_size"],
            "intermediate_size": 2 * hidden,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15],
            "tokens_per_second": 2,
        }
    return {
        "model_type": family,
        "architectures": [
            {"qwen2_5_vl": "Qwen2_5_VL", "qwen2_vl": "Qwen2VL"}[family] + "ForConditionalGeneration"
        ],
        "tie_word_embeddings": False,
        "dtype": "float32",
        "image_token_id": tokenizer.token_to_id("<|image_pad|>"),
        "video_token_id": tokenizer.token_to_id("<|video_pad|>"),
        "vision_start_token_id": tokenizer.token_to_id("<|vision_start|>"),
        "vision_end_token_id": tokenizer.token_to_id("<|vision_end|>"),
        "vision_config": vision_config | dict(vision),
        "text_config": text_config,
    }


def _generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """End at <|im_end|>, pad with <|endoftext|>, as Qwen's chat models do; never sample."""
    end, text_end = (tokenizer.token_to_id(t) for t in ("<|im_end|>", "<|endoftext|>"))
    return {
        "bos_token_id": text_end,
        "eos_token_id": [end, text_end],
        "pad_token_id": text_end,
        "do_sample": False,
    }


def _processor_files(family: str) -> dict[str, dict[str, Any]]:
    """The JSON files that AutoProcessor reads, by name; the pixel limits are Qwen2.5-VL's own."""
    pixels = {
        "processor_class": PROCESSORS[family],
        # 5.x drops the "Fast"; without it, 4.57 warns about its choice.
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16384},
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    frames = {
        **{key: value for key, value in pixels.items() if key != "image_processor_type"},
        "video_processor_type": "Qwen2VLVideoProcessor",
        "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 768},
        # Some 5.x releases warn until this is said; others have never heard of it.
        "cap_pixels_per_frame": False,
    }
    return {
        "preprocessor_config.json": pixels,
        "video_preprocessor_config.json": frames,
        "tokenizer_config.json": {
            "processor_class": PROCESSORS[family],
            "tokenizer_class": "Qwen2Tokenizer",
            "add_bos_token": False,
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": None,
            "model_max_length": 32768,
            "clean_up_tokenization_spaces": False,
        },
    }


def _random_model(folder: Path, seed: int) -> nn.Module:
    """The model that config.json in `folder` describes; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
        torch.manual_seed(seed)  # again: how much the constructor draws depends on the release
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.Embedding):
                    module.weight.normal_()
                # transformers' own standard deviation, 0.02, makes attention uniform at this width
                # and tokens all alike; scaled to the fan-in, every layer's output has unit size.
                elif isinstance(module, (nn.Linear, nn.Conv3d)):
                    fan_in = module.weight[0].numel()
                    module.weight.normal_(std=fan_in**-0.5)
    return model.eval()


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    """Command line: `python tiny_checkpoint.py FOLDER`."""
    parser = argparse.ArgumentParser(
        description="Build a small vision-language checkpoint with random weights, offline.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="where to write the checkpoint")
    parser.add_argument("--family", choices=PROCESSORS, default="qwen2_5_vl", help="which model")
    parser.add_argument("--hidden", type=int, default=64, help="width of encoder and LLM")
    parser.add_argument("--heads", type=int, default=4, help="attention heads of encoder and LLM")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights")
    options = parser.parse_args()
    folder = build(
        options.folder,
        options.family,
        hidden=options.hidden,
        heads=options.heads,
        seed=options.seed,
    )
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    print(f"{folder}: {options.family}, {size:.1f} MB, random weights (seed {options.seed})")


if __name__ == "__main__":
    main()
