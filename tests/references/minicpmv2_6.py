"""Visual token merging in MiniCPM-V 2.6, written plainly, for tests to compare against.

One sequence, no padding, no cache. Every attention is a full matrix, every choice a Python loop, and nothing is
shared with the package under test. The published model lends its weights, its norms, its embeddings and its
feed-forward modules; the flow between them is spelt out here. Give it an unpatched model: hooks would run too.

Encoder. A segment is a slice, a unit one patch, in raster order. Slices are encoded one by one, so that none is
ever padded. The resampler's queries attend over the patches that survived, with the positions those had in the
slice's grid; positions go into keys, not values. Whatever survives, a slice becomes `query_num` tokens.

Language model (Qwen2). A segment is again a slice, its `query_num` tokens; all of them enter, none is dead. Tokens
that the attention mask hides are not there at all: they hold no position, ask nothing, and their logits are those
of a zero hidden state. A hidden token of a slice counts as one that the language model has lost already.

Sizes in the shape comments: S tokens or patches alive now, H heads, d head size, D hidden size.
"""

import torch

from references.core import (
    Merge,
    Options,
    Result,
    asking_queries,
    attend,
    importance_of,
    merge_segment,
    rotate,
)


@torch.no_grad()
def forward(model, inputs, vit_removed, llm_removed, **options) -> Result:
    """Run prompt and pictures through the model, merging on the way.

    Args:
        model: `MiniCPMV`, fp32.
        inputs: of one row without padding what its processor gives: `input_ids [1, L]`, `attention_mask [1, L]`,
            `image_bound`, `tgt_sizes` and `pixel_values`, lists with one entry each.
        vit_removed: patches of a slice -> {encoder block: patches to remove from it}.
        llm_removed: tokens of a slice, and how many of them the mask shows -> {decoder layer: tokens to remove}.
        options: see `Options`.
    """
    options = Options(**options)
    features, merges = see(model, inputs, vit_removed, options)
    shown = inputs["attention_mask"][0].bool().tolist()
    logits, read_merges, alive = read(
        model, inputs, inputs["input_ids"][0].long(), shown, features, llm_removed, options
    )
    return Result(logits, merges + read_merges, alive, torch.cat(features) if features else torch.empty(0))


@torch.no_grad()
def generate(model, inputs, vit_removed, llm_removed, *, new_tokens, **options) -> list[int]:
    """Decode exactly `new_tokens` tokens greedily (no stopping token), running the whole sequence for each.

    Only prompt positions are ever scored, merged or asked for attention, so the merges are the prompt's own.
    """
    options = Options(**options)
    features, _ = see(model, inputs, vit_removed, options)
    input_ids, shown = inputs["input_ids"][0].long(), inputs["attention_mask"][0].bool().tolist()
    prompt_length = len(input_ids)
    for _ in range(new_tokens):
        logits, _, _ = read(model, inputs, input_ids, shown, features, llm_removed, options)
        input_ids, shown = torch.cat([input_ids, logits[-1:].argmax(-1)]), [*shown, True]
    return input_ids[prompt_length:].tolist()


# ---------------------------------------------------------------- encoder


def see(model, inputs, removed_of, options):
    """Encode all slices one by one: features of each `[query_num, D]`, and the merges block by block."""
    features, merges = [], []
    for segment, pixels in enumerate(inputs["pixel_values"][0]):
        height, width = (int(n) for n in inputs["tgt_sizes"][0][segment])
        x, patches, found = encode(model, pixels, height, width, removed_of(height * width), segment, options)
        features.append(resample(model.resampler, x, patches, width))
        merges += found
    return features, sorted(merges, key=lambda merge: merge.layer)  # stable: segments ascend within a block


def encode(model, pixels, height, width, removed, segment, options):
    """One slice `[3, 14, h * w * 14]`: the survivors `[S, D]`, which patches they are, and the merges."""
    tower, heads = model.vpm, model.config.vision_config.num_attention_heads
    x = embed(tower.embeddings, pixels, height, width)  # [h * w, D]
    patches = list(range(len(x)))  # those still alive
    sizes = [1] * len(x)
    merges = []
    for layer, block in enumerate(tower.encoder.layers):
        attention, normed = block.self_attn, block.layer_norm1(x)
        q, k, v = (
            project(normed).unflatten(-1, (heads, -1)).transpose(0, 1)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )  # [H, S, d]
        everywhere = torch.ones(len(x), len(x)).bool()
        x = x + attention.out_proj(attend(q, k, v, everywhere))
        if removed.get(layer, 0) > 0:
            importance = importance_of(q, k, everywhere, everywhere, options.score)
            where = [(0, *divmod(patch, width)) for patch in patches]
            kept, recycled, x = merge_segment(
                x, q, k, importance, removed[layer], 1, options, sizes, where=where
            )
            numbers = [[patches[n] for n in group] for group in (kept, recycled)]
            merges.append(Merge("vit", layer, segment, *numbers, x, "image"))
            patches = numbers[0]
        x = x + block.mlp(block.layer_norm2(x))
    return tower.post_layernorm(x), patches, merges


