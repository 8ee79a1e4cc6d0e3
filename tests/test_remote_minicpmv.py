"""MiniCPM-V 2.6 by its published code: nothing changes where nothing should; merging is the reference's."""

import threading

import pytest
import remote_code as remote
import torch
from remote_code import QUERIES
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionConfig, Idefics2VisionTransformer

import illava
from contract import one_hot
from contract.recorder import options
from contract.tools import trace
from references import core
from references import minicpmv2_6 as reference
from zoo.common import Image

pytestmark = pytest.mark.family("minicpmv")

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
# One slice: 8 x 8 patches. Four slices of 5 x 14 and 8 x 8; seven of 10 x 6 and 8 x 8; one of 11 x 6.
ONE, FOUR, SEVEN, TALL = Image(90, 100), Image(100, 300, 1), Image(333, 217, 2), Image(110, 60, 3)
ROWS = {
    "one slice": [START, ONE, "\nWhat is this?", END],
    "many slices": [START, FOUR, "\nWhat is in the picture?", END],
    "several pictures": [START, "Here: ", TALL, " then ", FOUR, ONE, "\nWhich?", END],
    "token 0 in the prompt": [START, "Look! ", ONE, " Stop!! ", FOUR, " And go!\nWhat is this?", END],
    "picture at the end": [START, "See ", ONE, " and ", FOUR],
}
TEXT = [START, "How many people are there?", END]


@pytest.fixture(scope="module")
def loaded(remote_code):
    return remote.minicpmv(remote_code("minicpmv2_6"))


@pytest.fixture(scope="module")
def model(loaded):
    return loaded[0]


@pytest.fixture(scope="module")
def processor(loaded):
    return loaded[1]


def prompt(processor, *rows):
    """What the processor makes of rows of text and pictures; rows are padded on the left."""
    texts = ["".join("(<image>./</image>)" if isinstance(p, Image) else p for p in row) for row in rows]
    images = [[p.pil() for p in row if isinstance(p, Image)] for row in rows]
    inputs = dict(processor(texts, images, return_tensors="pt"))
    del inputs["image_sizes"]
    return inputs


def row_alone(inputs, row):
    """One row of a batch, without the padding ahead of it."""
    ahead = int(inputs["attention_mask"][row].long().argmax())
    return {
        "input_ids": inputs["input_ids"][row : row + 1, ahead:],
        "attention_mask": inputs["attention_mask"][row : row + 1, ahead:],
        "image_bound": [inputs["image_bound"][row] - ahead],
        "tgt_sizes": [inputs["tgt_sizes"][row]],
        "pixel_values": [inputs["pixel_values"][row]],
    }


def forward(model, inputs, **extra):
    mask = inputs["attention_mask"]
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return model(inputs | {"position_ids": positions}, attention_mask=mask, **extra)


def logits_of(model, inputs):
    with torch.no_grad():
        return forward(model, inputs).logits


def generate(model, processor, inputs, tokens=6, **extra):
    """Ids of the new tokens, `[rows, tokens]`."""
    return model.generate(
        **inputs, tokenizer=processor.tokenizer, max_new_tokens=tokens, do_sample=False, **extra
    )


def removed_by(plan):
    """A plan as the reference wants it."""
    return (
        lambda patches: dict(zip(plan.vit_layers, plan.vit_removed(patches), strict=True)),
        lambda tokens, alive: dict(zip(plan.llm_layers, plan.llm_removed(tokens, alive), strict=True)),
    )


def patches_of(*pictures, processor):
    """Patches of every slice."""
    sizes = prompt(processor, pictures)["tgt_sizes"][0]
    return [tuple(size) for size in sizes.tolist()]


# ---------------------------------------------------------------- against the reference


