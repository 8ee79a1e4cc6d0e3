"""A patched model where people already are: transformers' pipeline, and TRL with PEFT."""

import base64
import io
import math

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

import illava
import tiny_checkpoint


@pytest.fixture
def loaded(tmp_path):
    folder = tiny_checkpoint.build(tmp_path / "tiny")
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def photograph(width, height):
    return Image.fromarray(load_sample_image("china.jpg")).resize((width, height))


def asked(*pictures, text="what is this?"):
    content = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def test_a_pipeline_says_what_the_patched_model_says(loaded, tmp_path):
    model, processor = loaded
    photograph(140, 112).save(tmp_path / "picture.png")
    with illava.patch(model, reduction=0.778) as handle:
        pipe = pipeline("image-text-to-text", model=model, processor=processor)
        (made,) = pipe(
            text=asked(str(tmp_path / "picture.png")), return_full_text=False,
            generate_kwargs={"max_new_tokens": 5, "do_sample": False},
        )  # fmt: skip
        piped = handle.report.pictures
        inputs = processor.apply_chat_template(
            asked(photograph(140, 112)), tokenize=True, add_generation_prompt=True, return_dict=True,
            return_tensors="pt",
        )  # fmt: skip
        ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        assert made["generated_text"] == processor.decode(ids[0], skip_special_tokens=True)
        assert piped == handle.report.pictures
        assert piped[0].final_tokens < piped[0].tokens == 20


def test_a_pipeline_over_many(loaded):
    model, processor = loaded
    conversations = [asked(photograph(56 + 28 * i, 84), text="what " + "now " * i) for i in range(3)]
    options = {"return_full_text": False, "generate_kwargs": {"max_new_tokens": 3, "do_sample": False}}
    with illava.patch(model, reduction=0.667):
        pipe = pipeline("image-text-to-text", model=model, processor=processor)
        together = pipe(text=conversations, **options)
        alone = [pipe(text=conversation, **options) for conversation in conversations]
    assert [made[0]["generated_text"] for made in together] == [made[0]["generated_text"] for made in alone]


@pytest.mark.slow
def test_trl_and_peft_teach_a_patched_model(loaded, tmp_path):
    """Supervised fine-tuning of LoRA adapters, the model merging all the while, and served merging after."""
    pytest.importorskip("trl", reason="needs TRL: pip install trl datasets")
    import datasets
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    model, processor = loaded
    words = ("a house", "a tower", "a roof", "a tree")
    examples = [
        {
            "images": [photograph(84 + 28 * (i % 3), 84)],
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"what is {i} ?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": words[i]}]},
            ],
        }
        for i in range(4)
    ]
    base = {name: value.clone() for name, value in model.state_dict().items()}
    handle = illava.patch(model, reduction=0.778)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(tmp_path / "out"), max_steps=30, per_device_train_batch_size=4,
            learning_rate=2e-2, lr_scheduler_type="constant", logging_steps=1, report_to="none",
            save_strategy="no", use_cpu=True, bf16=False, max_length=None, seed=0,
            gradient_checkpointing=False,  # TRL's default; illava refuses it and says so
        ),
        train_dataset=datasets.Dataset.from_list(examples),
        processing_class=processor,
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    )  # fmt: skip
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 30
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    assert handle.active
    assert len(handle.report.pictures) == 4
    assert all(picture.final_tokens < picture.tokens for picture in handle.report.pictures)
    handle.remove()
    unloaded = trainer.model.unload()
    assert all(torch.equal(value, base[name]) for name, value in unloaded.state_dict().items())


def test_a_picture_as_the_pipeline_takes_it_from_the_web(loaded):
    """Base64 in the conversation, as clients send it."""
    model, processor = loaded
    file = io.BytesIO()
    photograph(84, 84).save(file, "png")
    data = base64.b64encode(file.getvalue()).decode()
    with illava.patch(model, reduction=0.5) as handle:
        pipe = pipeline("image-text-to-text", model=model, processor=processor)
        pipe(text=asked(f"data:image/png;base64,{data}"), max_new_tokens=2)
        assert handle.report.pictures[0].tokens == 9