def embed(embeddings, pixels, height, width):
    """Patches of a slice `[h * w, D]`, each with the learned position of its place on a grid of 70 x 70."""
    side = embeddings.num_patches_per_side
    x = embeddings.patch_embedding(pixels[None])[0].flatten(1).T  # [h * w, D]
    rows = []
    for i in range(height):
        for j in range(width):
            place = (i * side // height) * side + j * side // width
            rows.append(x[i * width + j] + embeddings.position_embedding.weight[place])
    return torch.stack(rows)


def resample(resampler, x, patches, width):
    """The survivors `x [S, D]` of one slice as the queries read them: `[query_num, D of the LLM]`."""
    values = resampler.ln_kv(resampler.kv_proj(x))  # [S, D]
    places = torch.stack([resampler.pos_embed[patch // width, patch % width] for patch in patches])
    queries = resampler.ln_q(resampler.query)  # [query_num, D]
    attention = resampler.attn
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    q, k, v = (
        (y @ weight.T + bias).unflatten(-1, (attention.num_heads, -1)).transpose(0, 1)
        for y, weight, bias in zip((queries, values + places, values), weights, biases)
    )  # [H, query_num or S, d]
    read = attention.out_proj(attend(q, k, v, torch.ones(len(queries), len(x)).bool()))
    return resampler.ln_post(read) @ resampler.proj


# ---------------------------------------------------------------- language model


def read(model, inputs, input_ids, shown, features, removed_of, options):
    """Run the language model on prompt and generated tokens: logits `[L, vocab]`, merges, who lives where."""
    language, config = model.llm.model, model.llm.config
    length, prompt_length = len(input_ids), len(inputs["input_ids"][0])
    x = language.embed_tokens(input_ids)  # [L, D]
    segment_of = [None] * length  # the slice of a visual position, None for text
    start = [int(a) for a, _ in inputs["image_bound"][0]]
    for segment, (a, b) in enumerate(inputs["image_bound"][0]):
        x[a:b] = features[segment]
        segment_of[a:b] = [segment] * int(b - a)

    held = [position for position in range(length) if shown[position]]  # still alive, ascending
    removed = [
        removed_of(len(features[s]), len([p for p in held if segment_of[p] == s])) for s in range(len(start))
    ]
    x, angles = x[held], decoder_angles(config, len(held))  # [S, D], [S, d]: hidden tokens hold no position
    merges, alive = [], []
    stood_for = {}  # segment -> how many of its tokens each stands for
    for layer, block in enumerate(language.layers):
        alive.append([position in held for position in range(length)])
        attention, d = block.self_attn, angles.shape[-1]
        normed = block.input_layernorm(x)
        q = rotate(attention.q_proj(normed).reshape(len(x), -1, d).transpose(0, 1), angles)  # [H, S, d]
        k = rotate(attention.k_proj(normed).reshape(len(x), -1, d).transpose(0, 1), angles)  # [H_kv, S, d]
        v = attention.v_proj(normed).reshape(len(x), -1, d).transpose(0, 1)
        share = len(q) // len(k)  # consecutive query heads share a key-value head
        k, v = k.repeat_interleave(share, dim=0), v.repeat_interleave(share, dim=0)  # [H, S, d]
        causal = torch.ones(len(x), len(x)).tril().bool()  # held is ascending, so order is causality
        x = x + attention.o_proj(attend(q, k, v, causal))
        x = x + block.mlp(block.post_attention_layernorm(x))
        merged_x, gone = x.clone(), set()
        for segment in range(len(start)):
            if removed[segment].get(layer, 0) == 0:
                continue
            rows = [n for n, position in enumerate(held) if segment_of[position] == segment]
            asking = asking_queries(held, segment_of, segment, prompt_length, options.queries)  # [S]
            importance = importance_of(q, k, causal, causal & asking[:, None], options.score)
            kept, recycled, merged = merge_segment(
                x[rows], q[:, rows], k[:, rows], importance[rows], removed[segment][layer], 1, options,
                stood_for.setdefault(segment, [1] * len(rows)), "llm",
                where=[(0, 0, held[n]) for n in rows],  # the resampler's tokens lie on no grid
            )  # fmt: skip
            numbers = [[held[rows[n]] - start[segment] for n in group] for group in (kept, recycled)]
            merges.append(Merge("llm", layer, segment, *numbers, merged, "image"))
            merged_x[[rows[n] for n in kept]] = merged
            gone |= {rows[n] for n in range(len(rows)) if n not in kept}
        stay = [n for n in range(len(held)) if n not in gone]
        x, angles, held = merged_x[stay], angles[stay], [held[n] for n in stay]

    alive.append([position in held for position in range(length)])
    hidden = x.new_zeros(length, x.shape[-1])
    hidden[held] = language.norm(x)
    return model.llm.lm_head(hidden), merges, alive


def decoder_angles(config, length):
    """Rotation angles `[L, d]` of positions 0, 1, ..., L - 1: all frequencies, twice."""
    rope = getattr(config, "rope_parameters", None)  # transformers 5; 4.57 has rope_theta
    theta = rope["rope_theta"] if rope else config.rope_theta
    d = config.hidden_size // config.num_attention_heads
    frequencies = 1.0 / theta ** (torch.arange(0, d, 2).float() / d)  # [d / 2]
    angles = torch.arange(length).float()[:, None] * frequencies  # [L, d / 2]
    return torch.cat([angles, angles], dim=-1)
