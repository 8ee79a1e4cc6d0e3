"""The rivals of benchmarks/rivals: each against its definition, written anew with loops over one picture.

What a definition starts from (attention, features, projections) is read off the unpatched model wherever it
can be, and only else from what the method was given.
"""

import math

import numpy as np
import pytest
import torch
from PIL import Image as PIL

from contract import tools
from rivals import ABSENT, RIVALS, area, match_compute
from rivals import aim as aim_file
from rivals.common import seams_of
from rivals.smaller_picture import size_of
from zoo.common import Image

FAMILIES = ("qwen2_5_vl", "internvl")
PATCHING = [name for name, rival in RIVALS.items() if rival.plan_of is not None]
OURS = ["illava", "illava recycle", "illava paper"]
EXACT = [name for name in PATCHING if name not in (*OURS, "random")]
ONE = {"qwen2_5_vl": [[5, Image(140, 168, 1), 7]], "internvl": [[4, Image(100, 90, 3), 6]]}
each_family = pytest.mark.parametrize("family", FAMILIES)
each_patching = pytest.mark.parametrize("name", PATCHING)


def one(family):
    """A model, one picture of one tile, its visual places, and its tokens."""
    model, inputs = tools.build(family), tools.prompt(family, *ONE[family])
    places = tools.visual_places(model, inputs)
    return model, inputs, places, len(places)


def watched(model, inputs, monkeypatch, name, ratio):
    """Every merge of a call: what was to choose from, and the decision."""
    seen = tools.watch_decisions(monkeypatch)
    with RIVALS[name].patch(model, final_ratio=ratio):
        tools.forward(model, inputs)
    return seen


def kept(c, decision, segment=0):
    """Places of a segment's survivors among its candidates."""
    own = c.index[segment, : c.counts[segment]]
    return decision.keep[own].nonzero().flatten().tolist()


def blended(c, decision, segment=0):
    """What the survivors have become, `[P, g*d]`."""
    own = c.index[segment, : c.counts[segment]]
    return decision.blend(c.features)[own][kept(c, decision, segment)].flatten(1)


def own(c, x, segment=0):
    """A segment's rows of something with a row per unit."""
    return x[c.index[segment, : c.counts[segment]]]


def top(scores, number):
    """Places of the highest, ascending; the earlier of equal ones."""
    return sorted(sorted(range(len(scores)), key=lambda i: -float(scores[i]))[:number])


def attentions(family, inputs):
    """`[H, L, L]` per decoder layer of the unpatched model."""
    out = tools.forward(
        tools.build(family, "eager"), inputs, output_attentions=True, output_hidden_states=True
    )
    return [x[0] for x in out.attentions], [x[0] for x in out.hidden_states]


def outputs_of(model, modules, inputs):
    """What modules of the unpatched model put out."""
    caught = {}
    hooks = [
        m.register_forward_hook(lambda m, a, o, i=i: caught.update({i: o})) for i, m in enumerate(modules)
    ]
    try:
        tools.forward(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return [caught[i] for i in range(len(modules))]


def embeddings(model, inputs):
    """What the decoder of the unpatched model is given, `[L, d]`."""
    caught = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda m, a, k: caught.append(k["inputs_embeds"]), with_kwargs=True
    )
    try:
        tools.forward(model, inputs)
    finally:
        hook.remove()
    return caught[0][0]


# All of them ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.333, 0.111])
@each_patching
@each_family
def test_tokens_are_really_gone_layer_by_layer(family, name, ratio):
    """Counted where they are held: rows that enter each encoder block, keys in each layer's cache."""
    model, inputs, places, tokens = one(family)
    entered, hooks = [], []
    for block in tools.blocks(model):
        hooks.append(block.register_forward_pre_hook(lambda m, a: entered.append(a[0].shape[-2])))
    with RIVALS[name].patch(model, final_ratio=ratio) as handle:
        for hook in hooks:  # only now: what a hook of the patch shortens is seen by later ones
            hook.remove()
        hooks = [
            b.register_forward_pre_hook(lambda m, a: entered.append(a[0].shape[-2]))
            for b in tools.blocks(model)
        ]
        out = tools.forward(model, inputs, use_cache=True)
        report = handle.report
    for hook in hooks:
        hook.remove()
    text = inputs["input_ids"].shape[1] - tokens
    vit, llm = RIVALS[name].token_counts(model, visual_tokens=tokens, final_ratio=ratio)
    unit, prefix = (4, 0) if family == "qwen2_5_vl" else (4, 1)
    assert [(n - prefix) / unit for n in entered] == pytest.approx([share * tokens for share in vit])
    assert [n - text for n in tools.held(out.past_key_values)] == pytest.approx([s * tokens for s in llm])
    (picture,) = report.pictures
    done = RIVALS[name].schedule(model, visual_tokens=tokens, final_ratio=ratio)
    assert [(r.layer, r.tokens_in, r.tokens_out) for r in picture.layers] == [*done.vit, *done.llm]
    wanted = max(1, round(ratio * tokens))
    if name in EXACT:
        assert report.final_tokens == wanted
    assert abs(report.final_tokens - wanted) <= len(done.vit + done.llm) / 2 + 1
    assert report.final_tokens < tokens


