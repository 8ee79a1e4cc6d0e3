"""Visual token merging in InternVL, written plainly, for tests to compare against.

One sequence, no padding, no cache. Every attention is a full matrix, every choice a Python loop, and nothing
is shared with the package under test. The Hugging Face model lends its weights, its norms, its feed-forward
modules and its projector; the flow between them is spelt out here. Give it an unpatched model: hooks would
run too.

The encoder sees all tiles of the prompt in one call, those of pictures and video frames alike. Each tile is a
segment and starts with a CLS token, which asks and is asked like any patch but belongs to no unit. A language
model segment is a run of placeholders: a picture with all its tiles, thumbnail included, or a single video
frame, since the processor puts text between frames and the model is not told that they belong together. Every
`source` is therefore "image".

Units of a tile go in raster order, and so do the four patches of a unit: upper left, upper right, lower left,
lower right. That is also the order in which Hugging Face's pixel shuffle puts their channels side by side.

Easily overlooked:
  * The query and key norms of the large encoder run over all heads at once, before the heads part.
  * Qwen2 and Llama differ in the biases of their attention alone. There is no mRoPE: one position a token.
  * `window_score` is idle, since every block attends over the whole tile.

Sizes in the shape comments: S tokens or patches alive now, H heads, d head size, D hidden size.
"""

import torch

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

G = 4  # patches of a unit


@torch.no_grad()
def forward(model, inputs, vit_removed, llm_removed, **options) -> Result:
    """Run prompt and pictures through the model, merging on the way.

    Args:
        model: `InternVLForConditionalGeneration`, fp32.
        inputs: `input_ids [1, L]`, and `pixel_values [tiles, 3, H, W]` if there are any.
        vit_removed: units of a tile -> {encoder block: units to remove from it}.
        llm_removed: tokens of a segment before any merge, and how many of them the encoder left alive
            -> {decoder layer: tokens to remove from it}.
        options: see `Options`.
    """
    options = Options(**options)
    features, merges = see(model, inputs.get("pixel_values"), vit_removed, options)
    input_ids = inputs["input_ids"][0]
    logits, read_merges, alive = read(model, input_ids, len(input_ids), features, llm_removed, options)
    return Result(logits, merges + read_merges, alive, features)


@torch.no_grad()
def reader(model, inputs, vit_removed, llm_removed, **options):
    """A function of the tokens of an answer: logits `[L, vocab]` of prompt and answer, run anew at each call.

    Only prompt positions are ever scored, merged or asked for attention, so the merges are the prompt's own.
    """
    options = Options(**options)
    features, _ = see(model, inputs.get("pixel_values"), vit_removed, options)
    prompt = inputs["input_ids"][0]

    def run(answer):
        ids = torch.cat([prompt, torch.tensor(answer, dtype=torch.long)])
        return read(model, ids, len(prompt), features, llm_removed, options)[0]

    return run


@torch.no_grad()
def generate(model, inputs, vit_removed, llm_removed, *, new_tokens, **options) -> list[int]:
    """Decode exactly `new_tokens` tokens greedily (no stopping token), running the whole sequence anew for each."""
    return greedy(reader(model, inputs, vit_removed, llm_removed, **options), new_tokens)


# ---------------------------------------------------------------- encoder


def see(model, pixel_values, removed_of, options):
    """Encode all tiles: features `[units of all tiles, D of the LLM]` with dead rows -inf, and the merges."""
    if pixel_values is None:
        return torch.empty(0), []
    tower = model.model.vision_tower
    heads = model.config.vision_config.num_attention_heads
    tiles = [embed(tower.embeddings, pixels) for pixels in pixel_values]  # each [1 + units * G, D]
    total = (len(tiles[0]) - 1) // G  # units of a tile
    side = round(total**0.5)
    removed = removed_of(total)
    units = [list(range(total)) for _ in tiles]  # of each tile the units still alive
    sizes = [[1] * total for _ in tiles]

    merges = []
    for layer, block in enumerate(tower.encoder.layer):
        for tile, x in enumerate(tiles):
            attention, normed = block.attention, block.layernorm_before(x)
            q, k = attention.q_norm(attention.q_proj(normed)), attention.k_norm(attention.k_proj(normed))
            v = attention.v_proj(normed)
            q, k, v = (y.unflatten(-1, (heads, -1)).transpose(0, 1) for y in (q, k, v))  # [H, S, d]
            everywhere = torch.ones(len(x), len(x)).bool()  # every token of a tile sees every other
            copies = copies_of(sizes[tile], G, layer, removed, options, first=1)
            x = x + block.lambda_1 * attention.projection_layer(attend(q, k, v, everywhere, copies))
            if removed.get(layer, 0) > 0:
                importance = importance_of(q, k, everywhere, everywhere, options.score)  # CLS asks too
                kept, recycled, features = merge_segment(
                    x[1:], q[:, 1:], k[:, 1:], importance[1:], removed[layer], G, options, sizes[tile],
                    where=[(0, *divmod(unit, side)) for unit in units[tile]],
                )  # fmt: skip
                numbers = units[tile]
                merges.append(
                    Merge(
                        "vit",
                        layer,
                        tile,
                        [numbers[n] for n in kept],
                        [numbers[n] for n in recycled],
                        features,
                        "image",
                    )  # fmt: skip
                )
                x = torch.cat([x[:1], features])
                units[tile] = [numbers[n] for n in kept]
            tiles[tile] = x + block.lambda_2 * block.mlp(block.layernorm_after(x))

    rows = []
    for x, numbers in zip(tiles, units):
        patches = tower.layernorm(x)[1:]  # CLS is left behind
        joined = patches.reshape(len(numbers), -1)  # [units alive, G * D]: the patches of a unit side by side
        projected = model.model.multi_modal_projector(joined)
        full = projected.new_full((total, projected.shape[-1]), float("-inf"))
        full[numbers] = projected
        rows.append(full)
    return torch.cat(rows), merges


