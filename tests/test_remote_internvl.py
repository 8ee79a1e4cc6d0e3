"""InternVL 2.5 by its published code: nothing changes where nothing should; merging is the native model's.

The same weights in transformers' own `InternVLForConditionalGeneration`, patched with the same plan, give the
same logits, the same ids and the same report. That model is checked against a reference of its own elsewhere.
"""

import threading

import pytest
import remote_code as remote
import torch
import transformers

import illava
from contract.one_hot import same_provenance
from contract.tools import trace

pytestmark = pytest.mark.family("internvl_chat")

TILE_TOKENS = 16
LAYERS = dict(vit_layers=(0, 1, 2), llm_layers=(0, 2))
PLANS = {
    "default": dict(reduction=0.778),
    "paper": dict(reduction=0.667, merge="recycle"),
    "deep": dict(reduction=0.889, merge="recycle", recycled=0.3, members=3),
    "encoder alone": dict(vit_layers=(1, 3), llm_layers=(), reduction=0.6, merge="recycle"),
    "decoder alone": dict(vit_layers=(), llm_layers=(1, 3), reduction=0.8, merge="recycle", queries="all"),
    "prune": dict(reduction=0.778, merge="prune"),
    "linear": dict(reduction=0.778, merge="linear", queries="visual"),
    "lse": dict(reduction=0.667, merge="recycle", score="lse"),
    "bipartite": dict(reduction=0.778, merge="recycle", vit_merge="bipartite", distance_penalty=0.0),
    "ratios": dict(vit_keep_ratio=0.7, llm_keep_ratio=0.6, merge="recycle", queries="last"),
}
START, END = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
# A number is a picture of so many tiles.
ROWS = {
    "one picture": [[START, 3, "\nWhat is this?", END]],
    "several pictures": [[START, "Image-1: ", 2, "\nImage-2: ", 1, "\nImage-3: ", 4, "\nWhich?", END]],
    "video": [[START, "Frame1: ", 1, "\nFrame2: ", 1, "\nFrame3: ", 1, "\nWhat happens?", END]],
    "picture at the end": [[START, "See ", 1, " and ", 2]],
    "batch": [
        [START, 3, "\nWhat is in the picture?", END],
        [START, "How many people?", END],
        [START, "Both ", 1, " and ", 2, "?", END],
    ],
}


@pytest.fixture(scope="module")
def loaded(remote_code):
    return remote.internvl(remote_code("internvl2_5_qwen2"))


@pytest.fixture(scope="module")
def model(loaded):
    return loaded[0]


@pytest.fixture(scope="module")
def tokenizer(loaded):
    return loaded[1]


def tiles(number, seed=0):
    generator = torch.Generator().manual_seed(seed + 100 * number)
    return torch.randn(number, 3, 112, 112, generator=generator)


def prompt(tokenizer, *rows):
    """Inputs as `batch_chat` makes them: rows padded on the left, the tiles of all rows stacked."""
    texts = [
        "".join(f"<img>{'<IMG_CONTEXT>' * TILE_TOKENS * p}</img>" if isinstance(p, int) else p for p in row)
        for row in rows
    ]
    tokenizer.padding_side = "left"
    text = tokenizer(texts, return_tensors="pt", padding=True)
    pictures = [p for row in rows for p in row if isinstance(p, int)]
    pixels = torch.cat([tiles(n, seed) for seed, n in enumerate(pictures)]) if pictures else None
    return {"pixel_values": pixels, "input_ids": text["input_ids"], "attention_mask": text["attention_mask"]}


