"""Visual token merging in MiniCPM-V 4.6 and 4.7, written plainly, for tests to compare against.

One sequence, no padding, no cache. Every attention is a full matrix, every recurrence and every choice a Python
loop, and nothing is shared with the package under test. The Hugging Face model lends its weights, its norms, its
embeddings, its feed-forward modules and the feed-forward parts of its two mergers; the flow between them is spelt
out here. Give it an unpatched model: hooks would run too.

Encoder. A segment is one row of `target_sizes`: a thumbnail, a slice, a video frame (or its thumbnail, its slices).
Nothing in the encoder crosses segments, so that each is encoded by itself. A unit is one token of the language model:
4x4 patches up to the merger inside the tower, which follows block `insert_layer_id`, and 2x2 of the halved grid
after it; in "4x" mode, which skips that merger, 2x2 patches throughout. Units are held in raster order, and so are
the rows inside a unit: its patches before the merger inside the tower, its windows after it. A window of that merger
lies in one unit, so the merger sees the windows of the units alive and nothing else.

Language model. A segment is again one row of `target_sizes`. In layers of linear attention convolution and state run
over the tokens alive. They have no attention to ask, so a merge after such a layer goes by the last full-attention
layer up to it: that layer's rotated queries and keys, and the attention each token received in it from all that were
alive then. Affinities are softmaxes over
the targets present, as ever. A merge before the first full-attention layer has nothing to go by.

Where HF's flow adds to FACTS.md (nothing there is wrong):
  * the merger inside the tower leaves its windows in raster order of the halved grid: nothing is permuted after it;
  * `vision_config.insert_layer_id` is overwritten by the `insert_layer_id` of the whole config. Left out here, since
    no checkpoint has them: `merger_times` beyond 1 (units of 8x8 patches), and a negative `insert_layer_id` (the
    merger inside the tower is skipped, yet the final merger is told of halved grids);
  * queries of full-attention layers leave `q_proj` interleaved with a gate, head by head; the gate's sigmoid
    multiplies attention's output before `o_proj`. Norms of queries and keys come before the rotation, which turns
    only the first `partial_rotary_factor` of each head;
  * mRoPE is interleaved: frequencies 0, 1, 2, 3, ... turn with T, H, W, T, ... until a section is used up.
    MiniCPM-V 4.6 puts one position on all three axes, 4.7 has its own (`get_rope_index`), and its generated tokens
    stand after the largest position of the prompt;
  * a linear layer's state decays once for each token it meets: a token merged away takes its decay with it.

Sizes in the shape comments: S tokens or patches alive now, H heads, d head size, D hidden size, g patches of a unit.
"""

import torch
import torch.nn.functional as F

from references.core import (
    Merge,
    Options,
    Result,
    asking_queries,
    attend,
    copies_of,
    greedy,
    importance_of,
    merge_segment,
    rotate,
)


@torch.no_grad()
def forward(model, inputs, vit_removed, llm_removed, **options) -> Result:
    """Run prompt and pictures through the model, merging on the way.

    Args:
        model: `MiniCPMV4_6ForConditionalGeneration` or `MiniCPMV4_7ForConditionalGeneration`, fp32.
        inputs: one unpadded row, as `prompt` of the zoo gives it.
        vit_removed: called with the units of an encoder segment: encoder block -> units to remove.
        llm_removed: called with the visual tokens of a segment before any merge and with how many of them the
            encoder left alive: decoder layer -> tokens to remove.
        options: see `Options`.
    """
    options = Options(**options)
    seen, merges = see(model, inputs, vit_removed, options)
    positions = positions_of(model, inputs, len(inputs["input_ids"][0]))
    logits, read_merges, alive = read(
        model, inputs, inputs["input_ids"][0], seen, positions, llm_removed, options
    )
    features = torch.cat(seen["image"] + seen["video"] or [torch.empty(0)])
    return Result(logits, merges + read_merges, alive, features)


@torch.no_grad()
def reader(model, inputs, vit_removed, llm_removed, **options):
    """A function of the tokens of an answer: logits `[L, vocab]` of prompt and answer, run anew at each call.

    Only prompt positions are ever scored, merged or asked for attention, so the merges are the prompt's own.
    """
    options = Options(**options)
    seen, _ = see(model, inputs, vit_removed, options)
    prompt = inputs["input_ids"][0]

    def run(answer):
        ids = torch.cat([prompt, torch.tensor(answer, dtype=torch.long)])
        positions = positions_of(model, inputs, len(ids))
        return read(model, inputs, ids, seen, positions, llm_removed, options)[0]

    return run