def embed(embeddings, pixels):
    """One tile `[3, H, W]` as CLS and patches `[1 + units * G, D]`, unit by unit, positions added."""
    patches = embeddings.patch_embeddings.projection(pixels[None])[0]  # [D, rows, columns]
    _, height, width = patches.shape
    cls = embeddings.cls_token[0, 0]
    positions = embeddings.position_embeddings[0]  # CLS, then patches in raster order
    rows = [cls + positions[0]]
    for r in range(0, height, 2):
        for c in range(0, width, 2):
            for i, j in ((r, c), (r, c + 1), (r + 1, c), (r + 1, c + 1)):
                rows.append(patches[:, i, j] + positions[1 + i * width + j])
    return torch.stack(rows)


# ---------------------------------------------------------------- language model


def tile_place(number, tile_tokens):
    """`(tile, row, column)` of a picture's visual token; tiles are square."""
    tile, within = divmod(number, tile_tokens)
    return tile, *divmod(within, round(tile_tokens**0.5))


def read(model, input_ids, prompt_length, features, removed_of, options):
    """Run the language model on prompt and generated tokens: logits `[L, vocab]`, merges, who lives where."""
    language, config = model.model.language_model, model.config.text_config
    length = len(input_ids)

    # Only placeholders of the prompt are visual: a generated token is text, whatever its id.
    x = language.embed_tokens(input_ids)  # [L, D]
    segment_of = [None] * length  # the segment of a visual position, None for text
    start, dead, used = [], set(), 0
    for position in range(prompt_length):
        if int(input_ids[position]) != model.config.image_token_id:
            continue
        if position == 0 or segment_of[position - 1] is None:
            start.append(position)
        segment_of[position] = len(start) - 1
        x[position] = features[used]
        if features[used][0].isinf():  # merged away in the encoder: it never enters
            dead.add(position)
        used += 1

    removed = []
    for segment in range(len(start)):
        positions = [position for position in range(length) if segment_of[position] == segment]
        removed.append(removed_of(len(positions), len([p for p in positions if p not in dead])))

    held = [position for position in range(length) if position not in dead]  # still alive, ascending
    x, angles = x[held], decoder_angles(config, length)[held]  # [S, D], [S, d]
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
                where=[tile_place(held[n] - start[segment], model.config.image_seq_length) for n in rows],
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
                    "image",
                )  # fmt: skip
            )
            merged_x[[rows[n] for n in kept]] = merged
            gone |= {rows[n] for n in range(len(rows)) if n not in kept}
        stay = [n for n in range(len(held)) if n not in gone]
        x, angles, held = merged_x[stay], angles[stay], [held[n] for n in stay]

    alive.append([position in held for position in range(length)])
    hidden = x.new_zeros(length, x.shape[-1])
    hidden[held] = language.norm(x)
    return model.lm_head(hidden), merges, alive


def decoder_angles(config, length):
    """Rotation angles `[L, d]` of positions 0, 1, ..., L - 1: all frequencies, twice."""
    rope = getattr(config, "rope_parameters", None)  # transformers 5; 4.57 has rope_theta
    theta = rope["rope_theta"] if rope else config.rope_theta
    d = config.hidden_size // config.num_attention_heads
    frequencies = 1.0 / theta ** (torch.arange(0, d, 2).float() / d)  # [d / 2]
    angles = torch.arange(length).float()[:, None] * frequencies  # [L, d / 2]
    return torch.cat([angles, angles], dim=-1)