def row_alone(inputs, row):
    """One row of a batch, without the padding ahead of it."""
    ahead = int(inputs["attention_mask"][row].argmax())
    is_tile = inputs["input_ids"] == 256 + remote.INTERNVL.index("<IMG_CONTEXT>")
    counts = (is_tile.sum(1) // TILE_TOKENS).tolist()
    pixels = inputs["pixel_values"].split(counts)[row]
    return {
        "pixel_values": pixels if len(pixels) else None,
        "input_ids": inputs["input_ids"][row : row + 1, ahead:],
        "attention_mask": inputs["attention_mask"][row : row + 1, ahead:],
    }


def forward(model, inputs, **extra):
    flags = torch.ones(len(inputs["pixel_values"]), 1, dtype=torch.long)
    return model(**inputs, image_flags=flags, return_dict=True, **extra)


def logits_of(model, inputs):
    with torch.no_grad():
        return forward(model, inputs).logits


def generate(model, inputs, tokens=6, **extra):
    """Ids of the new tokens, `[rows, tokens]`."""
    extra = dict(do_sample=False, pad_token_id=0) | extra
    return model.generate(**inputs, max_new_tokens=tokens, **extra)


# ---------------------------------------------------------------- against transformers' own model


def native(model, blocks=4):
    """The same weights in `InternVLForConditionalGeneration`, of its encoder the first blocks."""
    vision = model.config.vision_config
    plain = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=blocks, num_attention_heads=4,
        image_size=[112, 112], patch_size=[14, 14], norm_type=vision.norm_type,
        attention_bias=vision.qkv_bias, use_qk_norm=vision.qk_normalization,
        layer_norm_eps=vision.layer_norm_eps,
    )  # fmt: skip
    text = model.config.llm_config.to_dict() | {"model_type": "qwen2"}
    config = transformers.InternVLConfig(
        vision_config=plain, text_config=text, image_token_id=model.img_context_token_id,
        image_seq_length=TILE_TOKENS, tie_word_embeddings=False,
    )  # fmt: skip
    kind = transformers.InternVLForConditionalGeneration
    other = kind._from_config(config, attn_implementation="eager").eval()
    weights = {}
    for name, weight in model.state_dict().items():
        if name.startswith("vision_model.encoder.layers.") and int(name.split(".")[3]) >= blocks:
            continue
        for old, new in NAMES:
            name = name.replace(old, new)
        if ".qkv." in name:
            for part, piece in zip("qkv", weight.chunk(3), strict=True):
                weights[name.replace(".qkv.", f".{part}_proj.")] = piece
        else:
            weights[name] = weight
    missing, unexpected = other.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all("mask_token" in name for name in missing)
    other.generation_config.eos_token_id = None
    return other


NAMES = (
    ("vision_model.encoder.layers", "model.vision_tower.encoder.layer"),
    ("vision_model.embeddings.patch_embedding", "model.vision_tower.embeddings.patch_embeddings.projection"),
    ("vision_model.embeddings.class_embedding", "model.vision_tower.embeddings.cls_token"),
    ("vision_model.embeddings.position_embedding", "model.vision_tower.embeddings.position_embeddings"),
    (".attn.proj.", ".attention.projection_layer."),
    (".attn.", ".attention."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".ls1", ".lambda_1"),
    (".ls2", ".lambda_2"),
    ("mlp1.0.", "model.multi_modal_projector.layer_norm."),
    ("mlp1.1.", "model.multi_modal_projector.linear_1."),
    ("mlp1.3.", "model.multi_modal_projector.linear_2."),
    ("language_model.lm_head", "lm_head"),
    ("language_model.model", "model.language_model"),
)


@pytest.fixture(scope="module", params=["small encoder", "norms on queries and keys"])
def pair(request, remote_code):
    """The published model and transformers' own, with the same weights."""
    qk_norm = request.param != "small encoder"
    model, tokenizer = remote.internvl(remote_code("internvl2_5_qwen2"), qk_norm=qk_norm)
    return model, native(model), tokenizer


def compare(model, other, inputs, settings):
    """Logits, ids, reports and provenance of both, patched alike."""
    results, made = [], []
    for one in (model, other):
        # The published encoder computes attention by itself and cannot be told what its tokens stand for.
        with illava.patch(one, trace=True, proportional=False, **settings) as handle:
            logits = logits_of(one, inputs) if one is model else plain_logits(one, inputs)
            report = handle.report
            made.append(report.provenance)
            ids = generate(one, inputs)
            assert handle.report.pictures == report.pictures
            results.append((logits, ids[:, -6:], handle))
    (logits, ids, handle), (native_logits, native_ids, native_handle) = results
    shown = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits[shown], native_logits[shown], atol=1e-5, rtol=1e-5)
    assert torch.equal(ids, native_ids)
    assert handle.plan.vit_layers == native_handle.plan.vit_layers
    assert handle.report.pictures == native_handle.report.pictures
    for own, others in zip(*made, strict=True):
        same_provenance(own, others)
    return handle


def plain_logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("name", ROWS)
def test_unpatched_models_are_the_same(pair, name):
    model, other, tokenizer = pair
    inputs = prompt(tokenizer, *ROWS[name])
    shown = inputs["attention_mask"].bool()
    torch.testing.assert_close(
        logits_of(model, inputs)[shown], plain_logits(other, inputs)[shown], atol=1e-5, rtol=1e-5
    )


