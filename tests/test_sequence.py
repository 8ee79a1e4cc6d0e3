"""What survives where: positions, masks, and cache layers of different lengths."""

import copy

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import illava
import tiny
from illava.sequence import (
    MergedLayer,
    attention_mask,
    cache_layer,
    check_cache,
    expand_rows,
    is_merged,
    later_text,
    take_rows,
    valid_positions,
)

HEADS, D = 2, 3


def states(positions):
    """Keys that say which position of which row they are: `[B, HEADS, n, D]`."""
    rows = torch.arange(len(positions))[:, None] * 1000
    return (rows + positions).float()[:, None, :, None].expand(-1, HEADS, -1, D).contiguous()


def told(layer):
    """Positions that a layer's keys say they are, padding -1 wherever the layer marks it."""
    said = (layer.keys[:, 0, :, 0] % 1000).long()
    return said.masked_fill(layer.positions < 0, -1)


def fill(layer, positions, new_tokens, mark=None):
    positions = torch.tensor(positions)
    layer.expect(positions, new_tokens, bool((positions < 0).any()), mark)
    return layer.update(states(positions), -states(positions))


@pytest.fixture
def layer():
    """Two rows of ten tokens of the caller, of which five and three are held."""
    layer = MergedLayer()
    fill(layer, [[0, 2, 3, 8, 9], [-1, -1, 1, 7, 9]], 10, mark=(0, 3))
    return layer


def assert_consistent(layer):
    assert torch.equal(told(layer), layer.positions)
    assert torch.equal(layer.keys, -layer.values)
    assert layer.keys.shape[2] == layer.positions.shape[1]
    assert layer.ragged == bool((layer.positions < 0).any())


# ---------------------------------------------------------------- a layer


def test_a_new_layer_is_empty():
    layer = MergedLayer()
    assert (layer.get_seq_length(), layer.positions, layer.ragged, layer.history) == (0, None, False, ())


def test_update_keeps_keys_and_positions_together(layer):
    assert_consistent(layer)
    assert layer.get_seq_length() == 10, "the caller's length, not the five keys"
    assert layer.history == ((0, 3),)
    keys, values = fill(layer, [[10], [10]], 1)
    assert keys.shape == values.shape == (2, HEADS, 6, D)
    assert layer.positions.tolist() == [[0, 2, 3, 8, 9, 10], [-1, -1, 1, 7, 9, 10]]
    assert layer.get_seq_length() == 11
    assert layer.history == ((0, 3),)
    assert_consistent(layer)


def test_a_layer_that_was_full_becomes_ragged_and_stays_so(layer):
    layer = MergedLayer()
    fill(layer, [[0, 1], [0, 1]], 2)
    assert not layer.ragged
    fill(layer, [[2, 5], [-1, 4]], 4, mark=(1, 0))
    fill(layer, [[6], [6]], 1)
    assert layer.ragged
    assert layer.history == ((1, 0),)
    assert_consistent(layer)


def test_mask_sizes_speak_of_the_callers_length(layer):
    assert layer.get_mask_sizes(4) == (14, 0)  # transformers 5 asks with a number
    assert layer.get_mask_sizes(torch.arange(4)) == (14, 0)  # 4.57 with cache positions


def test_an_update_that_nobody_announced_is_refused(layer):
    positions = torch.tensor([[10], [10]])
    with pytest.raises(illava.CacheError, match=r"holds 10 tokens.*Patch the model again, or .*new cache"):
        layer.update(states(positions), states(positions))
    assert layer.get_seq_length() == 10
    assert_consistent(layer)


def test_an_announcement_counts_once(layer):
    fill(layer, [[10], [10]], 1)
    with pytest.raises(illava.CacheError):
        layer.update(states(torch.tensor([[11], [11]])), states(torch.tensor([[11], [11]])))


CROPS = [
    (9, [[0, 2, 3, 8], [-1, -1, 1, 7]]),
    (8, [[0, 2, 3], [-1, 1, 7]]),
    (4, [[0, 2, 3], [-1, -1, 1]]),
    (2, [[0], [1]]),
    (1, [[0], [-1]]),
]


@pytest.mark.parametrize("kind", [int, torch.tensor])
@pytest.mark.parametrize("convention", ["negative", "positive"])
@pytest.mark.parametrize(("target", "positions"), CROPS)
def test_crop_forgets_the_callers_last_tokens(layer, target, positions, convention, kind):
    """`-n` forgets n tokens (transformers 4.57 and 5); a positive length (4.57) keeps that many.

    Assisted decoding in transformers 5.17 says how many in a tensor; what is left is a number all the same.
    """
    layer.crop(kind(target - 10 if convention == "negative" else target))
    assert layer.positions.tolist() == positions
    assert layer.get_seq_length() == target
    assert type(layer.get_seq_length()) is int
    assert_consistent(layer)
    fill(layer, [[target], [target]], 1)
    assert layer.positions[:, -1].tolist() == [target] * 2
    assert_consistent(layer)


