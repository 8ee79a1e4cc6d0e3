"""Merging in everything a model can do: batches, caches, turns, beams, threads, wrappers."""

import threading

import pytest
import torch
from transformers import DynamicCache

import illava
import tiny

PLAN = dict(vit_layers=(0, 1), llm_layers=(0, 2), reduction=0.7, recycled=0.3)


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def model(request):
    return tiny.build(request.param)


@pytest.fixture
def patched(model):
    with illava.patch(model, **PLAN) as handle:
        handle.model = model
        yield handle


def greedy(model, inputs, tokens=16, **extra):
    """Ids of the answer, and the scores they were chosen from."""
    out = model.generate(
        **inputs,
        max_new_tokens=tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **extra,
    )
    return (
        out.sequences[:, inputs["input_ids"].shape[1] :],
        torch.stack(out.logits, dim=1),
        out.past_key_values,
    )


def expected_cache_lengths(handle, rows):
    """Keys per layer of a prefill, from the plan alone: the longest row decides."""
    plan, lengths = handle.plan, []
    for layer in range(plan.llm_depth):
        per_row = []
        for row in rows:
            text = sum(p if isinstance(p, int) else 2 for p in row)  # a picture brings start and end
            visual = 0
            for picture in (p for p in row if not isinstance(p, int)):
                schedule = plan.schedule([picture.grid])[0]
                done = [out for merged, _, out in schedule.llm if merged < layer]
                visual += done[-1] if done else schedule.encoder_tokens
            per_row.append(text + visual)
        lengths.append(max(per_row))
    return lengths


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_padded_batch_gives_each_row_what_it_gives_alone(family, attention):
    model, rows = tiny.build(family, attention=attention), tiny.PROMPTS["batch"]
    with illava.patch(model, **PLAN):
        ids, logits, _ = greedy(model, tiny.prompt(*rows))
        for number, row in enumerate(rows):
            alone_ids, alone_logits, _ = greedy(model, tiny.prompt(row, seeds=[number]))
            torch.testing.assert_close(logits[number], alone_logits[0], atol=1e-4, rtol=1e-4)
            assert ids[number].tolist() == alone_ids[0].tolist()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_does_not_matter_to_a_forward(patched, side):
    rows = tiny.PROMPTS["batch"]
    inputs = tiny.prompt(*rows, side=side)
    with torch.no_grad():
        logits = patched.model(**inputs).logits
        for number, row in enumerate(rows):
            alone = patched.model(**tiny.prompt(row, seeds=[number])).logits[0]
            torch.testing.assert_close(
                logits[number, inputs["attention_mask"][number].bool()], alone, atol=1e-4, rtol=1e-4
            )


