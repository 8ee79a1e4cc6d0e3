"""Conversations: a second turn goes on from the cache that the first one filled."""

import pytest
import torch

import zoo
from contract import tools
from contract.conversation import follow_up
from contract.recorder import options


def first_turn(model, family, kind):
    inputs = tools.prompt_of(family, kind)
    out = tools.generate(model, inputs, do_sample=False, return_dict_in_generate=True)
    return inputs, out.sequences, out.past_key_values


def second_turn(family):
    """Text, a picture, text."""
    return tools.prompt(
        family, [3, tools.pictures_of(zoo.FAMILIES[family].KINDS["one picture"])[0], 4], seeds=[5]
    )


@pytest.mark.capability("turns")
@pytest.mark.parametrize("kind", ["mixed", "batch"])
@tools.each_family
@tools.each_rule
def test_text_at_once_or_token_by_token(family, kind, settings):
    model, kind = tools.build(family), tools.mixed(family) if kind == "mixed" else kind
    results = []
    with tools.patch(model, family, **settings):
        for at_once in (True, False):
            first, sequences, cache = first_turn(model, family, kind)
            second = tools.prompt(family, *[[7]] * len(sequences))
            inputs = follow_up(model, first, sequences, second, cache)
            if at_once:
                results.append(tools.forward(model, inputs).logits)
                continue
            number, seen = inputs["input_ids"].shape[1], inputs["attention_mask"].shape[1]
            steps = []
            for i in range(number):
                step = inputs | {"attention_mask": inputs["attention_mask"][:, : seen - number + i + 1]}
                for name in ("input_ids", "mm_token_type_ids", "position_ids"):
                    if name in step:
                        step[name] = inputs[name][..., i : i + 1]
                steps.append(tools.forward(model, step).logits)
            results.append(torch.cat(steps, dim=1))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


@pytest.mark.capability("turns")
@tools.each_family
@tools.each_rule
def test_a_padded_turn_after_a_merged_one(family, settings):
    """The caller's padding of a later turn is masked, though the cache holds fewer keys than tokens."""
    model = tools.build(family)
    picture = tools.pictures_of(zoo.FAMILIES[family].KINDS["one picture"])[0]
    opening, later = [2, picture, 3], [[9], [4]]

    def turn(first_rows, first_seeds, second_rows, second_seeds):
        first = tools.prompt(family, *first_rows, seeds=first_seeds)
        out = tools.generate(model, first, do_sample=False, return_dict_in_generate=True)
        second = tools.prompt(family, *second_rows, seeds=second_seeds)
        inputs = follow_up(model, first, out.sequences, second, out.past_key_values)
        return tools.forward(model, inputs).logits[:, -1]

    def rows_differ():
        together = turn([opening, opening], [0, 1], later, [2, 3])
        alone = [turn([opening], [row], [later[row]], [2 + row])[0] for row in (0, 1)]
        return (together - torch.stack(alone)).abs().max().item()

    if rows_differ() > 1e-2:
        pytest.skip("pad between turns: the state of its linear attention runs on over padding")
    with tools.patch(model, family, **settings):
        assert rows_differ() < 1e-4


@pytest.mark.capability("turns")
@tools.each_family
@tools.each_rule
def test_generate_goes_on_from_a_cache(family, settings):
    """As users hold conversations: the whole text again, and the cache."""
    model = tools.build(family)
    with tools.patch(model, family, **settings):
        first, sequences, cache = first_turn(model, family, tools.mixed(family))
        second = tools.prompt(family, [5], seeds=[3])
        inputs = follow_up(model, first, sequences, second, cache)
        expected = tools.forward(model, inputs).logits[0, -1]
        _, _, cache = first_turn(model, family, tools.mixed(family))
        before = tools.held(cache)
        ids = torch.cat([sequences, second["input_ids"]], dim=1)
        whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": cache}
        if "mm_token_type_ids" in first:
            whole["mm_token_type_ids"] = torch.zeros_like(ids)
        _, logits, cache = tools.greedy(model, whole, tokens=2)
    torch.testing.assert_close(logits[0, 0], expected, atol=1e-4, rtol=1e-4)
    # The first answer's last token, the new ones, the new answer's first.
    new = 1 + second["input_ids"].shape[1] + 1
    assert tools.held(cache) == [n and n + new for n in before]