def test_crop_pushes_a_ragged_row_back_to_the_right():
    """Rows lose different numbers of keys; the last key of each must end in the last column."""
    layer = MergedLayer()
    fill(layer, [[0, 1, 2, 3], [-1, 0, 8, 9]], 10)
    layer.crop(-4)
    assert layer.positions.tolist() == [[0, 1, 2, 3], [-1, -1, -1, 0]]
    assert_consistent(layer)


@pytest.mark.parametrize("tokens", [0, 10, 99])
def test_crops_that_forget_nothing(layer, tokens):
    before = layer.positions
    layer.crop(tokens)
    assert layer.positions is before
    assert layer.get_seq_length() == 10


def test_crop_of_an_empty_layer():
    layer = MergedLayer()
    layer.crop(-3)
    layer.crop(3)
    assert (layer.positions, layer.get_seq_length()) == (None, 0)


@pytest.mark.parametrize("tokens", [-10, -15])
def test_crop_of_everything_leaves_an_empty_sequence(layer, tokens):
    """As a plain layer, which holds no key and says 0."""
    layer.crop(tokens)
    assert layer.keys.shape[2] == 0
    assert layer.get_seq_length() == 0


def test_reorder_for_beams(layer):
    layer.reorder_cache(torch.tensor([1, 1, 0]))
    assert layer.positions[:, 2].tolist() == [1, 1, 3]
    assert layer.keys[:, 0, -1, 0].tolist() == [1009, 1009, 9]
    assert_consistent(layer)


def test_repeat_for_beams(layer):
    layer.batch_repeat_interleave(3)
    assert layer.positions[:, 0].tolist() == [0, 0, 0, -1, -1, -1]
    assert layer.keys[:, 0, -1, 0].tolist() == [9, 9, 9, 1009, 1009, 1009]
    assert_consistent(layer)


def test_select_rows(layer):
    layer.batch_select_indices(torch.tensor([1]))
    assert layer.positions.tolist() == [[-1, -1, 1, 7, 9]]
    assert layer.keys[:, 0, -1, 0].tolist() == [1009]
    assert_consistent(layer)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.reorder_cache(torch.tensor([0])),
        lambda x: x.batch_repeat_interleave(2),
        lambda x: x.batch_select_indices(torch.tensor([0])),
        lambda x: x.reset(),
    ],
    ids=["reorder", "repeat", "select", "reset"],
)
def test_an_empty_layer_has_no_rows_to_change(change):
    layer = MergedLayer()
    change(layer)
    assert (layer.positions, layer.get_seq_length(), layer.keys) == (None, 0, None)


def test_reset_forgets_everything(layer):
    layer.reset()
    assert (layer.positions, layer.seen, layer.ragged, layer.history) == (None, 0, False, ())
    assert (layer.keys, layer.values, layer.is_initialized) == (None, None, False)
    fill(layer, [[0, 4]], 5)
    assert_consistent(layer)
    assert layer.get_seq_length() == 5


def test_a_copy_goes_its_own_way(layer):
    twin = copy.deepcopy(layer)
    fill(twin, [[10], [10]], 1, mark=(1, 0))
    layer.crop(-8)
    assert twin.positions.tolist() == [[0, 2, 3, 8, 9, 10], [-1, -1, 1, 7, 9, 10]]
    assert (twin.seen, layer.seen) == (11, 2)
    assert (twin.history, layer.history) == (((0, 3), (1, 0)), ((0, 3),))
    assert_consistent(twin)
    assert_consistent(layer)


# ---------------------------------------------------------------- a cache


@pytest.mark.parametrize("filled", [False, True])
def test_a_dynamic_cache_can_hold_merged_sequences(filled):
    cache = DynamicCache()
    if filled:
        cache.update(torch.zeros(1, 2, 4, 3), torch.zeros(1, 2, 4, 3), 0)
    check_cache(cache)
    check_cache(None)
    assert not is_merged(cache)
    cache_layer(cache, 1, 1, torch.device("cpu"))
    check_cache(cache)
    assert is_merged(cache)


def sliding():
    cache = DynamicCache()
    cache.layers.append(DynamicLayer())
    cache.layers.append(DynamicSlidingWindowLayer(sliding_window=4))
    return cache


class QuantizedLikeLayer(DynamicLayer):
    """Quantised layers are subclasses of the dynamic one that keep their keys elsewhere."""


def quantized():
    cache = DynamicCache()
    cache.layers.append(QuantizedLikeLayer())
    return cache