@torch.no_grad()
def generate(model, inputs, vit_removed, llm_removed, *, new_tokens, **options) -> list[int]:
    """Decode exactly `new_tokens` tokens greedily (no stopping token), running the whole sequence anew for each."""
    return greedy(reader(model, inputs, vit_removed, llm_removed, **options), new_tokens)


# ---------------------------------------------------------------- encoder


def see(model, inputs, removed, options):
    """Encode all segments: features of each `[units, D]` by source, and the merges block by block."""
    fourfold = is_fourfold(model, inputs)
    seen, merges = {"image": [], "video": []}, []
    for source, suffix in (("image", ""), ("video", "_videos")):
        if "pixel_values" + suffix not in inputs:
            continue
        sizes = inputs["target_sizes" + suffix].tolist()
        packed = inputs["pixel_values" + suffix]  # [1, 3, patch size, patches of the call * patch size]
        pieces = packed.split([h * w * model.config.patch_size for h, w in sizes], dim=-1)
        found = []
        for segment, (pixels, (h, w)) in enumerate(zip(pieces, sizes)):
            features, new_merges = encode(model, pixels, h, w, fourfold, removed, segment, source, options)
            seen[source].append(features)
            found += new_merges
        merges += sorted(found, key=lambda merge: merge.layer)  # stable: segments ascend within a block
    return seen, merges


def is_fourfold(model, inputs):
    """Whether a unit is 2x2 patches and not 4x4: the prompt's mode goes before the model's."""
    return (inputs.get("downsample_mode") or model.config.downsample_mode) == "4x"