@pytest.mark.capability("same as the reference")
@pytest.mark.capability("pictures")
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", ROWS)
def test_the_same_as_transformers_own(pair, name, plan):
    model, other, tokenizer = pair
    compare(model, other, prompt(tokenizer, *ROWS[name]), LAYERS | PLANS[plan])


def test_default_layers_are_the_native_models(pair):
    model, other, tokenizer = pair
    handle = compare(model, other, prompt(tokenizer, *ROWS["several pictures"]), dict(reduction=0.8))
    assert handle.plan.vit_layers
    assert handle.plan.llm_layers


@pytest.mark.parametrize(("select_layer", "blocks"), [(-2, 3), (3, 3), (-3, 2)])
def test_an_earlier_hidden_state(remote_code, select_layer, blocks):
    """The projector reads what an inner block gave; the blocks after it run and are read by nobody."""
    model, tokenizer = remote.internvl(remote_code("internvl2_5_qwen2"), select_layer=select_layer)
    settings = dict(vit_layers=(0, blocks - 1), llm_layers=(0, 2), reduction=0.778)
    other = native(model, blocks)
    compare(model, other, prompt(tokenizer, *ROWS["several pictures"]), settings)
    compare(model, other, prompt(tokenizer, *ROWS["batch"]), settings)
    with pytest.raises(illava.PlanError, match=f"has {blocks} vit layers"):
        illava.patch(model, vit_layers=(blocks,))


# ---------------------------------------------------------------- the report


@pytest.mark.capability("padded batch")
def test_report(model, tokenizer):
    """A picture a record, with all its tiles; units in the encoder's columns, as many tokens behind it."""
    with illava.patch(model, **LAYERS, reduction=0.75) as handle:
        generate(model, prompt(tokenizer, *ROWS["batch"]))
    pictures = handle.report.pictures
    assert [(p.kind, p.row, p.grid, p.tiles) for p in pictures] == [
        ("image", 0, (1, 8, 8), 3),
        ("image", 2, (1, 8, 8), 1),
        ("image", 2, (1, 8, 8), 2),
    ]
    (tile,) = handle.plan.schedule([(1, 8, 8)])
    for record in pictures:
        n = record.tiles
        assert record.tokens == record.encoded_units == TILE_TOKENS * n
        vit = [("vit", layer, n * before, n * after) for layer, before, after in tile.vit]
        alive = left = n * tile.encoder_tokens
        assert record.entered_tokens == alive
        llm = []
        removed = handle.plan.llm_removed(record.tokens, alive)
        for layer, gone in zip(handle.plan.llm_layers, removed, strict=True):
            llm.append(("llm", layer, left, left := left - gone))
        assert [(r.stage, r.layer, r.tokens_in, r.tokens_out) for r in record.layers] == [*vit, *llm]
        assert record.final_tokens == left
        assert record.reduction == pytest.approx(0.75, abs=0.07)
    assert handle.report.backend == "blocks"


@pytest.mark.capability("text only")
def test_a_call_of_text_alone_reports_nothing(model, tokenizer):
    inputs = prompt(tokenizer, ["How many people?", END])
    expected = generate(model, inputs)
    with illava.patch(model, **LAYERS, reduction=0.8) as handle:
        assert torch.equal(generate(model, inputs), expected)
        assert handle.report is None


def test_a_tile_that_stands_for_no_picture(model, tokenizer):
    """As in training: a call of text brings an empty tile whose features its flag throws away."""
    inputs = prompt(tokenizer, [START, "How many people?", END]) | {"pixel_values": tiles(1)}
    flags = torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad():
        expected = model(**inputs, image_flags=flags, return_dict=True).logits
        with illava.patch(model, **LAYERS, reduction=0.8) as handle:
            assert torch.equal(model(**inputs, image_flags=flags, return_dict=True).logits, expected)
            assert handle.report is None