CACHES = {
    "StaticCache": lambda: StaticCache(tiny.build("qwen2_vl", layers=1).config.text_config, max_cache_len=8),
    "DynamicSlidingWindowLayer": sliding,
    "QuantizedLikeLayer": quantized,
    "tuple": lambda: ((torch.zeros(1, 2, 4, 3), torch.zeros(1, 2, 4, 3)),),
    "list": list,
    "EncoderDecoderCache": lambda: EncoderDecoderCache(DynamicCache(), DynamicCache()),
}


@pytest.mark.parametrize("name", CACHES)
def test_caches_whose_layers_cannot_differ_are_refused_by_name(name):
    with pytest.raises(illava.CacheError, match=rf"{name}.*cannot hold layers of different.*DynamicCache"):
        check_cache(CACHES[name]())


def test_other_things_are_not_merged_caches():
    assert not is_merged(None)
    assert not is_merged(((torch.zeros(1), torch.zeros(1)),))


def test_cache_layer_adopts_what_a_dynamic_layer_holds():
    cache = DynamicCache()
    keys = states(torch.arange(4).expand(2, -1))
    cache.update(keys, -keys, 0)
    layer = cache_layer(cache, 0, 2, keys.device)
    assert cache.layers[0] is layer
    assert type(layer) is MergedLayer
    assert layer.positions.tolist() == [[0, 1, 2, 3]] * 2
    assert layer.get_seq_length() == cache.get_seq_length() == 4
    assert_consistent(layer)
    fill(layer, [[4, 6], [-1, 6]], 3)
    assert layer.keys.shape == (2, HEADS, 6, D)
    assert_consistent(layer)


def test_cache_layer_makes_the_layers_that_are_missing_and_finds_them_again():
    cache = DynamicCache()
    layer = cache_layer(cache, 2, 1, torch.device("cpu"))
    assert len(cache.layers) == 3
    assert [type(x) for x in cache.layers] == [DynamicLayer, DynamicLayer, MergedLayer]
    assert cache_layer(cache, 2, 1, torch.device("cpu")) is layer
    fill(layer, [[0, 5]], 6)
    assert cache_layer(cache, 2, 1, torch.device("cpu")) is layer
    assert layer.get_seq_length() == 6


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("lead", [(), (2,), (3, 2)])
def test_take_rows(lead):
    """Indices of fewer leading dimensions are shared, as the three planes of mRoPE share a row's."""
    x, index = torch.randn(*lead, 6, D), torch.tensor([4, 0, 5])
    taken = take_rows(x, index)
    assert torch.equal(taken, x[..., [4, 0, 5], :])
    own = torch.randint(6, (*lead, 4))
    flat, flat_own = x.reshape(-1, 6, D), own.reshape(-1, 4)
    expected = torch.stack([a[b] for a, b in zip(flat, flat_own, strict=True)]).view(*lead, 4, D)
    assert torch.equal(take_rows(x, own), expected)


@pytest.mark.parametrize("length", [7, 9])
def test_expand_rows_puts_each_slot_at_its_column_and_zero_elsewhere(length):
    x = torch.randn(2, 4, D)
    columns = torch.tensor([[0, 2, 5, 6], [-1, -5, 3, 6]])
    full = expand_rows(x, columns, length)
    expected = torch.zeros(2, length, D)
    for row in range(2):
        for slot, column in enumerate(columns[row].tolist()):
            if column >= 0:
                expected[row, column] = x[row, slot]
    assert torch.equal(full, expected)


def test_expand_rows_hands_gradients_back():
    x = torch.randn(1, 3, D, requires_grad=True)
    expand_rows(x, torch.tensor([[-1, 1, 4]]), 5).sum().backward()
    assert x.grad[0, :, 0].tolist() == [0, 1, 1]


def test_valid_positions_marks_the_callers_padding_as_well():
    positions = torch.tensor([[0, 2, 3, 5], [-1, -1, 1, 4]])
    padding = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    assert valid_positions(positions, padding).tolist() == [[0, 2, 3, 5], [-1, -1, -1, 4]]
    assert valid_positions(positions, None) is positions
    assert positions[1, 2] == 1, "in place"


# ---------------------------------------------------------------- masks

MASKS = {
    "prefill": ([[0, 2, 3, 7]], 4),
    "ragged prefill": ([[0, 2, 3, 7], [-1, -1, 4, 5]], 4),
    "one token": ([[0, 2, 3, 7, 8]], 1),
    "one token, ragged": ([[0, 2, 3, 7, 8], [-1, -1, 4, 5, 8]], 1),
    "a second turn": ([[0, 2, 3, 7, 8, 9]], 2),
    "a second turn, ragged": ([[0, 2, 3, 7, 8, 9], [-1, -1, 4, 5, -1, 9]], 2),
    "a hole amid the keys": ([[0, -1, 3, -1, 8, 9]], 3),
}