@each_patching
@each_family
def test_rows_of_a_batch_are_the_rows_alone(family, name):
    model, rows = tools.build(family), tools.zoo.FAMILIES[family].KINDS["batch"]
    together = tools.prompt_of(family, "batch")
    with RIVALS[name].patch(model, final_ratio=0.25):
        logits = tools.forward(model, together).logits
        for number, row in enumerate(rows):
            alone = tools.forward(model, tools.prompt(family, row, seeds=[number])).logits[0]
            torch.testing.assert_close(logits[number, -1], alone[-1], atol=1e-4, rtol=1e-4)


@each_patching
@each_family
def test_text_is_untouched_and_nothing_stays(family, name):
    model, text = tools.build(family), tools.prompt_of(family, "text only")
    pictures = tools.prompt_of(family, tools.mixed(family))
    tools.forward(model, pictures, output_hidden_states=True)
    before, plain, words = (
        tools.trace(model),
        tools.forward(model, pictures).logits,
        tools.forward(model, text),
    )
    with RIVALS[name].patch(model, final_ratio=0.25):
        assert not torch.equal(tools.forward(model, pictures).logits, plain)
        assert torch.equal(tools.forward(model, text).logits, words.logits)
    assert tools.trace(model) == before
    assert torch.equal(tools.forward(model, pictures).logits, plain)


@each_patching
@each_family
def test_generating_goes_on_from_what_is_left(family, name):
    """Decoding over the cache gives what one longer call gives."""
    model, inputs = tools.build(family), tools.prompt_of(family, tools.mixed(family))
    with RIVALS[name].patch(model, final_ratio=0.25) as handle:
        _, logits, cache = tools.greedy(model, inputs, tokens=3)
        assert handle.report.reduction > 0.7
        prefill = tools.forward(model, inputs, use_cache=True)
        torch.testing.assert_close(logits[:, 0], prefill.logits[:, -1].float(), atol=1e-4, rtol=1e-4)
    held = tools.held(prefill.past_key_values)
    assert tools.held(cache) == [n + 2 for n in held]


def test_the_table():
    first = ["unpatched", "random", "smaller picture", "average pooling", "FastV", "PyramidDrop", "SparseVLM"]
    then = ["VisionZip", "FasterVLM", "DivPrune", "LLaVA-PruMerge+", "ToMe", "AIM", "FEATHER"]
    assert list(RIVALS) == [*first, *then, *OURS]
    assert list(ABSENT) == ["AdaFV"]
    assert all(rival.source and rival.stages for rival in RIVALS.values())


@each_family
def test_no_op_and_ratio_1_leave_the_model_alone(family):
    model = tools.build(family)
    before = tools.trace(model)
    for name, ratio in [("unpatched", 0.1), ("smaller picture", 0.1), *((name, 1.0) for name in PATCHING)]:
        with RIVALS[name].patch(model, final_ratio=ratio):
            assert tools.trace(model) == before


# Compute --------------------------------------------------------------------------------------------


@each_family
def test_equal_compute(family):
    model = tools.build(family)
    for target in (0.9, 0.75, 0.4):
        for name, rival in RIVALS.items():
            found = match_compute(model, rival, visual_tokens=1024, target=target)
            if found.final_ratio is None:
                assert found.area > target
                assert found.reason
                assert rival.stages not in ("both", "input") or found.area > target
                continue
            now = area(model, rival, visual_tokens=1024, final_ratio=found.final_ratio)
            assert now == found.area <= target * (1 + 1e-6)
            assert found.area > target - 0.02, name
    assert match_compute(model, RIVALS["FastV"], visual_tokens=1024, target=0.4).final_ratio is None
    assert match_compute(model, RIVALS["unpatched"], visual_tokens=1024, target=0.9).final_ratio is None
    assert area(model, RIVALS["unpatched"], visual_tokens=64, final_ratio=0.1) == 1


