"""Small models of two real classes, with tokenizer and processor, built to be trained from scratch.

Both families see pictures in units of 16 pixels (2 x 2 patches of 8) and answer in words; they differ as the
real ones do:

* `qwen2_5_vl`: any size in one piece, windows of 4 x 4 units in half of the encoder's blocks, positions in
  time, height and width. A picture of H x W pixels is H/16 · W/16 visual tokens, from 4 x 4 to 24 x 24 units;
  192 x 192 pixels are 144. Multiples of 16 pixels are left as they are, others rounded to them. Two video
  frames make one patch in time: 8 frames of 96 x 96 pixels are 4 · 36 tokens.
* `internvl`: tiles of 96 x 96 pixels, 36 tokens each. GotOcr2's image processor takes the grid of up to
  four tiles whose shape is nearest to the picture's, and of two equal shapes the larger one if the picture
  has more than half its pixels (`get_optimal_tiled_canvas`). A square picture therefore is one tile up to
  135 x 135 pixels (128 x 128 is shrunk into one tile, 36 tokens), and from 136 x 136 on, 192 x 192 among
  them, 2 x 2 tiles and a thumbnail of the whole: 180 tokens. A video frame is one tile.

A prompt has no system message: `<|im_start|>user`, picture, question, `<|im_end|>`, `<|im_start|>assistant`.
"""

from __future__ import annotations

import copy
import json
import string
from pathlib import Path

import torch
import transformers
from packaging.version import Version
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from readers.initial import initialize

FAMILIES = ("qwen2_5_vl", "internvl")
V5 = Version("5") <= Version(transformers.__version__)