@pytest.mark.capability("turns with new pictures")
@pytest.mark.parametrize("settings", tools.NOTHING.values(), ids=tools.NOTHING.keys())
@tools.each_family
def test_a_new_picture_when_nothing_is_removed(family, settings):
    model, results = tools.build(family), []
    for patched in (False, True):
        handle = tools.patch(model, family, **settings) if patched else None
        first, sequences, cache = first_turn(model, family, tools.mixed(family))
        out = tools.forward(model, follow_up(model, first, sequences, second_turn(family), cache))
        results.append((out.logits, tools.held(cache)))
        if handle is not None:
            handle.remove()
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


@pytest.mark.capability("turns with new pictures")
@tools.each_family
@tools.each_rule
def test_a_new_picture(family, settings):
    """The cache grows by what the plan leaves of the new turn, and what it held stays as it was."""
    model, second = tools.build(family), second_turn(family)
    with tools.patch(model, family, **settings) as handle:
        first, sequences, cache = first_turn(model, family, tools.mixed(family))
        before = [
            None if n is None else cache.layers[i].keys.clone() for i, n in enumerate(tools.held(cache))
        ]
        inputs = follow_up(model, first, sequences, second, cache)
        out = tools.forward(model, inputs)
        assert len(handle.report.pictures) > 0
        assert handle.report.tokens < second["input_ids"].shape[1]  # of this turn alone
    assert out.logits.shape[1] == inputs["input_ids"].shape[1]
    assert out.logits.isfinite().all()
    assert cache.get_seq_length() == inputs["attention_mask"].shape[1]
    expected = zoo.reference(family).forward(
        model, second, *tools.removed_by(handle.plan), **options(handle.plan)
    )
    for layer, old in enumerate(before):
        if old is None:
            continue
        now = cache.layers[layer].keys
        assert torch.equal(old, now[:, :, : old.shape[2]])
        assert now.shape[2] == old.shape[2] + 1 + sum(expected.alive[layer])  # 1: the answer's last token


@pytest.mark.capability("turns with new pictures")
@tools.each_family
@tools.each_rule
def test_an_answer_to_a_new_picture(family, settings):
    """Decoding on from the second turn: a chunk of several tokens is what the same tokens are one by one."""
    model, results = tools.build(family), []
    text = tools.prompt(family, [7], seeds=[8])
    with tools.patch(model, family, **settings):
        for cut in (1, 4):
            first, sequences, cache = first_turn(model, family, tools.mixed(family))
            inputs = follow_up(model, first, sequences, second_turn(family), cache)
            tools.forward(model, inputs)
            known, new = cache.get_seq_length(), text["input_ids"]
            last = inputs["position_ids"].amax(dim=-1, keepdim=True)
            logits = []
            for start in range(0, new.shape[1], cut):
                piece = new[:, start : start + cut]
                step = torch.arange(start + 1, start + 1 + piece.shape[1])
                extra = {"mm_token_type_ids": torch.zeros_like(piece)} if "mm_token_type_ids" in text else {}
                call = {
                    "input_ids": piece,
                    "attention_mask": torch.ones(1, known + start + piece.shape[1], dtype=torch.long),
                    "position_ids": last + step,
                    "past_key_values": cache,
                }
                logits.append(tools.forward(model, call | extra).logits)
            results.append(torch.cat(logits, dim=1))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


@pytest.mark.capability("turns with new pictures")
@tools.each_family
@tools.each_rule
def test_pictures_after_a_padded_turn_of_text(family, settings):
    """The first turn's padding lies in a cache that no merge has touched yet; nobody may see it."""
    model, results = tools.build(family), []
    first_rows = [(0, [9]), (1, [4])]
    picture = tools.pictures_of(zoo.FAMILIES[family].KINDS["one picture"])[0]
    with tools.patch(model, family, **settings):
        for group in (first_rows, first_rows[:1], first_rows[1:]):
            seeds = [seed for seed, _ in group]
            first = tools.prompt(family, *(row for _, row in group), seeds=seeds)
            out = tools.generate(model, first, do_sample=False, return_dict_in_generate=True)
            second = tools.prompt(family, *[[3, picture, 4]] * len(group), seeds=[seed + 5 for seed in seeds])
            inputs = follow_up(model, first, out.sequences, second, out.past_key_values)
            results.append(tools.forward(model, inputs).logits)
    torch.testing.assert_close(results[0], torch.cat(results[1:]), atol=1e-4, rtol=1e-4)