@pytest.mark.capability("features first")
def test_precomputed_features(model, tokenizer):
    """Features that the patched encoder gave are read again as they were; others only the decoder merges."""
    inputs = prompt(tokenizer, *ROWS["batch"])
    with torch.no_grad():
        plain = model.extract_feature(inputs["pixel_values"])
        with illava.patch(model, **LAYERS, reduction=0.778) as handle:
            ids = generate(model, inputs)
            report = handle.report
            features = model.extract_feature(inputs["pixel_values"])
            assert torch.isneginf(features).all(-1).any()
            assert torch.equal(generate(model, inputs, visual_features=features), ids)
            assert handle.report.pictures == report.pictures
            generate(model, inputs)
            generate(model, inputs, visual_features=plain)
            assert {(p.grid, p.tokens == p.entered_tokens) for p in handle.report.pictures} == {(None, True)}
            others = [p.final_tokens for p in handle.report.pictures]
    assert others == [p.final_tokens for p in report.pictures]


# ---------------------------------------------------------------- chat, streaming, beams, threads


def chat(model, tokenizer, number, question, seed=0, **extra):
    """`chat` asked about one picture of so many tiles, or a list of pictures."""
    numbers = number if isinstance(number, list) else [number]
    pixels = torch.cat([tiles(n, seed + i) for i, n in enumerate(numbers)]) if numbers else None
    torch.manual_seed(5)
    settings = dict(max_new_tokens=6, do_sample=False, pad_token_id=0) | extra
    return model.chat(tokenizer, pixels, question, settings, num_patches_list=numbers)


def stream(model, tokenizer):
    """As the model card does it: `chat` in a thread of its own."""
    streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    extra = dict(streamer=streamer, max_new_tokens=12)
    thread = threading.Thread(target=chat, args=(model, tokenizer, 3, "What?"), kwargs=extra)
    thread.start()
    pieces = list(streamer)
    thread.join(timeout=300)
    return pieces


def test_streaming_merges(model, tokenizer):
    expected = chat(model, tokenizer, 3, "What?", max_new_tokens=12)
    with illava.patch(model, **LAYERS, reduction=0.8) as handle:
        merged = chat(model, tokenizer, 3, "What?", max_new_tokens=12)
        report = handle.report
        handle._state.last = None
        assert "".join(stream(model, tokenizer)).strip() == merged != expected
        assert handle.report == report


@pytest.mark.capability("beams")
def test_beams_of_a_batch_are_those_of_its_rows(model, tokenizer):
    inputs = prompt(tokenizer, *ROWS["batch"])
    with illava.patch(model, **LAYERS, reduction=0.778) as handle:
        together = generate(model, inputs, num_beams=3)
        assert [p.row for p in handle.report.pictures] == [0, 1, 2, 6, 6, 7, 7, 8, 8]
        assert {p.tiles for p in handle.report.pictures} == {1, 2, 3}
        for row in range(3):
            alone = generate(model, row_alone(inputs, row), num_beams=3)
            assert together[row].tolist() == alone[0].tolist()
        greedy = generate(model, inputs)
    assert not torch.equal(greedy, together), "beams that change nothing test nothing"


def test_threads_get_what_they_get_alone(model, tokenizer):
    prompts = [prompt(tokenizer, *ROWS[name]) for name in ("several pictures", "one picture")]
    with illava.patch(model, **LAYERS, reduction=0.778):
        alone = [generate(model, inputs).tolist() for inputs in prompts]
        results, failures, start = {}, [], threading.Barrier(2)

        def work(number):
            try:
                start.wait(timeout=60)
                for turn in range(5):
                    results[number, turn] = generate(model, prompts[number]).tolist()
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=300)
    assert not failures
    assert len(results) == 10
    assert alone[0] != alone[1]
    assert all(answer == alone[number] for (number, _), answer in results.items())


# ---------------------------------------------------------------- where nothing may change


def turns(model, tokenizer):
    pixels, settings = tiles(3), dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    answer, history = model.chat(tokenizer, pixels, "<image>\nWhat is this?", settings, return_history=True)
    again, _ = model.chat(tokenizer, pixels, "How many?", settings, history=history, return_history=True)
    more = torch.cat([pixels, tiles(2, 7)])
    last = model.chat(
        tokenizer, more, "And this? <image>", settings, history=history, num_patches_list=[3, 2]
    )
    return answer, again, last


def batch_chat(model, tokenizer):
    pixels, settings = torch.cat([tiles(3), tiles(1, 4)]), dict(max_new_tokens=6, do_sample=False)
    return model.batch_chat(
        tokenizer, pixels, ["What is in the picture?", "Who?"], settings, num_patches_list=[3, 1]
    )


