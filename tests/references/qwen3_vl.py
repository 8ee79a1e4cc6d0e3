"""Visual token merging in Qwen3-VL and Qwen3-VL-MoE, written plainly, for tests to compare against.

One sequence, no padding, no cache. Every attention is a full matrix, every choice a Python loop, and nothing
is shared with the package under test. The Hugging Face model lends its weights, its norms, its mergers and its
feed-forward modules; the flow between them is spelt out here. Give it an unpatched model: hooks would run too.

What is particular to the family:
- Learned position embeddings are interpolated to each picture's grid; a survivor keeps its own, as it keeps its angles.
- Deepstack: a tap sees the output of its block, in a merging block therefore the survivors of that very merge. What
  the k-th tap (in block order) saw is added to the visual tokens still alive after decoder layer k, before that
  layer's own merge. A unit that dies between a tap and the end of the encoder has a feature there that nobody gets.
- A video's frames stand apart in the prompt, with timestamps and markers between them. These are text; the frames
  together are one LLM segment.
- Every frame has its own run of positions, all of one time; time passes by the timestamps.

Sizes in the shape comments: S tokens or patches alive now, H heads, d head size, D hidden size, g patches of a unit.
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
    same,
)


@torch.no_grad()
def forward(model, inputs, vit_removed, llm_removed, **options) -> Result:
    """Run a prompt and its pictures through the model, merging on the way.

    Args:
        model: `Qwen3VLForConditionalGeneration` or `Qwen3VLMoeForConditionalGeneration`, fp32.
        inputs: one unpadded row as the processor gives it.
        vit_removed: units of a frame before any merge -> {encoder block: units to remove}.
        llm_removed: visual tokens of a segment before any merge, and how many of them the encoder left alive
            -> {decoder layer: tokens to remove}.
        options: see `Options`.
    """
    options = Options(**options)
    pictures, merges = see(model, inputs, vit_removed, options)
    input_ids = inputs["input_ids"][0]
    logits, read_merges, alive = read(model, input_ids, len(input_ids), pictures, llm_removed, options)
    features = [picture.features for source in ("image", "video") for picture in pictures[source]]
    return Result(logits, merges + read_merges, alive, torch.cat(features or [torch.empty(0)]))


@torch.no_grad()
def reader(model, inputs, vit_removed, llm_removed, **options):
    """A function of the tokens of an answer: logits `[L, vocab]` of prompt and answer, run anew at each call.

    Only prompt positions are ever scored, merged or asked for attention, so the merges are the prompt's own.
    """
    options = Options(**options)
    pictures, _ = see(model, inputs, vit_removed, options)
    prompt = inputs["input_ids"][0]

    def run(answer):
        ids = torch.cat([prompt, torch.tensor(answer, dtype=torch.long)])
        return read(model, ids, len(prompt), pictures, llm_removed, options)[0]

    return run


@torch.no_grad()
def generate(model, inputs, vit_removed, llm_removed, *, new_tokens, **options) -> list[int]:
    """Decode exactly `new_tokens` tokens greedily (no stopping token), running the whole sequence anew for each."""
    return greedy(reader(model, inputs, vit_removed, llm_removed, **options), new_tokens)


class Picture:
    """An image or a video as the language model gets it; rows of dead units are -inf."""

    def __init__(self, grid, features, taps):
        self.frames, self.rows, self.columns = grid  # in units
        self.features = features  # [units of all frames, D of the LLM], raster order
        self.taps = taps  # one more such table for each tap, in block order

    def where(self, unit):
        """Its `(frame, row, column)`."""
        frame, within = divmod(unit, self.rows * self.columns)
        return frame, *divmod(within, self.columns)


# ---------------------------------------------------------------- encoder


def see(model, inputs, removed, options):
    """Encode the images in one call and the videos in another: the pictures of each, and the merges."""
    pictures, merges = {"image": [], "video": []}, []
    for source, pixels, grids in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        if inputs.get(pixels) is not None:
            pictures[source], new_merges = encode(
                model, inputs[pixels], inputs[grids].tolist(), removed, source, options
            )
            merges += new_merges
    return pictures, merges


def encode(model, pixels, grids, removed, source, options):
    """Encode images, or videos, together: a `Picture` for each, and the merges."""
    visual, config = model.model.visual, model.config.vision_config
    side = config.spatial_merge_size
    g = side * side

    # All units of the call in raster order, one frame after the other, with the patches of a unit side by side.
    frame, place, cell, patches, sizes = [], [], [], [], []
    for t, h, w in grids:
        for _ in range(t):
            cells = [(r, c) for r in range(h // side) for c in range(w // side)]
            frame += [len(sizes)] * len(cells)
            place += range(len(cells))
            cell += cells
            patches += [
                (r * side + i, c * side + j, h, w) for r, c in cells for i in range(side) for j in range(side)
            ]
            sizes.append(len(cells))
    plans = [removed(size) for size in sizes]  # for each frame: block -> units to remove

    x = visual.patch_embed(pixels)  # [units * g, D]
    x = x + torch.stack([position_embedding(visual, *patch) for patch in patches])
    angles = encoder_angles(config, patches)  # [units * g, d]

    merges, taps = [], []
    units = list(range(len(frame)))  # the units still alive; x and angles have g rows for each
    stand_for = [[1] * size for size in sizes]
    for layer, block in enumerate(visual.blocks):
        q, k, v = block.attn.qkv(block.norm1(x)).reshape(len(x), 3, config.num_heads, -1).permute(1, 2, 0, 3)
        q, k = rotate(q, angles), rotate(k, angles)  # [H, S, d]
        same_frame = same([frame[u] for u in units for _ in range(g)])  # [S, S]
        # Frames lie one behind the other, and all their plans name the same blocks.
        copies = copies_of([n for own in stand_for for n in own], g, layer, plans[0], options)
        x = x + block.attn.proj(attend(q, k, v, same_frame, copies))
        if any(plan.get(layer, 0) for plan in plans):
            importance = importance_of(q, k, same_frame, same_frame, options.score)
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
                    where=[(0, *cell[units[n]]) for n in members],
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
                    )
                )
                survivors, pieces = survivors + [members[n] for n in kept], pieces + [features]
            x = torch.cat(pieces)
            angles = angles[[n * g + slot for n in survivors for slot in range(g)]]
            units = [units[n] for n in survivors]
        x = x + block.mlp(block.norm2(x))
        if layer in config.deepstack_visual_indexes:
            tap = visual.deepstack_merger_list[list(config.deepstack_visual_indexes).index(layer)]
            taps.append(full_length(tap(x), units, len(frame)))

    features = full_length(visual.merger(x), units, len(frame))
    counts = [t * h * w // g for t, h, w in grids]
    tables = [table.split(counts) for table in (features, *taps)]
    pictures = [
        Picture((t, h // side, w // side), of_picture[0], of_picture[1:])
        for (t, h, w), of_picture in zip(grids, zip(*tables))
    ]
    return pictures, merges


def full_length(features, units, count):
    """`features` of the units alive, in a table with a row for each unit there was; dead rows are -inf."""
    full = features.new_full((count, features.shape[-1]), float("-inf"))
    full[units] = features
    return full


def position_embedding(visual, row, column, height, width):
    """The embedding `[D]` of a patch: the learned square grid, stretched over the frame so that corners meet."""
    side = visual.num_grid_per_side
    table = visual.pos_embed.weight.reshape(side, side, -1)
    y = row * (side - 1) / max(height - 1, 1)
    x = column * (side - 1) / max(width - 1, 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, side - 1), min(left + 1, side - 1)
    down, across = y - top, x - left
    return (
        (1 - down) * (1 - across) * table[top, left]
        + (1 - down) * across * table[top, right]
        + down * (1 - across) * table[bottom, left]
        + down * across * table[bottom, right]
    )


def encoder_angles(config, patches):
    """Rotation angles `[patches, d]`: d/4 of them turn with the row, d/4 with the column, and all that twice."""
    d = config.hidden_size // config.num_heads
    theta = (getattr(config, "rope_parameters", None) or {}).get("rope_theta", 10000.0)
    frequencies = 1.0 / theta ** (torch.arange(0, d // 2, 2).float() / (d // 2))  # [d / 4]
    places = torch.tensor([(row, column) for row, column, _, _ in patches]).float()
    angles = (places[:, :, None] * frequencies).flatten(1)  # [patches, d / 2], rows first
    return torch.cat([angles, angles], dim=-1)


# ---------------------------------------------------------------- language model


def read(model, input_ids, prompt_length, pictures, removed, options):
    """Run the language model over prompt and generated tokens: logits `[L, vocab]`, the merges, who is alive where."""
    language, config = model.model.language_model, model.config.text_config
    length = len(input_ids)
    shown, sources, segment_of, unit_of = assign(model.config, input_ids, prompt_length, pictures)
    position_ids = positions(segment_of, unit_of, shown)  # [3, L]
    places = [[p for p in range(length) if segment_of[p] == s] for s in range(len(shown))]
    taps_of = [[table.clone() for table in picture.taps] for picture in shown]  # merges change them

    x = language.embed_tokens(input_ids)  # [L, D]
    dead = set()
    for position in range(length):
        if segment_of[position] is not None:
            x[position] = shown[segment_of[position]].features[unit_of[position]]
            if x[position, 0].isinf():  # merged away in the encoder: it never enters
                dead.add(position)
    plans = [
        removed(len(own), sum(position not in dead for position in own)) for own in places
    ]  # for each segment: layer -> tokens to remove

    held = [position for position in range(length) if position not in dead]  # the positions alive, ascending
    x, angles = x[held], decoder_angles(config, position_ids)[held]  # [S, D], [S, d]
    merges, alive = [], []
    stood_for = {}  # segment -> how many of its tokens each stands for
    for layer, block in enumerate(language.layers):
        alive.append([position in held for position in range(length)])
        attention = block.self_attn
        normed, d = block.input_layernorm(x), angles.shape[-1]
        q = attention.q_norm(attention.q_proj(normed).reshape(len(x), -1, d)).transpose(0, 1)  # [H, S, d]
        k = attention.k_norm(attention.k_proj(normed).reshape(len(x), -1, d)).transpose(0, 1)  # [H_kv, S, d]
        v = attention.v_proj(normed).reshape(len(x), -1, d).transpose(0, 1)
        q, k = rotate(q, angles), rotate(k, angles)
        share = len(q) // len(k)  # consecutive query heads share a key-value head
        k, v = k.repeat_interleave(share, dim=0), v.repeat_interleave(share, dim=0)  # [H, S, d]
        causal = torch.ones(len(x), len(x)).tril().bool()  # held is ascending, so order is causality
        x = x + attention.o_proj(attend(q, k, v, causal))
        x = x + feed_forward(block, x)
        for n, position in enumerate(held):
            if segment_of[position] is not None:
                taps = taps_of[segment_of[position]]
                if layer < len(taps):
                    x[n] = x[n] + taps[layer][unit_of[position]]

        features, gone = x.clone(), set()
        for segment, plan in enumerate(plans):
            if plan.get(layer, 0) == 0:
                continue
            rows = [n for n, position in enumerate(held) if segment_of[position] == segment]
            asking = asking_queries(held, segment_of, segment, prompt_length, options.queries)  # [S]
            importance = importance_of(q, k, causal, causal & asking[:, None], options.score)
            before = list(stood_for.get(segment, [1] * len(rows)))
            where = [shown[segment].where(unit_of[held[n]]) for n in rows]
            kept, recycled, merged = merge_segment(
                x[rows], q[:, rows], k[:, rows], importance[rows], plan[layer], 1, options,
                stood_for.setdefault(segment, [1] * len(rows)), "llm", where=where,
            )  # fmt: skip
            numbers = [places[segment].index(held[n]) for n in rows]
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
            # What a token absorbs it absorbs whole: also the features that later layers will add.
            numbers = torch.tensor([unit_of[held[n]] for n in rows])
            for table in taps_of[segment][layer + 1 :]:
                if options.merge == "bipartite":  # what is alike the tokens say, not what will be added
                    both = torch.cat([x[rows], table[numbers]], dim=1)
                    arguments = q, k, importance, plan[layer], 1, options, list(before), "llm", x.shape[1]
                    blended = merge_segment(both, *arguments, where)[2][:, x.shape[1] :]
                else:
                    _, _, blended = merge_segment(
                        table[numbers], q[:, rows], k[:, rows], importance[rows], plan[layer], 1, options
                    )
                table[numbers[kept]] = blended
            gone |= {rows[n] for n in range(len(rows)) if n not in kept}
        stay = [n for n in range(len(held)) if n not in gone]
        x, angles, held = features[stay], angles[stay], [held[n] for n in stay]

    alive.append([position in held for position in range(length)])
    hidden = x.new_zeros(length, x.shape[-1])
    hidden[held] = language.norm(x)
    return model.lm_head(hidden), merges, alive


def assign(config, input_ids, prompt_length, pictures):
    """Which placeholder shows what: the pictures in prompt order, what they are, and each position's segment and unit.

    Text between a video's frames does not end the video: its placeholders are counted until all units have one.
    """
    placeholder = {config.image_token_id: "image", config.video_token_id: "video"}
    coming = {source: iter(pictures[source]) for source in pictures}
    current = {"image": None, "video": None}  # the segment under way, and the units it has shown
    shown, sources = [], []
    segment_of, unit_of = [None] * len(input_ids), [None] * len(input_ids)  # None for text
    for position, token in enumerate(input_ids[:prompt_length].tolist()):  # a generated token is text
        source = placeholder.get(token)
        if source is None:
            continue
        if current[source] is None:
            current[source] = (len(shown), 0)
            shown.append(next(coming[source]))
            sources.append(source)
        segment, unit = current[source]
        segment_of[position], unit_of[position] = segment, unit
        current[source] = (segment, unit + 1) if unit + 1 < len(shown[segment].features) else None
    return shown, sources, segment_of, unit_of


def positions(segment_of, unit_of, shown):
    """Positions `[3, L]`, time, height and width: text advances all three; in a frame, time stands still."""
    found, following = [], 0
    for segment, unit in zip(segment_of, unit_of):
        if segment is None:
            found.append([following] * 3)
            following += 1
            continue
        picture = shown[segment]
        _, row, column = picture.where(unit)
        found.append([following, following + row, following + column])
        if (row, column) == (picture.rows - 1, picture.columns - 1):  # the frame is over
            following += max(picture.rows, picture.columns)
    return torch.tensor(found).T


def feed_forward(block, x):
    """The feed-forward part of a decoder layer, dense or of experts."""
    out = block.mlp(block.post_attention_layernorm(x)[None])  # experts want a batch
    return (out[0] if isinstance(out, tuple) else out)[0]  # 4.57's experts return router logits as well


def decoder_angles(config, position_ids):
    """Rotation angles `[L, d]`: frequencies turn with time, height, width, time, ... as far as the sections go."""
    rope = getattr(config, "rope_parameters", None)  # transformers 5; 4.57 has rope_theta and rope_scaling
    theta = rope["rope_theta"] if rope else config.rope_theta
    sections = (rope or config.rope_scaling)["mrope_section"]
    d = config.head_dim
    turns = []
    for i in range(d // 2):
        axis = i % 3
        if axis and i // 3 >= sections[axis]:  # height and width have their sections, time has all the rest
            axis = 0
        turns.append(position_ids[axis].float() / theta ** (2 * i / d))
    angles = torch.stack(turns, dim=-1)  # [L, d / 2]
    return torch.cat([angles, angles], dim=-1)
