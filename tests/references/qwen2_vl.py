"""Visual token merging in Qwen2-VL and Qwen2.5-VL, written plainly, for tests to compare against.

One sequence, no padding, no cache. Every attention is a full matrix, every choice a Python loop, and nothing
is shared with the package under test. The Hugging Face model lends its weights, its norms and its feed-forward
modules; the flow between them is spelt out here. Give it an unpatched model: hooks would run too.

Sizes in the shape comments: S tokens or patches alive now, H heads, d head size, D hidden size, g patches of a unit.
"""

from itertools import product

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
    same,
)


@torch.no_grad()
def forward(model, inputs, vit_removed, llm_removed, **options) -> Result:
    """Run prompt and pictures through the model, merging on the way.

    Args:
        model: `Qwen2VLForConditionalGeneration` or `Qwen2_5_VLForConditionalGeneration`, fp32.
        inputs: one unpadded row as the processor gives it.
        vit_removed: units of a frame before any merge -> {encoder block: units to remove}.
        llm_removed: visual tokens of a segment before any merge, and how many of them the encoder left alive
            -> {decoder layer: tokens to remove}.
        options: see `Options`.
    """
    options = Options(**options)
    seen, merges = see(model, inputs, vit_removed, options)
    input_ids = inputs["input_ids"][0]
    logits, read_merges, alive = read(
        model, inputs, input_ids, len(input_ids), seen, positions_of(model, inputs), llm_removed, options
    )
    features = torch.cat(
        [picture for source in ("image", "video") for picture in seen[source]] or [torch.empty(0)]
    )
    return Result(logits, merges + read_merges, alive, features)


@torch.no_grad()
def reader(model, inputs, vit_removed, llm_removed, **options):
    """A function of the tokens of an answer: logits `[L, vocab]` of prompt and answer, run anew at each call.

    Only prompt positions are ever scored, merged or asked for attention, so the merges are the prompt's own.
    """
    options = Options(**options)
    seen, _ = see(model, inputs, vit_removed, options)
    prompt, prompt_positions = inputs["input_ids"][0], positions_of(model, inputs)

    def run(answer):
        # A text token stands one after the last, on all three axes. That is what `generate` does; where a
        # video's times run ahead of the text behind it (5.23, Qwen2.5-VL), some have been larger.
        further = prompt_positions[:, -1].max() + torch.arange(1, len(answer) + 1)
        positions = torch.cat([prompt_positions, further.repeat(3, 1)], dim=1)
        ids = torch.cat([prompt, torch.tensor(answer, dtype=torch.long)])
        return read(model, inputs, ids, len(prompt), seen, positions, llm_removed, options)[0]

    return run


@torch.no_grad()
def generate(model, inputs, vit_removed, llm_removed, *, new_tokens, **options) -> list[int]:
    """Decode exactly `new_tokens` tokens greedily (no stopping token), running the whole sequence anew for each."""
    return greedy(reader(model, inputs, vit_removed, llm_removed, **options), new_tokens)


def positions_of(model, inputs):
    """Time, height and width of every position of the prompt, `[3, L]`."""
    names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "mm_token_type_ids")
    known = {
        name: inputs.get(name)
        for name in names
        if name in inputs or name.endswith("grid_thw")  # the others exist in some versions and families only
    }
    mask = inputs["attention_mask"]
    return model.model.get_rope_index(inputs["input_ids"], attention_mask=mask, **known)[0][:, 0]


# ---------------------------------------------------------------- encoder


def see(model, inputs, removed, options):
    """Encode the images in one call and the videos in another: features of each picture, and the merges."""
    seen, merges = {"image": [], "video": []}, []
    for source, pixels, grids in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        if pixels in inputs:
            sizes = [tuple(grid) for grid in inputs[grids].tolist()]
            seen[source], new_merges = encode(model, inputs[pixels], sizes, removed, source, options)
            merges += new_merges
    return seen, merges