def brute_force(keys, queries):
    """Who sees whom; a query that would see nobody sees itself."""
    total = len(keys[0])
    table = torch.zeros(len(keys), 1, queries, total, dtype=torch.bool)
    for row, held in enumerate(keys):
        for number in range(queries):
            own = held[total - queries + number]
            seen = [0 <= other <= own for other in held]
            if not any(seen):
                seen[total - queries + number] = True
            table[row, 0, number] = torch.tensor(seen)
    return table


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MASKS)
def test_masks(name, implementation, dtype):
    held, queries = MASKS[name]
    keys = torch.tensor(held)
    unpadded = bool((keys >= 0).all())
    mask = attention_mask(implementation, keys[:, -queries:], keys, unpadded=unpadded, dtype=dtype)
    expected = brute_force(held, queries)
    own_causal_is_right = unpadded and (queries == 1 or (implementation == "sdpa" and name == "prefill"))
    if own_causal_is_right:
        assert mask is None
        assert torch.equal(expected, torch.ones_like(expected).tril(keys.shape[1] - queries))
    elif implementation == "sdpa":
        assert torch.equal(mask, expected)
    else:
        assert mask.dtype == dtype
        assert mask.shape == expected.shape
        assert torch.equal(mask == 0, expected)
        assert (mask[~expected] == torch.finfo(dtype).min).all()


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flash_attention_3"])
@pytest.mark.parametrize("name", MASKS)
def test_masks_for_flash_attention_say_only_which_keys_are_real(name, implementation):
    keys = torch.tensor(MASKS[name][0])
    unpadded = bool((keys >= 0).all())
    queries = keys[:, -MASKS[name][1] :]
    mask = attention_mask(implementation, queries, keys, unpadded=unpadded, dtype=torch.float16)
    if unpadded:
        assert mask is None
    else:
        assert torch.equal(mask, keys >= 0)


# ---------------------------------------------------------------- text after a picture


@pytest.mark.parametrize(
    ("rows", "padding", "later"),
    [
        (["t00t"], None, [True]),
        (["t00"], None, [False]),
        (["0t11"], None, [True, False]),
        (["0t1", "22t"], None, [True, False, True]),
        (["t0..", "t1t."], ["1100", "1110"], [False, True]),
        (["t0tt", "t1tt"], ["1110", "1100"], [True, False]),
        (["00", "tt"], None, [False]),
    ],
)
def test_later_text(rows, padding, later):
    """Text of the same row only, and padding is not text."""
    segment = torch.tensor([[-1 if c in "t." else int(c) for c in row] for row in rows])
    real = torch.ones_like(segment, dtype=torch.bool)
    if padding:
        real = torch.tensor([[c == "1" for c in row] for row in padding])
    assert later_text(segment, real, len(later)) == later


# ---------------------------------------------------------------- what a patched model leaves in a cache


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_layers_before_and_after_a_merge_hold_what_the_plan_says(family):
    """Layers of equal history hold equal positions; keys are the ones those positions had."""
    model = tiny.build(family)
    cache = DynamicCache()
    with illava.patch(model, vit_layers=(), llm_layers=(0, 2), reduction=0.5) as handle, torch.no_grad():
        model(**tiny.prompt([5, tiny.A, 7]), past_key_values=cache, use_cache=True)
        total = cache.get_seq_length()
        lengths = [layer.keys.shape[2] for layer in cache.layers]
        assert [type(layer) for layer in cache.layers] == [MergedLayer] * 4
        (_, _, first), (_, _, second) = handle.plan.schedule([tiny.A.grid])[0].llm
    text = total - tiny.A.tokens
    assert lengths == [total, text + first, text + first, text + second]
    assert len({layer.history for layer in cache.layers}) == 3
    assert torch.equal(cache.layers[1].positions, cache.layers[2].positions)
    assert set(cache.layers[3].positions[0].tolist()) < set(cache.layers[1].positions[0].tolist())
    for layer in cache.layers:
        assert layer.positions[0].tolist() == sorted(layer.positions[0].tolist())
        assert layer.positions[0, -8:].tolist() == list(range(total - 8, total)), "text is never dropped"


def test_an_abandoned_update_leaves_no_expectation_for_a_reset_layer():
    """A call that failed between announcing and updating: an unpatched model must not slip in."""
    layer = MergedLayer()
    layer.expect(torch.tensor([[0, 1]]), 2, False, None)
    layer.reset()
    with pytest.raises(illava.CacheError):
        layer.update(states(torch.tensor([[0, 1]])), states(torch.tensor([[0, 1]])))
