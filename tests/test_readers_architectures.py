"""The readers before they are trained: tokenizer, prompts, weights, and folders that every version reads."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import illava
from readers import architectures

WORDS = ["what", "which", "digit", "is", "red", "the", "three", "seven", "nothing", "?", "what"]
FAMILIES = pytest.mark.parametrize("family", architectures.FAMILIES)
# What the processor takes beside a conversation: 5 wants it in a dictionary of its own, 4.57 as it is.
PADDING = {"processor_kwargs": {"padding": True}} if architectures.V5 else {"padding": True}


@functools.cache
def reader(family):
    return architectures.build(family, WORDS)


def pixels(*shape):
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


def picture(width, height):
    return {"type": "image", "image": Image.fromarray(pixels(height, width))}


def asked(*parts, text="Which digit is red?"):
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def inputs_of(processor, conversation):
    batch = PADDING if isinstance(conversation[0], list) else {}
    return processor.apply_chat_template(
        conversation,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **batch,
    )


def visual(model, inputs):
    """Visual tokens in each row."""
    names = ("image_token_id", "video_token_id")
    ids = [getattr(model.config, name) for name in names if hasattr(model.config, name)]
    return torch.isin(inputs["input_ids"], torch.tensor(ids)).sum(1).tolist()


@FAMILIES
def test_words_come_back(family):
    tokens = architectures.tokenizer(family, WORDS)
    for text in ("lamp", "three seven", "q7x", "nothing", "what is the red digit?"):
        assert tokens.decode(tokens(text).input_ids) == text
    assert tokens.tokenize("What lamp?") == ["what", "l", "##a", "##m", "##p", "?"]
    assert tokens.tokenize("redo") == ["red", "##o"]
    assert tokens.tokenize("three<|im_end|>") == ["three", "<|im_end|>"]
    assert tokens.decode(tokens("three é").input_ids, skip_special_tokens=True) == "three"
    ids = tokens("three<|im_end|>").input_ids
    assert tokens.decode(ids, skip_special_tokens=True) == "three"


def test_a_word_that_would_be_split_is_refused():
    with pytest.raises(ValueError, match="'Red' is not one word"):
        architectures.tokenizer("internvl", ["what", "Red"])
    with pytest.raises(ValueError, match="'left of' is not one word"):
        architectures.tokenizer("qwen2_5_vl", ["left of"])


@FAMILIES
def test_a_prompt_is_short(family):
    model, processor = reader(family)
    inputs = inputs_of(processor, asked(picture(96, 96)))
    written = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    marks = {"qwen2_5_vl": ("<|vision_start|>", "<|vision_end|>"), "internvl": ("<img>", "</img>")}[family]
    holder = processor.tokenizer.convert_ids_to_tokens(model.config.image_token_id)
    assert [token for token in written if token != holder] == [
        "<|im_start|>", "user", *marks, "which", "digit", "is", "red", "?", "<|im_end|>",
        "<|im_start|>", "assistant",
    ]  # fmt: skip
    plain = processor.apply_chat_template([{"role": "user", "content": "what?"}])
    assert plain == "<|im_start|>user\nwhat?<|im_end|>\n"


@FAMILIES
def test_visual_tokens_of_each_size(family):
    model, processor = reader(family)
    # width, height: tokens of Qwen2.5-VL and of InternVL
    sizes = {
        (192, 192): (144, 180), (96, 96): (36, 36), (128, 128): (64, 36), (135, 135): (64, 36),
        (136, 136): (64, 180), (192, 96): (72, 108), (384, 384): (576, 180), (32, 32): (16, 36),
    }  # fmt: skip
    for size, tokens in sizes.items():
        expected = tokens[architectures.FAMILIES.index(family)]
        assert visual(model, inputs_of(processor, asked(picture(*size)))) == [expected], size


@FAMILIES
def test_several_pictures_videos_and_batches(family):
    model, processor = reader(family)
    frames = pixels(8, 96, 96)
    video = {"type": "video", "video": frames}
    as_list = {"type": "video", "video": [Image.fromarray(frame) for frame in frames]}
    shown = 4 * 36 if family == "qwen2_5_vl" else 8 * 36
    whole = {"qwen2_5_vl": 144, "internvl": 180}[family]
    assert visual(model, inputs_of(processor, asked(picture(96, 96), picture(192, 192)))) == [36 + whole]
    one, other = (inputs_of(processor, asked(each)) for each in (video, as_list))
    assert visual(model, one) == [shown]
    for name in one:
        assert torch.equal(torch.as_tensor(one[name]), torch.as_tensor(other[name])), name
    rows = [asked(picture(192, 192)), asked(video), asked(text="what is red?")]  # 4.57 takes lists only
    batch = inputs_of(processor, rows)
    assert visual(model, batch) == [whole, shown, 0]
    assert batch["attention_mask"][:, -1].all()  # padded on the left
    assert not batch["attention_mask"][2, 0]
    answers = model.generate(**batch, max_new_tokens=3)
    assert answers.shape[1] <= batch["input_ids"].shape[1] + 3
    assert processor.batch_decode(answers[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def test_frames_have_a_token_each():
    model, processor = reader("internvl")
    inputs = inputs_of(processor, asked({"type": "video", "video": pixels(16, 96, 96)}))
    written = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    assert [token for token in written if token.startswith("Frame")] == list(architectures.FRAMES)
    # user's 2, the question's 5, 3 to end and begin, and of each frame its number, its tile and two marks
    assert len(written) == 2 + 5 + 3 + 16 * (1 + 36 + 2)


@pytest.mark.skipif(not architectures.V5, reason="4.57 puts patches in time at least 12 positions apart")
def test_patches_in_time_are_one_position_apart():
    model, processor = reader("qwen2_5_vl")
    inputs = inputs_of(processor, asked({"type": "video", "video": pixels(8, 96, 96)}))
    inputs.pop("pixel_values_videos")
    positions, _ = model.model.get_rope_index(**inputs)
    shown = inputs["input_ids"][0] == model.config.video_token_id
    assert positions[0, 0, shown].unique().tolist() == [3, 4, 5, 6]


@FAMILIES
def test_weights_are_seeded_and_sized(family):
    state = torch.get_rng_state()
    model, _ = architectures.build(family, WORDS, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(5)
    again, other = (architectures.build(family, WORDS, seed=seed)[0] for seed in (1, 2))
    assert sum(weight.numel() for weight in model.parameters()) <= 10e6
    assert model.lm_head.weight is model.get_input_embeddings().weight
    same = dict(again.named_parameters())
    changed = dict(other.named_parameters())
    for name, weight in model.named_parameters():
        assert torch.equal(weight, same[name])
        if name.endswith("position_embeddings"):
            assert torch.equal(weight, changed[name])  # waves, not drawn
        elif weight.ndim > 1:
            assert not torch.equal(weight, changed[name])
            assert weight.std() > 0.01  # nothing was left out
        else:
            expected = 0.0 if name.endswith("bias") else 1.0
            assert (weight == expected).all(), name
    _, processor = reader(family)
    with torch.no_grad():
        logits = model(**inputs_of(processor, asked(picture(192, 192)))).logits
    assert 0.5 < logits.std() < 2


@FAMILIES
def test_a_folder_gives_the_model_back(family, tmp_path):
    model, processor = reader(family)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    architectures.save(model, processor, tmp_path)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 20e6
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    read = transformers.AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert type(read) is type(processor)
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokens.tokenize("lamp?") == ["l", "##a", "##m", "##p", "?"]
    rows = [
        asked(picture(192, 96), picture(96, 96)),
        asked({"type": "video", "video": pixels(4, 96, 96)}, text="what is lamp?"),
    ]
    inputs, again = inputs_of(processor, rows), inputs_of(read, rows)
    assert set(inputs) == set(again)
    for name, values in inputs.items():
        assert torch.equal(torch.as_tensor(values), torch.as_tensor(again[name])), name
    rounded = architectures.build(family, WORDS)[0]
    rounded.load_state_dict({name: weight.bfloat16().float() for name, weight in before.items()})
    with torch.no_grad():
        expected, found = rounded(**inputs).logits, loaded(**again).logits
        rough = model(**inputs).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, rough, atol=0.1, rtol=0.1)
    settings = loaded.generation_config
    assert settings.eos_token_id == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (settings.pad_token_id, settings.max_new_tokens, settings.do_sample) == (0, 16, False)
    answer = loaded.generate(**again)
    assert torch.equal(answer, rounded.generate(**inputs))


@FAMILIES
def test_illava_merges(family):
    model, processor = reader(family)
    inputs = inputs_of(processor, asked(picture(192, 192)))
    with illava.patch(model, reduction=0.778) as handle, torch.no_grad():
        logits = model(**inputs).logits
        model.generate(**inputs, max_new_tokens=2)
    assert logits.isfinite().all()
    assert handle.report


@pytest.mark.parametrize("source", architectures.FAMILIES)
def test_a_family_borrows_the_other_ones_language_model(source, tmp_path):
    (target,) = set(architectures.FAMILIES) - {source}
    given, processor = reader(source)
    architectures.save(given, processor, tmp_path, dtype=torch.float32)
    model, tokens = architectures.build(target, WORDS, seed=3)
    untouched = {name: weight.clone() for name, weight in model.named_parameters()}
    taken = set(architectures.borrow(model, tmp_path))
    theirs = dict(given.named_parameters())
    for name, weight in model.named_parameters():
        if name.endswith("embed_tokens.weight"):
            assert name in taken
            for word in ("<|im_end|>", "a", "##z", "user", "red", "?"):
                here, there = (x.tokenizer.convert_tokens_to_ids(word) for x in (tokens, processor))
                assert torch.equal(weight[here], theirs[name][there]), word
        elif name.startswith("model.language_model."):
            assert name in taken
            assert torch.equal(weight, theirs[name])
        else:
            assert name not in taken
            assert torch.equal(weight, untouched[name])


@FAMILIES
def test_a_reader_of_the_same_family_is_taken_over_whole(family, tmp_path):
    given, processor = reader(family)
    architectures.save(given, processor, tmp_path, dtype=torch.float32)
    model = architectures.build(family, WORDS, seed=3)[0]
    architectures.borrow(model, tmp_path)
    for (name, weight), source in zip(model.named_parameters(), given.parameters(), strict=True):
        assert torch.equal(weight, source), name