def encode(model, pixels, sizes, removed, source, options):
    """Encode pictures together: a list of `[units of the picture, D]` with dead rows -inf, and the merges.

    Args:
        pixels: `[patches of all pictures, dim]`.
        sizes: `(t, h, w)` of each picture, in patches.
        removed: units of a frame -> encoder block -> units to remove.
    """
    visual, config = model.model.visual, model.config.vision_config
    side = config.spatial_merge_size
    g = side * side
    windowed = hasattr(
        config, "fullatt_block_indexes"
    )  # Qwen2-VL attends over the whole frame in every block

    # All units of the call in the order in which the blocks hold them. A frame's units stay together, since
    # windows never cross frames; within a frame they go window by window, raster order inside a window.
    frame, window, place, raster, row, column = [], [], [], [], [], []
    plans = []  # for each frame: block -> units to remove
    n_units = 0
    for t, h, w in sizes:
        cells = [(r, c) for r in range(h // side) for c in range(w // side)]
        reach = config.window_size // side // config.patch_size if windowed else max(h, w)
        order = sorted(
            range(len(cells)), key=lambda i: (cells[i][0] // reach, cells[i][1] // reach, cells[i])
        )
        for _ in range(t):
            for number, i in enumerate(order):
                r, c = cells[i]
                frame.append(len(plans))
                window.append((len(plans), r // reach, c // reach))
                place.append(number)
                raster.append(n_units + i)
                row.append(r)
                column.append(c)
            plans.append(removed(len(cells)))
            n_units += len(cells)

    x = visual.patch_embed(pixels)  # [n_units * g, D], raster order of units
    x = x.reshape(n_units, g, -1)[raster].flatten(0, 1)  # [n_units * g, D], held order
    angles = encoder_angles(visual, config, row, column)  # [n_units * g, d]

    merges = []
    units = list(range(n_units))  # the units still alive, in held order; x and angles have g rows for each
    stand_for = [[1] * frame.count(number) for number in range(len(plans))]
    for layer, block in enumerate(visual.blocks):
        whole = not windowed or layer in config.fullatt_block_indexes
        q, k, v = block.attn.qkv(block.norm1(x)).reshape(len(x), 3, config.num_heads, -1).permute(1, 2, 0, 3)
        q, k = rotate(q, angles), rotate(k, angles)  # [H, S, d]
        same_frame = same([frame[u] for u in units for _ in range(g)])  # [S, S]
        same_window = same([window[u] for u in units for _ in range(g)])
        # Frames lie one behind the other, and all their plans name the same blocks.
        copies = copies_of([n for own in stand_for for n in own], g, layer, plans[0], options)
        mixed = attend(q, k, v, same_frame if whole else same_window, copies)
        x = x + block.attn.proj(mixed)
        if any(plan.get(layer, 0) for plan in plans):
            scored = same_frame if whole or options.window_score == "picture" else same_window
            importance = importance_of(q, k, scored, scored, options.score)
            survivors, pieces = [], []
            for segment, plan in enumerate(plans):
                members = [n for n, u in enumerate(units) if frame[u] == segment]
                rows = [n * g + slot for n in members for slot in range(g)]
                if plan.get(layer, 0) == 0:
                    survivors, pieces = survivors + members, pieces + [x[rows]]
                    continue
                kept, recycled, features = merge_segment(
                    x[rows],
                    q[:, rows],
                    k[:, rows],
                    importance[rows],
                    plan[layer],
                    g,
                    options,
                    stand_for[segment],
                    where=[(0, row[units[n]], column[units[n]]) for n in members],
                )
                numbers = [place[units[n]] for n in members]
                merges.append(
                    Merge(
                        "vit",
                        layer,
                        segment,
                        [numbers[n] for n in kept],
                        [numbers[n] for n in recycled],
                        features,
                        source,
                    )  # fmt: skip
                )
                survivors, pieces = survivors + [members[n] for n in kept], pieces + [features]
            x = torch.cat(pieces)
            angles = angles[[n * g + slot for n in survivors for slot in range(g)]]
            units = [units[n] for n in survivors]
        x = x + block.mlp(block.norm2(x))

    merged = visual.merger(x)  # [units alive, D of the LLM]
    full = merged.new_full((n_units, merged.shape[-1]), float("-inf"))
    full[[raster[u] for u in units]] = merged
    return list(full.split([t * h * w // g for t, h, w in sizes])), merges


def encoder_angles(visual, config, row, column):
    """Rotation angles `[n_units * g, d]`: d/4 of them turn with the row, d/4 with the column, and all that twice."""
    side = config.spatial_merge_size
    d = visual.blocks[0].attn.qkv.in_features // config.num_heads
    theta = (getattr(config, "rope_parameters", None) or {}).get("rope_theta", 10000.0)
    frequencies = 1.0 / theta ** (torch.arange(0, d // 2, 2).float() / (d // 2))  # [d / 4]
    patches = [
        (r * side + i, c * side + j) for r, c in zip(row, column) for i in range(side) for j in range(side)
    ]
    angles = (torch.tensor(patches).float()[:, :, None] * frequencies).flatten(
        1
    )  # [n_units * g, d / 2], rows first
    return torch.cat([angles, angles], dim=-1)


# ---------------------------------------------------------------- language model


def read(model, inputs, input_ids, prompt_length, seen, position_ids, removed, options):
    """Run the language model over prompt and generated tokens: logits `[L, vocab]`, the merges, who is alive where."""
    language, config = model.model.language_model, model.config.text_config
    length = len(input_ids)

    # Only placeholders of the prompt are visual: a generated token is text, whatever its id.
    placeholder = {model.config.image_token_id: "image", model.config.video_token_id: "video"}
    pictures = {source: iter(seen[source]) for source in seen}
    grids = {source: iter(inputs.get(f"{source}_grid_thw", [])) for source in seen}
    x = language.embed_tokens(input_ids)  # [L, D]
    segment_of = [None] * length  # the segment of a visual position, None for text
    start, sources, plans, dead, cells = [], [], [], set(), []
    for position in range(prompt_length):
        source = placeholder.get(int(input_ids[position]))
        if source is None or segment_of[position] is not None:
            continue
        features, (t, h, w) = (
            next(pictures[source]),
            next(grids[source]).tolist(),
        )  # [units of the picture, D]
        side = model.config.vision_config.spatial_merge_size
        cells.append(list(product(range(t), range(h // side), range(w // side))))
        for unit, feature in enumerate(features):
            segment_of[position + unit] = len(start)
            x[position + unit] = feature
            if feature[0].isinf():  # merged away in the encoder: it never enters
                dead.add(position + unit)
        start.append(position)
        sources.append(source)
        plans.append(removed(len(features), int((~features[:, 0].isinf()).sum())))

    held = [
        position for position in range(length) if position not in dead
    ]  # the positions still alive, ascending
    x, angles = x[held], decoder_angles(config, position_ids)[held]  # [S, D], [S, d]
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
        features, gone = x.clone(), set()
        for segment, plan in enumerate(plans):
            if plan.get(layer, 0) == 0:
                continue
            rows = [n for n, position in enumerate(held) if segment_of[position] == segment]
            asking = asking_queries(held, segment_of, segment, prompt_length, options.queries)  # [S]
            importance = importance_of(q, k, causal, causal & asking[:, None], options.score)
            kept, recycled, merged = merge_segment(
                x[rows], q[:, rows], k[:, rows], importance[rows], plan[layer], 1, options,
                stood_for.setdefault(segment, [1] * len(rows)), "llm",
                where=[cells[segment][held[n] - start[segment]] for n in rows],
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
                )  # fmt: skip
            )
            features[[rows[n] for n in kept]] = merged
            gone |= {rows[n] for n in range(len(rows)) if n not in kept}
        stay = [n for n in range(len(held)) if n not in gone]
        x, angles, held = features[stay], angles[stay], [held[n] for n in stay]

    alive.append([position in held for position in range(length)])
    hidden = x.new_zeros(length, x.shape[-1])
    hidden[held] = language.norm(x)
    return model.lm_head(hidden), merges, alive


def decoder_angles(config, position_ids):
    """Rotation angles `[L, d]`: the sections of the frequencies turn with time, height and width in turn."""
    rope = getattr(config, "rope_parameters", None)  # transformers 5; 4.57 has rope_theta and rope_scaling
    theta = rope["rope_theta"] if rope else config.rope_theta
    sections = (rope or config.rope_scaling)["mrope_section"]
    d = config.hidden_size // config.num_attention_heads
    frequencies = 1.0 / theta ** (torch.arange(0, d, 2).float() / d)  # [d / 2]
    turns = position_ids[:, :, None].float() * frequencies  # [3, L, d / 2]
    angles = torch.cat(
        [part[axis % 3] for axis, part in enumerate(turns.split(sections, dim=-1))], dim=-1
    )  # [L, d/2]
    return torch.cat([angles, angles], dim=-1)