@each_family
def test_area_by_hand(family):
    """FastV at a quarter: two of four decoder layers see all tokens, two see a quarter."""
    model = tools.build(family)
    expected = (4 + 2 + 2 / 4) / (4 + 4)
    assert area(model, RIVALS["FastV"], visual_tokens=64, final_ratio=0.25) == pytest.approx(expected)


# Pictures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.5, 0.333, 0.222, 0.111, 0.05])
@pytest.mark.parametrize("size", [(672, 672), (280, 560), (560, 196)])
def test_smaller_picture(size, ratio):
    height, width = size_of(*size, ratio, 28)
    assert height % 28 == width % 28 == 0
    tokens, wanted = height * width // 28**2, ratio * size[0] * size[1] // 28**2
    assert tokens == pytest.approx(wanted, rel=0.25, abs=1.1)
    assert abs(math.log(height / width / (size[0] / size[1]))) < 0.5
    picture, video = PIL.new("RGB", size[::-1]), np.zeros((3, *size, 3), np.uint8)
    shown = RIVALS["smaller picture"].prepare([picture, video], final_ratio=ratio)
    assert (shown[0].height, shown[0].width) == (height, width)
    assert shown[1].shape == (3, height, width, 3)
    assert RIVALS["FastV"].prepare([picture], final_ratio=ratio) == [picture]


# In the language model ------------------------------------------------------------------------------


@each_family
def test_fastv(family, monkeypatch):
    model, inputs, places, tokens = one(family)
    weights, hidden = attentions(family, inputs)
    ((c, decision),) = watched(model, inputs, monkeypatch, "FastV", 0.3)
    scores = [sum(float(head[-1, p]) for head in weights[1]) for p in places]
    assert kept(c, decision) == top(scores, round(0.3 * tokens))
    torch.testing.assert_close(
        blended(c, decision), hidden[2][places[kept(c, decision)]], atol=1e-5, rtol=1e-5
    )


@each_family
def test_pyramiddrop(family, monkeypatch):
    """By the attention of the layer after: at the first drop that is the unpatched model's own."""
    model, inputs, places, tokens = one(family)
    weights, _ = attentions(family, inputs)
    merges = watched(model, inputs, monkeypatch, "PyramidDrop", 0.125)
    assert [c.layer for c, _ in merges] == [0, 1, 2]
    shares = [0.5, 0.25, 0.125]
    c, decision = merges[0]
    scores = [sum(float(head[-1, p]) for head in weights[1]) for p in places]
    assert kept(c, decision) == top(scores, round(0.5 * tokens))
    assert [c.keep_counts[0] for c, _ in merges] == [round(share * tokens) for share in shares]


