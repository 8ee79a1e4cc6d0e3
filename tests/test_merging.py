"""The mechanics of merging, on the smallest models: caches, threads, plans that follow each other."""

import threading

import pytest
import torch
from transformers import DynamicCache

import illava
import tiny

PLAN = dict(vit_layers=(0, 1), llm_layers=(0, 2), reduction=0.7, merge="recycle", recycled=0.3)


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
