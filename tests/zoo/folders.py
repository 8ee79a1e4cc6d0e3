"""The zoo's models as checkpoint folders, with processor and chat template: what users load."""

from __future__ import annotations

import copy
from pathlib import Path

from tokenizers import processors

import zoo

_QWEN = ("", "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>", "")
_MINICPM = ("", "<|image_pad|>", "<|video_pad|>", "")
# What opens a turn, its picture, its video, what closes it: as the chat templates of the real checkpoints, as
# far as the zoo's vocabularies go. LLaVA-NeXT's begins with the token that its tokenizer begins every text
# with, as that of the Llama 3 checkpoint does: it must not be there twice.
_TURNS = {
    "internvl": ("<|im_start|> ", "<IMG_CONTEXT>\n", "<video>\n", "<|im_end|>\n"),
    "llava_onevision": ("<|im_start|> ", "<image>\n", "<video>\n", "<|im_end|>\n"),
    "llava_next": ("<s> [INST] ", "<image>\n", "", " [/INST]\n"),
    "minicpmv4_6": _MINICPM,
    "minicpmv4_7": _MINICPM,
}
_TEMPLATE = """
{{%- for message in messages -%}}
{{{{- {opening!r} -}}}}
{{%- for part in message['content'] -%}}
{{%- if part['type'] == 'image' -%}}{{{{- {image!r} -}}}}
{{%- elif part['type'] == 'video' -%}}{{{{- {video!r} -}}}}
{{%- else -%}}{{{{- ' ' + part['text'] + ' ' -}}}}
{{%- endif -%}}
{{%- endfor -%}}
{{{{- {closing!r} -}}}}
{{%- endfor -%}}
"""


def write(family: str, folder: Path) -> Path:
    """Save a family's small model and processor as `from_pretrained` reads them, and return the folder."""
    module = zoo.FAMILIES[family]
    opening, image, video, closing = _TURNS.get(family, _QWEN)
    processor = copy.deepcopy(module.processor())
    processor.chat_template = _TEMPLATE.format(opening=opening, image=image, video=video, closing=closing)
    tokens = processor.tokenizer
    tokens.init_kwargs["model_input_names"] = tokens.model_input_names  # 4.57 would not save them
    if opening.startswith("<s>"):
        tokens.bos_token = "<s>"
        begin = [("<s>", tokens.convert_tokens_to_ids("<s>"))]
        tokens.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, begin)
    module.build().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