@pytest.mark.parametrize("name", tiny.PROMPTS)
def test_cache_lengths_and_final_tokens_are_those_of_the_plan(patched, name):
    rows = tiny.PROMPTS[name]
    with torch.no_grad():
        out = patched.model(**tiny.prompt(*rows), use_cache=True)
    held = [layer.keys.shape[2] for layer in out.past_key_values.layers]
    assert held == expected_cache_lengths(patched, rows)
    caller = max(len(tiny.row_ids(row)) for row in rows)
    assert out.past_key_values.get_seq_length() == caller
    assert out.logits.shape[1] == caller
    if name == "text only":
        return
    pictures = [p for row in rows for p in row if not isinstance(p, int)]
    plan = patched.plan
    for record in patched.report.pictures:
        match = next(p for p in pictures if p.tokens == record.tokens)
        per_frame = plan.vit_removed(match.tokens // match.frames)
        (r_v,), b_v = set(per_frame), len(per_frame)
        encoder = match.frames * r_v * b_v
        (r_t,) = set(plan.llm_removed(match.tokens, match.tokens - encoder))
        assert record.final_tokens == match.tokens - encoder - r_t * len(plan.llm_layers)
        assert record.layers[-1].tokens_out == record.final_tokens


def test_batches_stay_ragged_where_one_row_has_no_picture(patched):
    """The row of text keeps its length, the others are padded to it: nothing may leak from padding."""
    rows = ([40], [2, tiny.C, 3])
    ids, logits, _ = greedy(patched.model, tiny.prompt(*rows), tokens=6)
    for number, row in enumerate(rows):
        alone, alone_logits, _ = greedy(patched.model, tiny.prompt(row, seeds=[number]), tokens=6)
        torch.testing.assert_close(logits[number], alone_logits[0], atol=1e-4, rtol=1e-4)
        assert ids[number].tolist() == alone[0].tolist()


@pytest.mark.parametrize("beams", [dict(num_beams=3), dict(num_beams=3, num_return_sequences=2)])
def test_beams_of_a_batch_are_those_of_each_row(patched, beams):
    rows = tiny.PROMPTS["batch"]
    together = patched.model.generate(**tiny.prompt(*rows), max_new_tokens=6, do_sample=False, **beams)
    count = beams.get("num_return_sequences", 1)
    for number, row in enumerate(rows):
        alone = patched.model.generate(
            **tiny.prompt(row, seeds=[number]), max_new_tokens=6, do_sample=False, **beams
        )
        assert torch.equal(together[number * count : (number + 1) * count, -6:], alone[:, -6:])


def test_several_sampled_answers_share_one_prefill(patched):
    """Rows expanded from one prompt hold the same survivors: the first tokens' scores agree."""
    inputs = tiny.prompt(*tiny.PROMPTS["several pictures"])
    out = patched.model.generate(
        **inputs,
        max_new_tokens=3,
        do_sample=True,
        num_return_sequences=3,
        return_dict_in_generate=True,
        output_logits=True,
    )
    torch.testing.assert_close(out.logits[0][0], out.logits[0][2], atol=1e-5, rtol=1e-5)
    assert len(patched.report.pictures) == 9


def test_decoding_with_a_cache_equals_decoding_without(patched):
    """Without a cache every step is a prefill over a longer text; merges see the same prompt.

    The queries that rank tokens grow with the answer, so the plan here lets only the prompt's last
    visual token rank: what was decided must not depend on the answer.
    """
    inputs = tiny.prompt(*tiny.PROMPTS["one picture"])
    with illava.patch(patched.model, **PLAN, queries="visual") as handle:
        cached, _, _ = greedy(patched.model, inputs, tokens=6)
        uncached, _, _ = greedy(patched.model, inputs, tokens=6, use_cache=False)
        assert handle.report is not None
    assert torch.equal(cached, uncached)
    patched.remove()


def follow_up(model, cache, ids, parts, seed):
    """Inputs for a second turn with the cache of the first, at the positions it left off."""
    new = torch.tensor([tiny.row_ids(parts, seed)])
    known = cache.get_seq_length()
    pictures = [p for p in parts if not isinstance(p, int)]
    inputs = {"input_ids": new, "attention_mask": torch.ones(1, known + new.shape[1], dtype=torch.long)}
    grids = {}
    if pictures:
        grids["image_grid_thw"] = torch.tensor([p.grid for p in pictures])
        if tiny.V5:
            grids["mm_token_type_ids"] = (new == tiny.IMAGE).int()
        inputs["pixel_values"] = torch.cat([p.pixels() for p in pictures])
    delta = model.model.rope_deltas
    if pictures:
        positions, _ = model.model.get_rope_index(new, **grids)
    else:
        positions = torch.arange(new.shape[1]).expand(3, 1, -1)
    return {**inputs, **grids, "position_ids": positions + known + delta[:, None], "past_key_values": cache}


@pytest.mark.parametrize("parts", [[6], [3, tiny.C, 4]], ids=["text", "a new picture"])
def test_a_second_turn_with_the_cache(patched, parts):
    """The cache grows by what the plan leaves of the new turn, and the answer is that of the same turn
    computed over the first turn's survivors - which the second turn's own merges must not touch."""
    model, plan = patched.model, patched.plan
    first = tiny.prompt([4, tiny.A, 5])
    out = model.generate(**first, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    cache = out.past_key_values
    before = [layer.keys.clone() for layer in cache.layers]
    inputs = follow_up(model, cache, out.sequences, parts, seed=9)
    with torch.no_grad():
        result = model(**inputs)
    assert result.logits.shape[1] == inputs["input_ids"].shape[1]
    assert result.logits.isfinite().all()
    for layer, (old, now) in enumerate(zip(before, cache.layers, strict=True)):
        assert torch.equal(old, now.keys[:, :, : old.shape[2]])
        added = sum(p if isinstance(p, int) else 2 for p in parts)
        for picture in (p for p in parts if not isinstance(p, int)):
            schedule = plan.schedule([picture.grid])[0]
            done = [n for merged, _, n in schedule.llm if merged < layer]
            added += done[-1] if done else schedule.encoder_tokens
        assert now.keys.shape[2] == old.shape[2] + added


def test_a_second_turn_token_by_token_equals_all_at_once(patched):
    """Text of a second turn fed one token at a time, and in one piece: the same logits."""
    model = patched.model
    first = tiny.prompt([4, tiny.A, 5], [2, tiny.C, 3])

    def prefill():
        with torch.no_grad():
            return model(**first, use_cache=True).past_key_values

    new = torch.randint(1, 180, (2, 5))
    mask = torch.cat([first["attention_mask"], torch.ones(2, 5, dtype=torch.long)], dim=1)
    cache = prefill()
    base = (mask.cumsum(1) - 1)[:, -5:].expand(3, -1, -1) + model.model.rope_deltas[None]
    with torch.no_grad():
        whole = model(input_ids=new, attention_mask=mask, position_ids=base, past_key_values=cache).logits
        cache, steps = prefill(), []
        for i in range(5):
            length = mask.shape[1] - 4 + i
            steps.append(
                model(
                    input_ids=new[:, i : i + 1],
                    attention_mask=mask[:, :length],
                    position_ids=base[..., i : i + 1],
                    past_key_values=cache,
                ).logits
            )
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=1e-4, rtol=1e-4)


def test_cropping_a_cache_forgets_the_last_tokens(patched):
    """As assisted decoding does: what was forgotten leaves no trace in what follows."""
    model, first = patched.model, tiny.prompt([4, tiny.A, 5])
    with torch.no_grad():
        cache = model(**first, use_cache=True).past_key_values
        known = cache.get_seq_length()
        new = torch.randint(1, 180, (1, 3))

        def step():
            positions = torch.arange(known, known + 3).expand(3, 1, -1) + model.model.rope_deltas[None]
            return model(input_ids=new, position_ids=positions, past_key_values=cache).logits

        once = step()
        cache.crop(-3)
        assert cache.get_seq_length() == known
        torch.testing.assert_close(step(), once)


def test_prompt_lookup_decoding_gives_the_greedy_answer(patched):
    inputs = tiny.prompt([6, tiny.A, 8])
    stop = dict(eos_token_id=tiny.EOS)  # prompt lookup in 4.57 cannot do without
    plain, _, _ = greedy(patched.model, inputs, tokens=8, **stop)
    looked_up, _, _ = greedy(patched.model, inputs, tokens=8, **stop, prompt_lookup_num_tokens=2)
    assert torch.equal(plain, looked_up)


def test_hidden_states_come_back_at_the_callers_length(patched):
    inputs = tiny.prompt(*tiny.PROMPTS["batch"])
    with torch.no_grad():
        out = patched.model(**inputs, output_hidden_states=True)
        plain = patched.model(**inputs)
    shape = (*inputs["input_ids"].shape, 32)
    assert [tuple(h.shape) for h in out.hidden_states] == [shape] * 5
    assert torch.equal(out.logits, plain.logits)
    torch.testing.assert_close(patched.model.lm_head(out.hidden_states[-1]), out.logits)
    # A token merged away is zero from there on, and stays so.
    gone = [(h == 0).all(-1) for h in out.hidden_states]
    assert gone[0].sum() > 0
    for earlier, later in zip(gone[:-1], gone[1:], strict=True):
        assert (later | ~earlier).all()


def test_hidden_states_do_not_depend_on_when_they_were_first_asked_for():
    """Hugging Face installs recording hooks lazily; those from before the patch must see the same."""
    inputs, results = tiny.prompt(*tiny.PROMPTS["batch"]), []
    for ask_first in (True, False):
        model = tiny.build("qwen2_5_vl")
        with torch.no_grad():
            if ask_first:
                model(**inputs, output_hidden_states=True)
            with illava.patch(model, **PLAN):
                results.append(model(**inputs, output_hidden_states=True).hidden_states)
    assert all(map(torch.equal, *results))


def test_labels_and_gradients(patched):
    inputs = tiny.prompt(*tiny.PROMPTS["several pictures"])
    labels = inputs["input_ids"].clone()
    labels[:, :-6] = -100
    patched.model.zero_grad()
    out = patched.model(**inputs, labels=labels)
    out.loss.backward()
    assert out.logits.shape[:2] == labels.shape
    by_hand = torch.nn.functional.cross_entropy(out.logits[0, -7:-1].float(), labels[0, -6:])
    torch.testing.assert_close(out.loss.detach(), by_hand.detach())
    for part in (patched.model.model.visual.patch_embed.proj, patched.model.model.visual.blocks[0].attn.qkv):
        assert part.weight.grad.isfinite().all()
        assert part.weight.grad.abs().sum() > 0
    patched.model.zero_grad()


def test_threads_get_what_they_get_alone(patched):
    """Two threads on one patched model, with different pictures."""
    model = patched.model
    # transformers 4.57 keeps rope_deltas on the model itself: there pictures must be of one size.
    second = tiny.Image(12, 8, seed=4) if tiny.V5 else tiny.Image(8, 12, seed=4)
    prompts = [tiny.prompt([5, tiny.A, 7]), tiny.prompt([5, second, 7], seeds=[3])]
    alone = [greedy(model, p, tokens=8)[0].tolist() for p in prompts]
    assert alone[0] != alone[1]
    results, failures, start = {}, [], threading.Barrier(2)

    def work(number):
        try:
            start.wait(timeout=60)
            for turn in range(6):
                results[number, turn] = greedy(model, prompts[number], tokens=8)[0].tolist()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    assert not failures
    assert len(results) == 12
    assert all(answer == alone[number] for (number, _), answer in results.items())


def test_caches_of_two_conversations_do_not_mix(patched):
    model = patched.model
    prompts = [tiny.prompt([5, tiny.A, 7]), tiny.prompt([2, tiny.C, 3], seeds=[3])]
    alone = [greedy(model, p, tokens=5)[0][0].tolist() for p in prompts]
    states = []
    with torch.no_grad():
        for inputs in prompts:
            out = model(**inputs, past_key_values=DynamicCache(), use_cache=True)
            states.append(
                [out.past_key_values, [int(out.logits[0, -1].argmax())], model.model.rope_deltas.clone()]
            )
        for _ in range(4):
            for cache, ids, delta in states:
                position = torch.full((3, 1, 1), cache.get_seq_length()) + delta
                out = model(input_ids=torch.tensor([[ids[-1]]]), position_ids=position, past_key_values=cache)
                ids.append(int(out.logits[0, -1].argmax()))
    assert [ids for _, ids, _ in states] == alone


def test_patching_again_replaces_the_plan(model):
    inputs = tiny.prompt(*tiny.PROMPTS["one picture"])
    first = illava.patch(model, **PLAN)
    second = illava.patch(model, **{**PLAN, "reduction": 0.5})
    assert not first.active
    assert second.active
    with torch.no_grad():
        both = model(**inputs).logits
    second.remove()
    with illava.patch(model, **{**PLAN, "reduction": 0.5}), torch.no_grad():
        assert torch.equal(both, model(**inputs).logits)
    assert abs(second.report.reduction - 0.5) < 0.05


def test_a_cache_outlives_a_change_of_plan(model):
    """A conversation begun under one plan goes on under another, each layer with its own history."""
    first = tiny.prompt([4, tiny.A, 5])
    with illava.patch(model, **PLAN):
        out = model.generate(**first, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    other = dict(vit_layers=(1,), llm_layers=(1, 3), reduction=0.5)
    with illava.patch(model, **other), torch.no_grad():
        cache = out.past_key_values
        known = cache.get_seq_length()
        new = torch.tensor([tiny.row_ids([3], 2)])
        positions = torch.arange(known, known + 3).expand(3, 1, -1) + model.model.rope_deltas[None]
        whole = model(input_ids=new, position_ids=positions, past_key_values=cache).logits
        assert whole.isfinite().all()
        assert cache.get_seq_length() == known + 3


def test_a_picture_after_which_no_text_comes_is_ranked_by_all_queries(model):
    settings = {**PLAN, "vit_layers": ()}
    ids = tiny.row_ids([5, tiny.A])[:-1]  # the prompt ends inside the picture
    inputs = tiny.prompt([5, tiny.A])
    for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if key in inputs:
            inputs[key] = inputs[key][:, :-1]
    assert inputs["input_ids"].shape[1] == len(ids)
    logits = []
    for queries in ("text", "all"):
        with illava.patch(model, **settings, queries=queries), torch.no_grad():
            logits.append(model(**inputs).logits)
    assert torch.equal(*logits)


def test_a_picture_too_small_for_the_plan_keeps_a_token(model):
    small = tiny.Image(2, 2)
    with illava.patch(model, **{**PLAN, "reduction": 0.95}) as handle, torch.no_grad():
        logits = model(**tiny.prompt([3, small, 2, tiny.A, 3])).logits
        assert logits.isfinite().all()
        record = handle.report.pictures[0]
        assert (record.tokens, record.final_tokens) == (1, 1)
        assert "too small" in record.note
        assert "too small" in str(handle.report)
        assert not handle.report.pictures[1].note