@pytest.mark.parametrize("name", ROWS)
def test_the_reference_without_merging_is_the_model(model, processor, name):
    inputs = prompt(processor, ROWS[name])
    expected = reference.forward(model, inputs, lambda n: {}, lambda n, alive: {})
    shown = inputs["attention_mask"][0]
    torch.testing.assert_close(
        logits_of(model, inputs)[0][shown], expected.logits[shown], atol=1e-4, rtol=1e-4
    )


@pytest.mark.capability("same as the reference")
@pytest.mark.capability("pictures")
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", ROWS)
def test_logits_are_the_references(model, processor, name, plan):
    settings, inputs = LAYERS | PLANS[plan], prompt(processor, ROWS[name])
    with illava.patch(model, **settings) as handle:
        logits = logits_of(model, inputs)[0]
    expected = reference.forward(model, inputs, *removed_by(handle.plan), **options(handle.plan))
    merging = [name for name in ("vit", "llm") if getattr(handle.plan, f"{name}_layers")]
    assert {m.stage for m in expected.merges} == set(merging)
    shown = inputs["attention_mask"][0]  # tokens it hides have logits of their own where no layer merges
    torch.testing.assert_close(logits[shown], expected.logits[shown], atol=1e-4, rtol=1e-4)
    assert handle.report.backend == ("blocks" if handle.plan.vit_layers else None)