@each_family
def test_feather(family, monkeypatch):
    model, inputs, places, tokens = one(family)
    seams = seams_of(model)
    attend = seams.layers[0].self_attn
    q, k = outputs_of(model, [attend.q_proj, attend.k_proj], inputs)
    size = attend.head_dim
    heads, groups = q.shape[-1] // size, q.shape[-1] // k.shape[-1]
    scores = torch.zeros(tokens)
    for head in range(heads):
        mine, theirs = slice(head * size, (head + 1) * size), head // groups
        keys = k[0, places, theirs * size : (theirs + 1) * size]
        scores += (keys @ q[0, -1, mine] / size**0.5).softmax(0)
    (c, decision), (later, _) = watched(model, inputs, monkeypatch, "FEATHER", 0.2)
    width = 6 if family == "qwen2_5_vl" else 4
    grid = [i for i in range(tokens) if i // width % 3 == 0 and i % width % 3 == 0]
    rest = sorted((i for i in range(tokens) if i not in grid), key=lambda i: -float(scores[i]))
    assert kept(c, decision) == sorted(grid + rest[: c.keep_counts[0] - len(grid)])
    q = next(x / 1e4 for x in range(10001) if (x / 1e4 + (1 - x / 1e4) / 9) * (x / 1e4) ** 2 >= 0.2)
    assert c.keep_counts[0] == round((q + (1 - q) / 9) * tokens)
    assert later.keep_counts[0] == round(0.2 * tokens)


@each_family
def test_sparsevlm(family, monkeypatch):
    model, inputs, places, tokens = one(family)
    weights, hidden = attentions(family, inputs)
    given = embeddings(model, inputs)
    words = list(range(int(places.max()) + 1, len(given)))
    rated = torch.zeros(len(words))
    for p in places:
        rated += torch.tensor([float(given[p] @ given[w]) for w in words]).softmax(0) / tokens
    raters = [w for w, r in zip(words, rated, strict=True) if r > rated.mean()]
    assert raters
    scores = torch.stack([weights[0][:, r][:, places].mean(0) for r in raters]).mean(0)

    c, decision = watched(model, inputs, monkeypatch, "SparseVLM", 0.2)[0]
    number = c.keep_counts[0]
    centres = (int(0.3 * (tokens - number)) + 1) // 10 + 1
    order = sorted(range(tokens), key=lambda i: -float(scores[i]))
    stay, rest = order[: number - centres], order[number - centres :]
    pool = rest[: max(centres, int(len(rest) * 0.3) + 1)]
    x = hidden[1][places][pool]
    apart = [[float((a - b).norm()) / x.shape[1] ** 0.5 for b in x] for a in x]
    density = [math.exp(-sum(d * d for d in sorted(row)[:centres]) / centres) for row in apart]
    furthest = max(map(max, apart))
    peak = [
        min([apart[i][j] for j in range(len(pool)) if density[j] > density[i]] or [furthest]) * density[i]
        for i in range(len(pool))
    ]
    heads = sorted(range(len(pool)), key=lambda i: -peak[i])[:centres]
    assert kept(c, decision) == sorted(stay + [pool[h] for h in heads])
    members = {pool[h]: [] for h in heads}
    for i in range(len(pool)):
        nearest = i if i in heads else min(heads, key=lambda h: apart[i][h])
        members[pool[nearest]].append(pool[i])
    for place, row in zip(kept(c, decision), blended(c, decision), strict=True):
        group = members.get(place, [place])
        torch.testing.assert_close(row, hidden[1][places][group].mean(0), atol=1e-5, rtol=1e-5)


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


@each_family
def test_divprune(family, monkeypatch):
    model, inputs, places, tokens = one(family)
    x = embeddings(model, inputs)[places]
    ((c, decision),) = watched(model, inputs, monkeypatch, "DivPrune", 0.3)
    far = [[1 - cosine(a, b) for b in x] for a in x]
    chosen = [max(range(tokens), key=lambda i: min(d for j, d in enumerate(far[i]) if j != i))]
    while len(chosen) < round(0.3 * tokens):
        others = [i for i in range(tokens) if i not in chosen]
        chosen.append(max(others, key=lambda i: min(far[i][j] for j in chosen)))
    assert kept(c, decision) == sorted(chosen)
    torch.testing.assert_close(blended(c, decision), x[sorted(chosen)], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ratio", [0.6, 0.1])
@each_family
def test_aim_merging(family, ratio, monkeypatch):
    """Rounds of plain means of the best pairs, even places into odd ones, at most half a round."""
    model, inputs, places, tokens = one(family)
    x = embeddings(model, inputs)[places]
    c, decision = watched(model, inputs, monkeypatch, "AIM", ratio)[0]
    left, features = list(range(tokens)), [row for row in x]
    while len(left) > round(math.sqrt(ratio) * tokens):
        odd = range(1, len(left), 2)
        pairs = []
        for i in range(0, len(left), 2):
            likeness = [cosine(features[i], features[j]) for j in odd]
            pairs.append((-max(likeness), i, odd[likeness.index(max(likeness))]))
        gone = sorted(pairs)[: len(left) - round(math.sqrt(ratio) * tokens)]
        into = {j: [features[j]] for j in odd}
        for _, i, j in gone:
            into[j].append(features[i])
        for j, group in into.items():
            features[j] = torch.stack(group).mean(0)
        stay = [i for i in range(len(left)) if i not in [i for _, i, _ in gone]]
        left, features = [left[i] for i in stay], [features[i] for i in stay]
    assert kept(c, decision) == left
    torch.testing.assert_close(blended(c, decision), torch.stack(features), atol=1e-4, rtol=1e-4)


@each_family
def test_aim_pruning(family, monkeypatch):
    model, inputs, _, tokens = one(family)
    c, decision = watched(model, inputs, monkeypatch, "AIM", 0.1)[-1]
    assert c.layer >= 2
    positions = c.sequences.positions[0]
    real = [i for i in range(len(positions)) if positions[i] >= 0]
    ranks = []
    heads, groups = c.queries.shape[2], c.queries.shape[2] // c.keys.shape[2]
    for h in range(heads):
        rank = [1 / len(real)] * len(real)
        rows = []
        for i in real:
            seen = [j for j in real if positions[j] <= positions[i]]
            logits = torch.stack([c.queries[i, 0, h] @ c.keys[j, 0, h // groups] for j in seen])
            rows.append(dict(zip(seen, (logits * c.scale / 0.1).softmax(0).tolist(), strict=True)))
        for _ in range(5):
            rank = [sum(r * row.get(j, 0) for r, row in zip(rank, rows, strict=True)) for j in real]
        ranks.append(rank)
    score = {j: math.sqrt(sum(r[n] ** 2 for r in ranks) / heads) for n, j in enumerate(real)}
    mine = [score[int(i)] for i in c.index[0, : c.counts[0]]]
    assert kept(c, decision) == top(mine, round(0.1 * tokens) or 1)
    torch.testing.assert_close(aim_file.page_rank(c)[0], torch.tensor(mine), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("ratio", [0.9, 0.45, 0.111])
@each_family
def test_average_pooling(family, ratio, monkeypatch):
    """Cells are rectangles that tile the grid, and each becomes the mean of its tokens."""
    model, inputs, places, tokens = one(family)
    x = embeddings(model, inputs)[places]
    ((c, decision),) = watched(model, inputs, monkeypatch, "average pooling", ratio)
    weights = decision.mixture[0]
    width = 6 if family == "qwen2_5_vl" else 4
    cells = [[i for i in range(tokens) if row[i] > 0] for row in weights]
    assert sorted(i for cell in cells for i in cell) == list(range(tokens))
    assert len(cells) == round(ratio * tokens)
    for cell, row, place in zip(cells, blended(c, decision), kept(c, decision), strict=True):
        rows, columns = {i // width for i in cell}, {i % width for i in cell}
        assert len(cell) == len(rows) * len(columns) == (max(rows) - min(rows) + 1) * len(columns)
        assert len(columns) == max(columns) - min(columns) + 1
        assert place in cell
        torch.testing.assert_close(row, x[cell].mean(0), atol=1e-5, rtol=1e-5)
    sizes = [len(cell) for cell in cells]
    assert max(sizes) <= 4 * min(sizes)


def test_average_pooling_shares_a_video_among_its_frames(monkeypatch):
    model, inputs = tools.build("qwen2_5_vl"), tools.prompt_of("qwen2_5_vl", "video")
    ((c, decision),) = watched(model, inputs, monkeypatch, "average pooling", 0.3)
    frames = [int(c.place[0, i, 0]) for i in kept(c, decision)]
    counts = [frames.count(f) for f in sorted(set(c.place[0, :, 0].tolist()))]
    assert len(counts) > 1
    assert max(counts) - min(counts) <= 1


# In the encoder -------------------------------------------------------------------------------------


def class_attention(model, inputs):
    """`[units]` attention from CLS in the last block, averaged over heads and a unit's patches, by hand."""
    attend = tools.blocks(model)[-1].attention
    q, k = (x[0] for x in outputs_of(model, [attend.q_proj, attend.k_proj], inputs))
    size = attend.head_dim
    scores = torch.zeros(len(k))
    for h in range(0, q.shape[-1], size):
        scores += (k[:, h : h + size] @ q[0, h : h + size] / size**0.5).softmax(0) / (q.shape[-1] // size)
    grid, side = scores[1:], int((len(scores) - 1) ** 0.5)
    units = []
    for row in range(0, side, 2):
        for column in range(0, side, 2):
            four = [(row + i) * side + column + j for i in (0, 1) for j in (0, 1)]
            units.append(float(grid[four].mean()))
    return torch.tensor(units)


def importance(family, model, inputs, c):
    if family == "internvl":
        by_hand = class_attention(model, inputs)
        torch.testing.assert_close(c.class_attention[0], by_hand, atol=1e-6, rtol=1e-4)
        return by_hand
    assert c.class_attention is None
    return c.attention[0]


@each_family
def test_fastervlm(family, monkeypatch):
    model, inputs, _, tokens = one(family)
    ((c, decision),) = watched(model, inputs, monkeypatch, "FasterVLM", 0.3)
    assert c.layer == len(tools.blocks(model))
    assert kept(c, decision) == top(importance(family, model, inputs, c), round(0.3 * tokens))
    (last,) = outputs_of(model, [tools.blocks(model)[-1]], inputs)
    last = (last[0] if isinstance(last, tuple) else last).reshape(-1, c.features.shape[-1])
    for patch in blended(c, decision).unflatten(1, (c.features.shape[1], -1)).flatten(0, 1):
        assert (last - patch).abs().max(1).values.min() < 1e-4  # one of the last block's own outputs


def keys_of(c):
    """A list of each unit's keys, the mean over heads, patch after patch."""
    return [torch.cat([patch.mean(0) for patch in unit]) for unit in own(c, c.keys)]


@each_family
def test_visionzip(family, monkeypatch):
    model, inputs, _, tokens = one(family)
    ((c, decision),) = watched(model, inputs, monkeypatch, "VisionZip", 0.4)
    number = round(0.4 * tokens)
    contextual = max(1, round(number * 10 / 64))
    dominant = top(importance(family, model, inputs, c), number - contextual)
    rest = [i for i in range(tokens) if i not in dominant]
    targets = rest[:: len(rest) // contextual][:contextual]
    assert kept(c, decision) == sorted(dominant + targets)
    keys, x = keys_of(c), own(c, c.features).flatten(1)
    joined = {t: [] for t in targets}
    for i in rest:
        if i not in targets:
            joined[max(targets, key=lambda t: cosine(keys[i], keys[t]))].append(x[i])
    for place, row in zip(kept(c, decision), blended(c, decision), strict=True):
        extra = joined.get(place)
        expected = x[place] + torch.stack(extra).mean(0) if extra else x[place]
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-5)


@each_family
def test_prumerge(family, monkeypatch):
    model, inputs, _, tokens = one(family)
    ((c, decision),) = watched(model, inputs, monkeypatch, "LLaVA-PruMerge+", 0.4)
    number, seen = round(0.4 * tokens), importance(family, model, inputs, c)
    attended = top(seen, round(number / 4))
    rest = [i for i in range(tokens) if i not in attended]
    spaced = number - len(attended) - 1
    even = [rest[math.floor((i + 0.5) * len(rest) / spaced)] for i in range(spaced)]
    (extra,) = (max((i for i in rest if i not in even), key=lambda i: float(seen[i])),)
    assert kept(c, decision) == sorted([*attended, *even, extra])
    keys, x, weight = keys_of(c), own(c, c.features).flatten(1), seen * c.features.shape[1]
    for place, row in zip(kept(c, decision), blended(c, decision), strict=True):
        if place == extra:
            group, expected = [i for i in rest if i not in even], torch.zeros_like(row)
        else:
            near = sorted(
                (i for i in range(tokens) if i != place), key=lambda i: -cosine(keys[place], keys[i])
            )
            group, expected = near[:32], x[place].clone()
        for i in group:
            expected += weight[i] * x[i]
        torch.testing.assert_close(row, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("ratio", [0.5, 0.15])
@each_family
def test_tome(family, ratio, monkeypatch):
    model, inputs, _, tokens = one(family)
    merges = watched(model, inputs, monkeypatch, "ToMe", ratio)
    assert [c.layer for c, _ in merges] == list(range(len(tools.blocks(model))))
    sizes = [1] * tokens
    for c, decision in merges:
        keys, x, number = keys_of(c), own(c, c.features).flatten(1), c.counts[0]
        assert own(c, c.sizes).tolist() == sizes
        pairs = []
        for a in range(0, number, 2):
            likeness = {b: cosine(keys[a], keys[b]) for b in range(1, number, 2)}
            b = max(likeness, key=likeness.get)
            pairs.append((-likeness[b], a, b))
        groups = {i: [i] for i in range(number)}
        for _, a, b in sorted(pairs)[: number - c.keep_counts[0]]:
            groups[b].append(a)
            del groups[a]
        assert kept(c, decision) == sorted(groups)
        for place, row in zip(sorted(groups), blended(c, decision), strict=True):
            group = groups[place]
            expected = sum(sizes[i] * x[i] for i in group) / sum(sizes[i] for i in group)
            torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-5)
        sizes = [sum(sizes[i] for i in groups[place]) for place in sorted(groups)]
    assert sum(sizes) == tokens


@each_family
def test_random(family, monkeypatch):
    model, inputs, _, tokens = one(family)
    first, again = (
        [kept(*merge) for merge in watched(model, inputs, monkeypatch, "random", 0.3)] for _ in range(2)
    )
    assert first == again
    assert len({tuple(places) for places in first}) == len(first)