def gradients(model, tokenizer):
    inputs = prompt(tokenizer, *ROWS["several pictures"])
    model.zero_grad()
    loss = forward(model, inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return [loss.detach(), *found]


def precomputed(model, tokenizer):
    inputs = prompt(tokenizer, *ROWS["batch"])
    with torch.no_grad():
        features = model.extract_feature(inputs["pixel_values"])
    return features, generate(model, inputs, visual_features=features)


USES = {
    "chat": lambda m, t: chat(m, t, 3, "What is this?"),
    "several pictures": lambda m, t: chat(m, t, [2, 1], "First <image> and <image>. Which?"),
    "batch_chat": batch_chat,
    "beams": lambda m, t: chat(m, t, 3, "What is this?", num_beams=3),
    "sampling": lambda m, t: chat(m, t, 3, "What is this?", do_sample=True),
    "several answers": lambda m, t: generate(
        m, prompt(t, *ROWS["batch"]), num_beams=3, num_return_sequences=2
    ),
    "streaming": stream,
    "turns": turns,
    "text only": lambda m, t: chat(m, t, [], "How many people are there?"),
    "forward": lambda m, t: logits_of(m, prompt(t, *ROWS["batch"])),
    "hidden states": lambda m, t: (
        forward(m, prompt(t, *ROWS["batch"]), output_hidden_states=True).hidden_states
    ),
    "generated ids": lambda m, t: generate(m, prompt(t, *ROWS["batch"])),
    "precomputed features": precomputed,
    "labels and gradients": gradients,
}


@pytest.fixture(scope="module")
def unpatched(model, tokenizer):
    """What the model gave before anything patched it, by use; each use asked once."""
    results = {}

    def result(use):
        if use not in results:
            results[use] = USES[use](model, tokenizer)
        return results[use]

    return result


@pytest.mark.parametrize("state", remote.STATES)
@pytest.mark.capability("reversible")
@pytest.mark.parametrize("use", [pytest.param(use, marks=remote.capabilities(use)) for use in USES])
def test_nothing_changes(model, tokenizer, unpatched, use, state):
    expected = unpatched(use)
    merge = lambda: generate(model, prompt(tokenizer, *ROWS["batch"]))  # noqa: E731
    with remote.state(model, state, model.language_model.model.layers[-1], merge):
        assert remote.same(USES[use](model, tokenizer), expected)


@pytest.mark.capability("reversible")
@pytest.mark.parametrize("fails", [False, True])
def test_no_trace(remote_code, fails):
    model, tokenizer = remote.internvl(remote_code("internvl2_5_qwen2"))
    inputs = prompt(tokenizer, *ROWS["batch"])
    generate(model, inputs)
    before = trace(model)
    handle = illava.patch(model, **remote.MERGING)
    assert "generate" in model.__dict__
    assert trace(model) != before
    if fails:
        remote.fail_inside(model.language_model.model.layers[-1], lambda: generate(model, inputs))
    else:
        generate(model, inputs)
        logits_of(model, inputs)
        stream(model, tokenizer)
    handle.remove()
    assert trace(model) == before
    assert model.generate.__func__ is type(model).generate


def test_reduction_0_runs_nothing_of_illavas(remote_code):
    model, _ = remote.internvl(remote_code("internvl2_5_qwen2"))
    before = trace(model)
    with illava.patch(model, reduction=0):
        now = trace(model)
        assert [name for name in before if now[name] != before[name]] == [""]
        assert set(now[""][1]) - set(before[""][1]) == {"_illava_handle"}


@pytest.mark.capability("labels")
def test_gradients_while_merging(model, tokenizer):
    found = dict(zip(("loss", *dict(model.named_parameters())), gradients(model, tokenizer), strict=True))
    with illava.patch(model, **LAYERS, reduction=0.667):
        merged = dict(zip(found, gradients(model, tokenizer), strict=True))
    assert merged["loss"] != found["loss"]
    assert [name for name, x in merged.items() if not x.isfinite().all()] == []
    idle = [name for name, x in merged.items() if not x.any()]
    assert idle == [name for name, x in found.items() if not x.any()]


@pytest.mark.capability("fp16 and bf16")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(remote_code, dtype):
    model, tokenizer = remote.internvl(remote_code("internvl2_5_qwen2"))
    model, inputs = model.to(dtype), prompt(tokenizer, *ROWS["batch"])
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    expected = logits_of(model, inputs)
    with illava.patch(model, **LAYERS, reduction=0.667):
        merged = logits_of(model, inputs)
        assert (merged.dtype, merged.shape) == (dtype, expected.shape)
        assert merged.isfinite().all()
    assert torch.equal(logits_of(model, inputs), expected)


def test_loaded_from_a_checkpoint(model, tokenizer, remote_code, tmp_path):
    other = remote.from_checkpoint(model, remote_code("internvl2_5_qwen2"), tmp_path)
    inputs = prompt(tokenizer, *ROWS["batch"])
    results = []
    for one in (model, other):
        with illava.patch(one, **LAYERS, reduction=0.778) as handle:
            results.append((logits_of(one, inputs), generate(one, inputs), handle.report))
    assert remote.same(*results)


def test_a_transposed_pixel_shuffle(remote_code):
    """`ps_version` "v1" of older checkpoints: units leave the shuffle column by column."""
    model, _ = remote.internvl(remote_code("internvl2_5_qwen2"))
    pixels = tiles(2)
    with torch.no_grad(), illava.patch(model, vit_layers=(0, 2), llm_layers=(), reduction=0.6):
        expected = model.extract_feature(pixels)
        model.ps_version = "v1"
        features = model.extract_feature(pixels)
    assert torch.isneginf(expected).all(-1).any()
    transposed = features.unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(transposed, expected, atol=1e-5, rtol=1e-5)


def test_provenance_through_a_transposed_pixel_shuffle(remote_code):
    """Visual tokens then come column by column, made of the same patches."""
    model, tokenizer = remote.internvl(remote_code("internvl2_5_qwen2"))
    found = []
    with illava.patch(model, vit_layers=(0, 2), llm_layers=(), reduction=0.6, trace=True) as handle:
        for version in ("v2", "v1"):
            model.ps_version = version
            logits_of(model, prompt(tokenizer, [START, 1, "\nWhat is this?", END]))
            (own,) = handle.report.provenance
            found.append(dict(zip(own.entry.tokens.tolist(), own.entry.sources.to_dense(), strict=True)))
    rows, columns = found
    assert len(rows) < 16
    assert {token % 4 * 4 + token // 4 for token in columns} == set(rows)
    assert all(torch.equal(row, rows[token % 4 * 4 + token // 4]) for token, row in columns.items())


# ---------------------------------------------------------------- what is refused


def test_internlm2_is_refused(remote_code):
    model = remote.internvl_internlm2(remote_code("internvl2_5"))
    before = trace(model)
    with pytest.raises(illava.SeamError, match="InternLM2Model.*convert.*InternVLForConditionalGeneration"):
        illava.patch(model)
    assert trace(model) == before


@pytest.mark.parametrize(
    ("path", "missing"),
    [("mlp1", "mlp1"), ("vision_model", "vision_model"), ("language_model.model", "model")],
)
def test_a_copy_without_a_part(remote_code, path, missing):
    model, _ = remote.internvl(remote_code("internvl2_5_qwen2"))
    parent, _, name = path.rpartition(".")
    delattr(model.get_submodule(parent), name)
    before = trace(model)
    with pytest.raises(illava.SeamError, match=f"has no '.*{missing}'"):
        illava.patch(model)
    assert trace(model) == before


def test_training_with_checkpoints_is_refused(remote_code):
    """The published encoder is born with `gradient_checkpointing = True`, so training mode is enough."""
    model, tokenizer = remote.internvl(remote_code("internvl2_5_qwen2"))
    inputs = prompt(tokenizer, *ROWS["one picture"])
    model.train()
    with illava.patch(model, **LAYERS, reduction=0.667):
        with pytest.raises(illava.UnsupportedInputError, match="gradient checkpointing"):
            forward(model, inputs)
        model.vision_model.encoder.gradient_checkpointing = False
        assert forward(model, inputs).logits.isfinite().all()


def test_what_training_is_told_to_do_works(remote_code):
    """The published class says nothing of checkpoints, so `gradient_checkpointing_disable()` does nothing."""
    model, tokenizer = remote.internvl(remote_code("internvl2_5_qwen2"))
    inputs = prompt(tokenizer, *ROWS["one picture"])
    model.train()
    with illava.patch(model, **LAYERS, reduction=0.667):
        with pytest.raises(illava.UnsupportedInputError) as refusal:
            forward(model, inputs)
        if "model.gradient_checkpointing_disable()" in str(refusal.value):
            model.gradient_checkpointing_disable()
        else:
            model.vision_model.gradient_checkpointing_disable()
        assert forward(model, inputs).logits.isfinite().all()