PAD, START, END, UNKNOWN = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "[UNK]"
INPUTS = ["input_ids", "attention_mask"]  # 4.57 adds token_type_ids, which no model takes
ROLES = ("system", "user", "assistant")
MOST_FRAMES = 16  # frames of InternVL that have one token for their number; more are spelled
UNIT, TILE = 16, 96  # pixels
TILE_TOKENS = (TILE // UNIT) ** 2
WIDTH, LAYERS = 192, 8  # of the language model
ROPE_THETA = 10000.0
# Of the 16 frequencies of a head, 4 turn with time, 6 with height, 6 with width.
ROPE = {
    "qwen2_5_vl": {"type": "mrope", "rope_type": "default", "mrope_section": [4, 6, 6]},
    "internvl": None,
}
# Positions in time that a second of video takes. transformers 5 takes a video without metadata for 24 frames
# a second: at 12, its patches in time, two frames each, are one position apart, as rows are. Metadata of 2
# frames a second put them 12 apart; so does 4.57 always, which knows no patches shorter than a second.
TOKENS_PER_SECOND = 12

# The tokens of each family that its processor writes, and the names by which it asks the tokenizer for them.
NAMED = {
    "qwen2_5_vl": {
        "image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
        "vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>",
    },
    "internvl": {
        "start_image_token": "<img>", "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>",
    },
}  # fmt: skip
FRAMES = tuple(f"Frame{i + 1}:" for i in range(MOST_FRAMES))

# As the families' own templates, without their system prompts. What a picture is written as is filled in.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ 'IMAGE' }}{% elif part['type'] == 'video' %}{{ 'VIDEO' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WRITTEN = {
    "qwen2_5_vl": [f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video")],
    "internvl": ["<IMG_CONTEXT>\n", "<video>\n"],
}


def _special(family: str) -> list[str]:
    """A family's special tokens, the first of its vocabulary; the first four are in every family's."""
    return [PAD, START, END, UNKNOWN, *NAMED[family].values(), *(FRAMES if family == "internvl" else ())]


def tokenizer(family: str, words):
    """A WordPiece tokenizer: whole words where it knows them, and else their letters.

    Text is lower-cased and split at spaces and punctuation. The vocabulary is the family's special tokens,
    every letter and digit, at the start of a word and, as `##a`, inside one, the roles, and `words`. The
    longest known beginning wins: "lamp" is `l ##a ##m ##p`, but "redo" is `red ##o` if "red" is a word.

    Args:
        words: whole words, lower case, each in one piece when split; repetitions are dropped, order counts.
    """
    special = _special(family)
    letters = string.ascii_lowercase + string.digits
    ordered = dict.fromkeys([*special, *letters, *(f"##{x}" for x in letters), *ROLES, *words])
    backend = Tokenizer(models.WordPiece({word: i for i, word in enumerate(ordered)}, unk_token=UNKNOWN))
    backend.normalizer = normalizers.BertNormalizer(strip_accents=False, lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    for word in words:
        if len(backend.encode(word, add_special_tokens=False).ids) != 1:
            raise ValueError(f"{word!r} is not one word: it is split, or not lower case")
    # The Qwen processors of 4.57 insist on this class. It takes the backend as it is.
    kind = transformers.PreTrainedTokenizerFast if V5 else transformers.Qwen2TokenizerFast
    made = kind(
        tokenizer_object=backend, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, padding_side="left",
        extra_special_tokens=NAMED[family], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    made.add_tokens(special, special_tokens=True)
    made.model_input_names = INPUTS
    image, video = WRITTEN[family]
    made.chat_template = TEMPLATE.replace("IMAGE", image).replace("VIDEO", video)
    return made


def build(family: str, words, *, seed: int = 0):
    """A model with random weights, float32, in eval mode, and its processor.

    Args:
        words: as for `tokenizer`.
        seed: of the weights; torch's own random state is neither read nor changed.
    """
    tokens = tokenizer(family, words)
    config, processor = {"qwen2_5_vl": _qwen, "internvl": _internvl}[family](tokens)
    kind = {
        "qwen2_5_vl": transformers.Qwen2_5_VLForConditionalGeneration,
        "internvl": transformers.InternVLForConditionalGeneration,
    }[family]
    with torch.random.fork_rng(devices=[]):
        model = kind._from_config(config, attn_implementation="sdpa", dtype=torch.float32).eval()
    initialize(model, seed)
    model.generation_config = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=16, eos_token_id=tokens.eos_token_id, pad_token_id=tokens.pad_token_id
    )
    return model, processor


def _text(family: str, tokens) -> dict:
    """The language model's config, which both families share."""
    return dict(
        vocab_size=len(tokens), hidden_size=WIDTH, intermediate_size=512, num_hidden_layers=LAYERS,
        num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=8192, tie_word_embeddings=True,
        rope_theta=ROPE_THETA, rope_scaling=copy.deepcopy(ROPE[family]),  # configs write into it
        bos_token_id=tokens.pad_token_id, eos_token_id=tokens.eos_token_id, pad_token_id=tokens.pad_token_id,
    )  # fmt: skip


def _qwen(tokens):
    """Config and processor of the Qwen2.5-VL."""
    vision = dict(
        depth=8, hidden_size=128, num_heads=4, intermediate_size=384, out_hidden_size=WIDTH,
        patch_size=UNIT // 2, spatial_merge_size=2, temporal_patch_size=2, window_size=4 * UNIT,
        fullatt_block_indexes=[1, 3, 5, 7], tokens_per_second=TOKENS_PER_SECOND,
    )  # fmt: skip
    ids = tokens.convert_tokens_to_ids
    config = transformers.Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=_text("qwen2_5_vl", tokens),
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )  # fmt: skip
    settings = dict(
        patch_size=UNIT // 2, merge_size=2, temporal_patch_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3,
        size={"shortest_edge": (4 * UNIT) ** 2, "longest_edge": (24 * UNIT) ** 2},
    )  # fmt: skip
    image = transformers.Qwen2VLImageProcessor if V5 else transformers.Qwen2VLImageProcessorFast
    # transformers 5 warns unless it is told whether to cap the pixels of a frame; 4.57 has no cap.
    video = transformers.Qwen2VLVideoProcessor(
        **settings, do_sample_frames=False, **({"cap_pixels_per_frame": False} if V5 else {})
    )
    return config, transformers.Qwen2_5_VLProcessor(
        image_processor=image(**settings), tokenizer=tokens, video_processor=video,
        chat_template=tokens.chat_template,
    )  # fmt: skip


def _internvl(tokens):
    """Config and processor of the InternVL."""
    vision = dict(
        hidden_size=128, num_hidden_layers=8, num_attention_heads=4, intermediate_size=512,
        image_size=[TILE, TILE], patch_size=[UNIT // 2, UNIT // 2], attention_bias=True, use_qk_norm=False,
        norm_type="layer_norm", use_absolute_position_embeddings=True, layer_scale_init_value=1.0,
    )  # fmt: skip
    config = transformers.InternVLConfig(
        vision_config=vision,
        text_config=_text("internvl", tokens) | dict(model_type="qwen2"),
        image_token_id=tokens.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=TILE_TOKENS,
        downsample_ratio=0.5,
        tie_word_embeddings=True,
    )
    settings = dict(size={"height": TILE, "width": TILE}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    # Checkpoints ask for the one that computes in torch, which 4.57 calls fast.
    image = transformers.GotOcr2ImageProcessor if V5 else transformers.GotOcr2ImageProcessorFast
    return config, transformers.InternVLProcessor(
        image_processor=image(crop_to_patches=True, min_patches=1, max_patches=4, **settings),
        tokenizer=tokens,
        video_processor=transformers.InternVLVideoProcessor(do_sample_frames=False, **settings),
        image_seq_length=TILE_TOKENS,
        chat_template=tokens.chat_template,
    )


@torch.no_grad()
def borrow(model, folder) -> list[str]:
    """Take over what a checkpoint, also of the other family, has under the same name and in the same shape.

    The families name their language models alike, and with the same `words` their vocabularies differ in some
    special tokens only: all other embeddings are taken over too. Returns the names of what was taken.
    """
    other = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True
    )
    theirs, taken = dict(other.named_parameters()), []
    same_family = model.config.model_type == other.config.model_type
    ours, their_own = (len(_special(x.config.model_type)) for x in (model, other))
    for name, weight in model.named_parameters():
        if (source := theirs.get(name)) is None:
            continue
        other_tokens = name.endswith("embed_tokens.weight") and not same_family
        if other_tokens and len(weight) - ours == len(source) - their_own:
            weight[:4], weight[ours:] = source[:4], source[their_own:]
        elif weight.shape == source.shape:
            weight.copy_(source)
        else:
            continue
        taken.append(name)
    return taken


def save(model, processor, folder, *, dtype=torch.bfloat16) -> None:
    """Write an ordinary checkpoint folder, which transformers 4.57 and 5 read alike, whichever wrote it.

    Args:
        dtype: of the weights in the folder; those of `model` stay as they are.
    """
    folder = Path(folder)
    copy.deepcopy(model).to(dtype).save_pretrained(folder)
    processor.save_pretrained(folder)

    def edit(name, change):
        if (file := folder / name).exists():
            content = json.loads(file.read_text())
            change(content)
            file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")

    family = model.config.model_type

    def config(content):
        # transformers 5 calls these `rope_parameters`. 4.57 reads the two older names, and so does 5.
        content["text_config"] |= {"rope_theta": ROPE_THETA, "rope_scaling": ROPE[family]}

    def tokens(content):
        # Each version writes a class that the other lacks, or builds a byte-level tokenizer for.
        content |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": INPUTS}
        content["extra_special_tokens"] = NAMED[family]

    def processors(content):
        # Else 4.57 takes the image processor that computes in numpy.
        image = content.get("image_processor", content)
        if (kind := image.get("image_processor_type")) and not kind.endswith("Fast"):
            image["image_processor_type"] = f"{kind}Fast"

    edit("config.json", config)
    edit("tokenizer_config.json", tokens)
    edit("processor_config.json", processors)