@pytest.mark.capability("eager and sdpa")
def test_logits_with_eager_attention(remote_code):
    model, processor = remote.minicpmv(remote_code("minicpmv2_6"), attention="eager")
    assert model.llm.config._attn_implementation == "eager"
    inputs = prompt(processor, ROWS["several pictures"])
    with illava.patch(model, **LAYERS, reduction=0.778) as handle:
        logits = logits_of(model, inputs)[0]
    expected = reference.forward(model, inputs, *removed_by(handle.plan), **options(handle.plan))
    torch.testing.assert_close(logits, expected.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.capability("same as the reference")
@pytest.mark.parametrize("name", ROWS)
def test_generated_ids_are_the_references(model, processor, name):
    inputs = prompt(processor, ROWS[name])
    with illava.patch(model, **LAYERS, reduction=0.778) as handle:
        ids = generate(model, processor, inputs)[0].tolist()
    expected = reference.generate(
        model, inputs, *removed_by(handle.plan), new_tokens=6, **options(handle.plan)
    )
    assert len(ids) == 6
    assert ids == expected


BATCH = [ROWS["many slices"], TEXT, ROWS["token 0 in the prompt"], ROWS["one slice"]]


@pytest.mark.capability("padded batch")
def test_a_batch_with_a_row_of_text_alone(model, processor):
    """Slices of every row are padded to the longest of all; each row is what the reference makes of it."""
    inputs = prompt(processor, *BATCH)
    with illava.patch(model, **LAYERS, reduction=0.778) as handle:
        logits, ids = logits_of(model, inputs), generate(model, processor, inputs)
    for row in range(len(BATCH)):
        alone = row_alone(inputs, row)
        arguments = (model, alone, *removed_by(handle.plan))
        length = alone["input_ids"].shape[1]
        expected = reference.forward(*arguments, **options(handle.plan)).logits
        torch.testing.assert_close(logits[row, -length:], expected, atol=1e-4, rtol=1e-4)
        assert ids[row].tolist() == reference.generate(*arguments, new_tokens=6, **options(handle.plan))


@pytest.mark.parametrize("where", ["text before", "text after", "picture", "whole slice but one"])
def test_a_hole_in_the_mask(model, processor, where):
    inputs = prompt(processor, ROWS["several pictures"])
    first, last = (int(x) for x in inputs["image_bound"][0][1])
    hole = {
        "text before": [3, 4],
        "text after": [inputs["input_ids"].shape[1] - 4],
        "picture": [first + 2, first + 3, last - 1],
        "whole slice but one": list(range(first, last - 1)),
    }[where]
    inputs["attention_mask"][0, hole] = False
    with illava.patch(model, **LAYERS, reduction=0.667) as handle:
        logits, ids = logits_of(model, inputs)[0], generate(model, processor, inputs)[0].tolist()
    arguments = (model, inputs, *removed_by(handle.plan))
    expected = reference.forward(*arguments, **options(handle.plan)).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert ids == reference.generate(*arguments, new_tokens=6, **options(handle.plan))


@pytest.mark.capability("features first")
def test_precomputed_features(model, processor):
    """Features that the patched encoder gave are read again as they were; others only the decoder merges."""
    inputs = prompt(processor, ROWS["several pictures"])
    _, plain = generate(model, processor, inputs, return_vision_hidden_states=True)
    with illava.patch(model, **LAYERS, reduction=0.778) as handle:
        ids, features = generate(model, processor, inputs, return_vision_hidden_states=True)
        assert torch.equal(ids, generate(model, processor, inputs, vision_hidden_states=features))
        pictures = handle.report.pictures
        assert {(p.grid, p.tokens, p.entered_tokens) for p in pictures} == {(None, QUERIES, QUERIES)}
        assert all(p.final_tokens == 4 for p in pictures)
        others = generate(model, processor, inputs, vision_hidden_states=plain)
    seen = reference.generate(
        model, inputs, lambda n: {}, removed_by(handle.plan)[1], new_tokens=6, **options(handle.plan)
    )
    assert others[0].tolist() == seen


@pytest.mark.capability("labels")
def test_gradients_while_merging(model, processor):
    """Patches merged away leave no trace in the gradient of what the resampler does to all patches."""
    found = dict(zip(("loss", *dict(model.named_parameters())), gradients(model, processor), strict=True))
    with illava.patch(model, **LAYERS, reduction=0.667):
        merged = dict(zip(found, gradients(model, processor), strict=True))
    assert merged["loss"] != found["loss"]
    assert [name for name, x in merged.items() if not x.isfinite().all()] == []
    idle = [name for name, x in merged.items() if not x.any()]
    assert idle == [name for name, x in found.items() if not x.any()]


@pytest.mark.capability("fp16 and bf16")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(remote_code, dtype):
    model, processor = remote.minicpmv(remote_code("minicpmv2_6"))
    model, inputs = model.to(dtype), prompt(processor, *BATCH)
    expected = logits_of(model, inputs)
    with illava.patch(model, **LAYERS, reduction=0.667):
        merged = logits_of(model, inputs)
        assert (merged.dtype, merged.shape) == (dtype, expected.shape)
        assert merged.isfinite().all()
    assert torch.equal(logits_of(model, inputs), expected)


# ---------------------------------------------------------------- provenance


def looks(model, monkeypatch, inputs, handle):
    """A `Follower` of the reference, and of each slice how its resampler's queries look at patches."""
    merges, found = one_hot.Follower(reference, monkeypatch), []
    attend, resample = reference.attend, reference.resample

    def resampled(resampler, x, patches, width):
        def attended(q, k, v, allowed):
            weights = core.scores_of(q, k, allowed).softmax(-1).mean(0)  # [queries, S]
            found.append(dict(zip(patches, weights.T, strict=True)))
            return attend(q, k, v, allowed)

        with monkeypatch.context() as patched:
            patched.setattr(reference, "attend", attended)
            return resample(resampler, x, patches, width)

    monkeypatch.setattr(reference, "resample", resampled)
    reference.forward(model, inputs, *removed_by(handle.plan), **options(handle.plan))
    sizes = [h * w for h, w in inputs["tgt_sizes"][0].tolist()]
    nothing = torch.zeros(QUERIES)
    return merges, [
        torch.stack([own.get(patch, nothing) for patch in range(size)], dim=1)
        for own, size in zip(found, sizes, strict=True)
    ]


@pytest.mark.parametrize("plan", ["deep", "encoder alone", "decoder alone", "linear"])
@pytest.mark.parametrize("size", [16, 2])
def test_provenance_through_the_resampler(model, processor, monkeypatch, plan, size):
    settings, inputs = LAYERS | PLANS[plan], prompt(processor, ROWS["several pictures"])
    monkeypatch.setattr(model.config, "vision_batch_size", size)  # slices an encoder call takes
    with illava.patch(model, trace=True, **settings) as handle:
        logits_of(model, inputs)
        own = handle.report.provenance
    merges, reads = looks(model, monkeypatch, inputs, handle)
    pictures = [("image", p.frames, 1) for p in own]
    order = list(range(len(own)))
    found = one_hot.expected("minicpmv", model, inputs, merges, pictures, order, handle.plan, reads)
    for picture, wanted in zip(own, found, strict=True):
        for step in (*picture.merges, picture.entry):
            one_hot.check_step(step, wanted[step.stage, step.layer], wanted["stands"], picture)
        one_hot.account(picture)


def test_the_resampler_alone(model):
    """Without the encoder nobody knows whose patches it reads: it answers, and nothing is written down."""
    given = torch.Generator().manual_seed(0)
    patches = torch.randn(2, 64, model.config.vision_config.hidden_size, generator=given)
    sizes = torch.tensor([[8, 8], [4, 14]])
    with torch.no_grad():
        plain = model.resampler(patches, sizes)
        with illava.patch(model, trace=True, **LAYERS, reduction=0.667) as handle:
            assert torch.equal(model.resampler(patches, sizes), plain)
            assert handle.report is None


def test_its_pictures_are_drawn(model, processor, monkeypatch):
    """Slices in their places; what a resampler's tokens read as brightness, since they stand nowhere."""
    row = ROWS["several pictures"]
    monkeypatch.setattr("illava.see.figure.image", lambda made: made)
    with illava.patch(model, trace=True, **LAYERS | PLANS["deep"]) as handle:
        logits_of(model, prompt(processor, row))
        merges = [step.stage for step in handle.report.provenance[0].merges]
        made = illava.visualize(handle.report, [x.pil() for x in row if isinstance(x, Image)])
    names = [text.get_text() for text in made.texts if text.get_text().startswith("picture ")]
    assert {name[:9] for name in names} == {"picture 1", "picture 2", "picture 3"}
    assert len(made.axes) == len(names) * (1 + len(merges))
    legend = [text.get_text() for text in made.legends[0].get_texts()]
    assert legend[0] == "informative: kept"
    assert legend[-1] == "brighter: tokens read more of it"


# ---------------------------------------------------------------- several encoder calls


@pytest.fixture
def calls(model):
    """Counts calls of encoder and resampler."""
    seen = []
    hooks = [
        getattr(model, name).register_forward_pre_hook(lambda m, a, name=name: seen.append(name))
        for name in ("vpm", "resampler")
    ]
    yield seen
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("size", [1, 2, 3, 11])
def test_more_slices_than_an_encoder_call_takes(model, processor, calls, monkeypatch, size):
    """12 slices in 12, 6, 4 or 2 encoder calls and one call of the resampler are the same as in one."""
    inputs = prompt(
        processor, ROWS["several pictures"], TEXT, [START, FOUR, TALL, "\nWhat?", END], [ONE, END]
    )
    with illava.patch(model, **LAYERS, reduction=0.778) as handle:
        logits, ids, report = logits_of(model, inputs), generate(model, processor, inputs), handle.report
        assert calls == ["vpm", "resampler"] * 2
        calls.clear()
        monkeypatch.setattr(model.config, "vision_batch_size", size)
        torch.testing.assert_close(logits_of(model, inputs), logits, atol=1e-5, rtol=1e-5)
        assert calls == ["vpm"] * -(-12 // size) + ["resampler"]
        assert torch.equal(generate(model, processor, inputs), ids)
        assert handle.report == report


# ---------------------------------------------------------------- the report


def test_report(model, processor):
    """Patches in the encoder's columns, the resampler's tokens in the decoder's, a record per slice."""
    rows = [ROWS["several pictures"], TEXT, ROWS["many slices"]]
    with illava.patch(model, **LAYERS, reduction=0.7) as handle:
        generate(model, processor, prompt(processor, *rows))
    slices = [
        (row, *grid)
        for row, pictures in ((0, (TALL, FOUR, ONE)), (2, (FOUR,)))
        for grid in patches_of(*pictures, processor=processor)
    ]
    plan, pictures = handle.plan, handle.report.pictures
    assert len(pictures) == len(slices) == 10
    for record, (row, height, width) in zip(pictures, slices, strict=True):
        assert (record.kind, record.row, record.grid, record.tiles) == ("image", row, (1, height, width), 1)
        assert (record.encoded_units, record.tokens) == (height * width, QUERIES)
        assert record.entered_tokens == QUERIES
        (whole,) = plan.schedule([(1, height, width)])
        llm, left = [], QUERIES
        for layer, gone in zip(plan.llm_layers, plan.llm_removed(QUERIES, QUERIES), strict=True):
            llm.append(("llm", layer, left, left := left - gone))
        layers = [(r.stage, r.layer, r.tokens_in, r.tokens_out) for r in record.layers]
        assert layers == [*(("vit", *entry) for entry in whole.vit), *llm]
        assert record.final_tokens == left == 4
        assert record.note == ""
    assert (handle.report.tokens, handle.report.final_tokens) == (160, 40)
    flops = handle.report.flops
    assert flops.vision.with_ < flops.vision.without
    assert flops.language.with_ < flops.language.without
    assert all(
        word in str(handle.report) for word in ("160 visual tokens to 40", "1x11x6", "1x5x14", "vit 2")
    )


@pytest.mark.capability("text only")
def test_a_call_of_text_alone_reports_nothing(model, processor):
    inputs = prompt(processor, TEXT)
    expected = generate(model, processor, inputs)
    with illava.patch(model, **LAYERS, reduction=0.8) as handle:
        assert torch.equal(generate(model, processor, inputs), expected)
        assert handle.report is None


# ---------------------------------------------------------------- chat, streaming, beams, threads


def chat(model, processor, *content, **extra):
    messages = [{"role": "user", "content": [c.pil() if isinstance(c, Image) else c for c in content]}]
    return talk(model, processor, messages, **extra)


def talk(model, processor, messages, **extra):
    extra = dict(sampling=False, num_beams=1, max_new_tokens=6) | extra
    torch.manual_seed(5)
    return model.chat(None, messages, processor.tokenizer, processor, **extra)


def test_streaming_merges_and_says_what_sampling_says(model, processor):
    """The language model runs in a thread of its own, and is told of no mask."""
    expected = chat(model, processor, FOUR, "What is this?", sampling=True, max_new_tokens=20)
    with illava.patch(model, **LAYERS, reduction=0.8) as handle:
        merged = chat(model, processor, FOUR, "What is this?", sampling=True, max_new_tokens=20)
        report = handle.report
        handle._state.last = None
        pieces = list(
            chat(model, processor, FOUR, "What is this?", sampling=True, stream=True, max_new_tokens=20)
        )
        assert "".join(pieces).strip() == merged != expected
        assert handle.report == report
        assert [p.final_tokens for p in report.pictures] == [4] * 4


def test_streaming_of_one_picture_beside_another_call(model, processor):
    """Between embedding and its thread's first step another call may come and go."""
    inputs = prompt(processor, ROWS["many slices"])
    other = prompt(processor, ROWS["one slice"])
    with illava.patch(model, **LAYERS, reduction=0.8) as handle:
        whole = generate(model, processor, inputs, tokens=8)
        with torch.inference_mode():
            embeds, _ = model.get_vllm_embedding(inputs)
        generate(model, processor, other)
        assert len(handle.report.pictures) == 1
        result = []
        worker = threading.Thread(
            target=lambda: result.append(
                model.llm.generate(inputs_embeds=embeds, max_new_tokens=8, do_sample=False, pad_token_id=0)
            )
        )
        worker.start()
        worker.join(timeout=300)
        assert torch.equal(result[0], whole)
        assert [p.grid for p in handle.report.pictures] == [(1, 5, 14), *[(1, 8, 8)] * 3]


@pytest.mark.capability("beams")
def test_beams_of_a_batch_are_those_of_its_rows(model, processor):
    rows = [ROWS["many slices"], TEXT, ROWS["one slice"]]
    inputs = prompt(processor, *rows)
    with illava.patch(model, **LAYERS, reduction=0.778) as handle:
        together = generate(model, processor, inputs, num_beams=3)
        assert {p.row for p in handle.report.pictures} == {0, 1, 2, 6, 7, 8}
        for row in range(len(rows)):
            alone = generate(model, processor, row_alone(inputs, row), num_beams=3)
            assert together[row].tolist() == alone[0].tolist()
        greedy = generate(model, processor, inputs)
    assert not torch.equal(greedy, together), "beams that change nothing test nothing"


def test_threads_get_what_they_get_alone(model, processor):
    prompts = [prompt(processor, ROWS[name]) for name in ("several pictures", "one slice")]
    with illava.patch(model, **LAYERS, reduction=0.778):
        alone = [generate(model, processor, inputs).tolist() for inputs in prompts]
        results, failures, start = {}, [], threading.Barrier(2)

        def work(number):
            try:
                start.wait(timeout=60)
                for turn in range(5):
                    results[number, turn] = generate(model, processor, prompts[number]).tolist()
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


def turns(model, processor):
    first = {"role": "user", "content": [ONE.pil(), "What is this?"]}
    answer = talk(model, processor, [first])
    second = {"role": "user", "content": [FOUR.pil(), "And this?"]}
    # Of a random model's answer the letters are enough: it may hold half of a special token.
    said = {"role": "assistant", "content": ["".join(c for c in answer if c.isalnum())]}
    return answer, talk(model, processor, [first, said, second])


def gradients(model, processor):
    inputs = prompt(processor, ROWS["several pictures"])
    model.zero_grad()
    loss = forward(model, inputs, labels=inputs["input_ids"].long()).loss
    loss.backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return [loss.detach(), *found]


def precomputed(model, processor):
    inputs = prompt(processor, *BATCH)
    ids, features = generate(model, processor, inputs, return_vision_hidden_states=True)
    return ids, features, generate(model, processor, inputs, vision_hidden_states=features)


USES = {
    "chat": lambda m, p: chat(m, p, FOUR, "What is this?"),
    "several pictures": lambda m, p: chat(m, p, ONE, FOUR, "Which?"),
    "video frames": lambda m, p: chat(m, p, ONE, TALL, ONE, "What?", use_image_id=False, max_slice_nums=2),
    "batch": lambda m, p: talk(
        m, p, [[{"role": "user", "content": c}] for c in ([ONE.pil(), "What?"], ["Who?"])]
    ),
    "beams": lambda m, p: chat(m, p, FOUR, "What is this?", num_beams=3),
    "sampling": lambda m, p: chat(m, p, FOUR, "What is this?", sampling=True),
    "streaming": lambda m, p: list(chat(m, p, FOUR, "What is this?", sampling=True, stream=True)),
    "turns": turns,
    "text only": lambda m, p: chat(m, p, "How many people are there?"),
    "forward": lambda m, p: logits_of(m, prompt(p, *BATCH)),
    "hidden states": lambda m, p: forward(m, prompt(p, *BATCH), output_hidden_states=True).hidden_states,
    "generated ids": lambda m, p: generate(m, p, prompt(p, *BATCH)),
    "precomputed features": precomputed,
    "several encoder calls": lambda m, p: logits_of(m, prompt(p, ROWS["several pictures"] * 2)),
    "labels and gradients": gradients,
}


@pytest.fixture(scope="module")
def unpatched(model, processor):
    """What the model gave before anything patched it, by use; each use asked once."""
    results = {}

    def result(use):
        if use not in results:
            results[use] = USES[use](model, processor)
        return results[use]

    return result


@pytest.mark.parametrize("state", remote.STATES)
@pytest.mark.capability("reversible")
@pytest.mark.parametrize("use", [pytest.param(use, marks=remote.capabilities(use)) for use in USES])
def test_nothing_changes(model, processor, unpatched, use, state):
    expected = unpatched(use)
    merge = lambda: generate(model, processor, prompt(processor, *BATCH))  # noqa: E731
    with remote.state(model, state, model.llm.model.layers[-1], merge):
        assert remote.same(USES[use](model, processor), expected)


@pytest.mark.capability("reversible")
@pytest.mark.parametrize("fails", [False, True])
def test_no_trace(remote_code, fails):
    model, processor = remote.minicpmv(remote_code("minicpmv2_6"))
    inputs = prompt(processor, *BATCH)
    generate(model, processor, inputs)
    before = trace(model)
    handle = illava.patch(model, **remote.MERGING)
    assert "get_vllm_embedding" in model.__dict__
    assert "generate" in model.llm.__dict__
    assert trace(model) != before
    if fails:
        remote.fail_inside(model.llm.model.layers[-1], lambda: generate(model, processor, inputs))
    else:
        generate(model, processor, inputs)
        logits_of(model, inputs)
        list(chat(model, processor, FOUR, "What is this?", sampling=True, stream=True))
    handle.remove()
    assert trace(model) == before
    for module in (model, model.llm):
        assert module.generate.__func__ is type(module).generate
    assert model.get_vllm_embedding.__func__ is type(model).get_vllm_embedding


def test_reduction_0_runs_nothing_of_illavas(remote_code):
    model, _ = remote.minicpmv(remote_code("minicpmv2_6"))
    before = trace(model)
    with illava.patch(model, reduction=0):
        now = trace(model)
        assert [name for name in before if now[name] != before[name]] == [""]
        assert set(now[""][1]) - set(before[""][1]) == {"_illava_handle"}


def test_loaded_from_a_checkpoint(model, processor, remote_code, tmp_path):
    other = remote.from_checkpoint(model, remote_code("minicpmv2_6"), tmp_path)
    inputs = prompt(processor, TEXT, ROWS["one slice"])
    results = []
    for one in (model, other):
        with illava.patch(one, **LAYERS, reduction=0.778) as handle:
            results.append((logits_of(one, inputs), generate(one, processor, inputs), handle.report))
    assert remote.same(*results)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("path", "missing"),
    [
        ("resampler", "resampler.attn"),
        ("resampler.attn", "resampler.attn"),
        ("vpm", "vpm"),
        ("vpm.encoder", "encoder.layers"),  # as in MiniCPM-V 2, whose encoder is timm's
        ("llm", "llm.model"),
    ],
)
def test_a_copy_without_a_part(remote_code, path, missing):
    model, _ = remote.minicpmv(remote_code("minicpmv2_6"))
    parent, _, name = path.rpartition(".")
    delattr(model.get_submodule(parent), name)
    before = trace(model)
    with pytest.raises(illava.SeamError, match=f"no '{missing}'"):
        illava.patch(model)
    assert trace(model) == before


def test_the_encoder_of_version_2_5(remote_code):
    """MiniCPM-Llama3-V 2.5 has every part by the same name, but its encoder is never told the slices' sizes.

    It is transformers' Idefics2VisionTransformer, called with pixels and a mask that shows everything, so
    padding would be ranked, kept and merged as if it were picture.
    """
    model, _ = remote.minicpmv(remote_code("minicpmv2_6"))
    config = Idefics2VisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, image_size=980,
        patch_size=14,
    )  # fmt: skip
    config._attn_implementation = "eager"
    model.vpm = Idefics2VisionTransformer(config)
    with pytest.raises(illava.SeamError):
        illava.patch(model)