def encode(model, pixels, h, w, fourfold, removed, segment, source, options):
    """Encode one segment of `h * w` patches: features `[units, D]` with dead rows -inf, and its merges."""
    tower, config = model.model.vision_tower, model.config.vision_config
    side = 2 if fourfold else 4  # patches along a unit
    n_units = (h // side) * (w // side)
    removed = removed(n_units)

    x = tower.embeddings(pixels, target_sizes=torch.tensor([[h, w]]))[
        0
    ]  # [h * w, D], raster order of patches
    rows = [
        (r * side + i) * w + c * side + j
        for r in range(h // side)
        for c in range(w // side)
        for i in range(side)
        for j in range(side)
    ]
    x, g = x[rows], side * side  # [n_units * g, D], unit by unit
    units = list(range(n_units))  # the units still alive; x has g rows for each
    sizes = [1] * n_units

    merges = []
    for layer, block in enumerate(tower.encoder.layers):
        attention = block.self_attn
        q, k, v = heads_of(attention, block.layer_norm1(x), config.num_attention_heads)
        everything = torch.ones(len(x), len(x)).bool()
        x = x + attention.out_proj(attend(q, k, v, everything, copies_of(sizes, g, layer, removed, options)))
        if removed.get(layer, 0):
            importance = importance_of(q, k, everything, everything, options.score)
            where = [(0, *divmod(unit, w // side)) for unit in units]
            kept, recycled, x = merge_segment(
                x, q, k, importance, removed[layer], g, options, sizes, where=where
            )
            merges.append(
                Merge(
                    "vit",
                    layer,
                    segment,
                    [units[n] for n in kept],
                    [units[n] for n in recycled],
                    x,
                    source,
                )
            )
            units = [units[n] for n in kept]
        x = x + block.mlp(block.layer_norm2(x))
        if layer == config.insert_layer_id and not fourfold:
            x, g = merge_windows(tower.vit_merger, x, len(units), config.num_attention_heads), 4

    x = tower.post_layernorm(x)
    projected = model.model.merger.mlp[0](x.reshape(len(units), -1))  # the 4 rows of a unit side by side
    features = projected.new_full((n_units, projected.shape[-1]), float("-inf"))
    features[units] = projected
    return features, merges


def heads_of(attention, x, n_heads):
    """Queries, keys and values `[H, S, d]`; the encoder has no rotary embedding."""
    return (
        project(x).reshape(len(x), n_heads, -1).transpose(0, 1)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )


def merge_windows(merger, x, n_units, n_heads):
    """The merger inside the tower: of each unit's 4x4 patches its four 2x2 windows, `[n_units * 4, D]`."""
    units = x.reshape(n_units, 16, -1)
    merged = []
    for unit in units:
        for top, left in ((0, 0), (0, 2), (2, 0), (2, 2)):
            window = unit[[(top + i) * 4 + left + j for i in range(2) for j in range(2)]]  # [4, D]
            q, k, v = heads_of(merger.self_attn, merger.layer_norm1(window), n_heads)
            mixed = attend(q, k, v, torch.ones(4, 4).bool())
            window = window + merger.self_attn.out_proj(mixed)
            hidden = merger.act(merger.linear_1(merger.pre_norm(window.flatten())))
            merged.append(merger.linear_2(hidden) + window.mean(0))
    return torch.stack(merged)


# ---------------------------------------------------------------- language model


def positions_of(model, inputs, length):
    """Positions `[3, length]`, time, height and width, of the prompt and of the tokens generated after it."""
    prompt_length = len(inputs["input_ids"][0])
    sizes = {name: inputs[name] for name in ("target_sizes", "target_sizes_videos") if name in inputs}
    if not sizes or not hasattr(model.model, "get_rope_index"):
        return torch.arange(length).expand(3, -1)
    positions, delta = model.model.get_rope_index(
        inputs["input_ids"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
        downsample_mode=inputs.get("downsample_mode"),
        **sizes,
    )
    later = torch.arange(prompt_length, length) + delta[0, 0]  # one after the largest position so far, and on
    return torch.cat([positions[:, 0], later.expand(3, -1)], dim=1)


def read(model, inputs, input_ids, seen, positions, removed, options):
    """Run the language model over prompt and generated tokens: logits `[L, vocab]`, the merges, who is alive where."""
    language, config = model.model.language_model, model.config.text_config
    length, prompt_length = len(input_ids), len(inputs["input_ids"][0])

    # Only placeholders of the prompt are visual: a generated token is text, whatever its id.
    placeholder = {model.config.image_token_id: "image", model.config.video_token_id: "video"}
    pieces = {source: iter(seen[source]) for source in seen}
    suffixes = {"image": "", "video": "_videos"}
    grids = {source: iter(inputs.get("target_sizes" + suffixes[source], [])) for source in seen}
    side = 2 if is_fourfold(model, inputs) else 4  # patches along a token
    x = language.embed_tokens(input_ids)  # [L, D]
    segment_of = [None] * length  # the segment of a visual position, None for text
    start, sources, plans, columns, dead = [], [], [], [], set()
    for position in range(prompt_length):
        source = placeholder.get(int(input_ids[position]))
        if source is None or segment_of[position] is not None:
            continue
        features = next(pieces[source])  # [tokens of the segment, D]
        for token, feature in enumerate(features):
            segment_of[position + token] = len(start)
            x[position + token] = feature
            if feature[0].isinf():  # merged away in the encoder: it never enters
                dead.add(position + token)
        start.append(position)
        sources.append(source)
        columns.append(int(next(grids[source])[1]) // side)  # tokens in a line of the segment
        plans.append(removed(len(features), int((~features[:, 0].isinf()).sum())))

    held = [position for position in range(length) if position not in dead]  # still alive, ascending
    x, angles = x[held], decoder_angles(config, positions)[held]  # [S, D], [S, turned part of d]
    merges, alive = [], []
    stood_for = {}  # segment -> how many of its tokens each stands for
    asked = None  # positions, rotated queries and keys of the last full-attention layer
    for layer, block in enumerate(language.layers):
        alive.append([position in held for position in range(length)])
        normed = block.input_layernorm(x)
        if config.layer_types[layer] == "full_attention":
            mixed, q, k = attend_fully(block.self_attn, normed, angles, config)
            asked = held, q, k
        else:
            mixed = attend_linearly(block.linear_attn, normed)
        x = x + mixed
        x = x + block.mlp(block.post_attention_layernorm(x))
        if not any(plan.get(layer, 0) for plan in plans):
            continue
        if asked is None:
            raise ValueError(
                f"Layer {layer} comes before the first full-attention layer: nothing ranks its tokens."
            )

        then, q, k = asked  # `then`: the positions alive in that layer, `held` among them
        causal = torch.ones(len(then), len(then)).tril().bool()
        features, gone = x.clone(), set()
        for segment, plan in enumerate(plans):
            if not plan.get(layer, 0):
                continue
            rows = [n for n, position in enumerate(held) if segment_of[position] == segment]
            places = [then.index(held[n]) for n in rows]  # the same tokens' rows in q and k
            asking = asking_queries(then, segment_of, segment, prompt_length, options.queries)  # [S then]
            importance = importance_of(q, k, causal, causal & asking[:, None], options.score)
            kept, recycled, merged = merge_segment(
                x[rows], q[:, places], k[:, places], importance[places], plan[layer], 1, options,
                stood_for.setdefault(segment, [1] * len(rows)), "llm",
                where=[(0, *divmod(held[n] - start[segment], columns[segment])) for n in rows],
            )  # fmt: skip
            numbers = [held[n] - start[segment] for n in rows]
            merges.append(
                Merge(
                    "llm",
                    layer,
                    segment,
                    [numbers[n] for n in kept],
                    [numbers[n] for n in recycled],
                    merged,
                    sources[segment],
                )
            )
            features[[rows[n] for n in kept]] = merged
            gone |= {rows[n] for n in range(len(rows)) if n not in kept}
        stay = [n for n in range(len(held)) if n not in gone]
        x, angles, held = features[stay], angles[stay], [held[n] for n in stay]

    alive.append([position in held for position in range(length)])
    hidden = x.new_zeros(length, x.shape[-1])
    hidden[held] = language.norm(x)
    return model.lm_head(hidden), merges, alive


def attend_fully(attention, x, angles, config):
    """Causal attention with a gate: the output `[S, D]`, and rotated queries and keys `[H, S, d]`."""
    d = config.head_dim
    q, gate = attention.q_proj(x).reshape(len(x), -1, 2 * d).split(d, dim=-1)  # [S, H, d] each
    q = rotate_partly(attention.q_norm(q).transpose(0, 1), angles)
    k = rotate_partly(attention.k_norm(attention.k_proj(x).reshape(len(x), -1, d)).transpose(0, 1), angles)
    v = attention.v_proj(x).reshape(len(x), -1, d).transpose(0, 1)
    share = len(q) // len(k)  # consecutive query heads share a key-value head
    k, v = k.repeat_interleave(share, dim=0), v.repeat_interleave(share, dim=0)
    causal = torch.ones(len(x), len(x)).tril().bool()  # tokens are held in order, so order is causality
    mixed = attend(q, k, v, causal) * gate.flatten(1).sigmoid()
    return attention.o_proj(mixed), q, k


def rotate_partly(x, angles):
    """Rotate the first features of `x [H, S, d]`, as many as there are angles; the others stay."""
    turned = angles.shape[-1]
    return torch.cat([rotate(x[..., :turned], angles), x[..., turned:]], dim=-1)


def decoder_angles(config, positions):
    """Rotation angles `[L, turned part of d]`: frequencies turn with time, height and width in turn."""
    rope = config.rope_parameters
    turned = int(config.head_dim * rope["partial_rotary_factor"])
    _, n_height, n_width = rope["mrope_section"]
    angles = []
    for f in range(turned // 2):
        frequency = rope["rope_theta"] ** (-2 * f / turned)
        axis = 1 if f % 3 == 1 and f < 3 * n_height else 2 if f % 3 == 2 and f < 3 * n_width else 0
        angles.append(positions[axis].float() * frequency)
    angles = torch.stack(angles, dim=-1)
    return torch.cat([angles, angles], dim=-1)


def attend_linearly(attention, x):
    """The gated delta rule over the tokens of `x [S, D]`, one after another."""
    n_k, n_v, d_k, d_v = (
        attention.num_k_heads,
        attention.num_v_heads,
        attention.head_k_dim,
        attention.head_v_dim,
    )
    mixed = convolve(attention.conv1d.weight[:, 0], attention.in_proj_qkv(x))
    q, k, v = mixed.split([n_k * d_k, n_k * d_k, n_v * d_v], dim=-1)
    q, k = unit_length(q.reshape(-1, n_k, d_k)), unit_length(k.reshape(-1, n_k, d_k))
    share = n_v // n_k  # consecutive value heads share a key head
    q, k = q.repeat_interleave(share, dim=1) * d_k**-0.5, k.repeat_interleave(share, dim=1)  # [S, n_v, d_k]
    v = v.reshape(-1, n_v, d_v)
    rate = attention.in_proj_b(x).sigmoid()  # [S, n_v]: how much a token writes
    decay = (
        -attention.A_log.exp() * F.softplus(attention.in_proj_a(x) + attention.dt_bias)
    ).exp()  # [S, n_v]
    out = torch.zeros_like(v)
    for head in range(n_v):
        state = x.new_zeros(d_k, d_v)
        for token in range(len(x)):
            state = state * decay[token, head]
            novel = v[token, head] - k[token, head] @ state
            state = state + rate[token, head] * torch.outer(k[token, head], novel)
            out[token, head] = q[token, head] @ state
    gate = attention.in_proj_z(x).reshape(-1, n_v, d_v)
    return attention.out_proj(attention.norm(out, gate).flatten(1))


def convolve(weight, x):
    """Causal convolution of each channel with its own `weight [channels, reach]`, then SiLU; zeros before the start."""
    out = torch.zeros_like(x)
    reach = weight.shape[-1]
    for token in range(len(x)):
        for back in range(min(reach, token + 1)):
            out[token] += weight[:, reach - 1 - back] * x[token - back]
    return F.silu(out)


def unit_length(x):
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
