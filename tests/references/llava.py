"""Visual token merging in LLaVA-NeXT and LLaVA-OneVision, written plainly, for tests to compare against.

One sequence, no padding, no cache. Every attention is a full matrix, every choice a Python loop, and
nothing is shared with the package under test. The Hugging Face model lends its weights, its embeddings,
its norms, its feed-forward modules and its projector; the flow between them is spelt out here. Give it
an unpatched model: hooks would run too.

What FACTS.md does not say, or says otherwise:
  * the encoder's blocks are at `vision_tower.encoder.layers` in 5.23, at
    `vision_tower.vision_model.encoder.layers` in 4.57.6;
  * the blocks behind `vision_feature_layer` run without being read, and so does SigLIP's
    `post_layernorm`: features are the recorded output of a block, before any norm;
  * in LLaVA-OneVision only a picture alone in its row is tiled; of several, each is one tile and one
    newline;
  * of a video, a frame is one tile, projected and then pooled to half its side (rounded up); one newline
    follows the whole video. Images and videos are encoded in two calls, images first;
  * a picture token comes from the base tile, or from one patch of the other tiles, or (shrunk) from up
    to four; unpadding may crop patches that are alive, so a segment can lose tokens that no merge
    removed.

Sizes in the shape comments: S tokens or patches alive now, H heads, d head size, D hidden size, n grid
side, T tokens of a picture (newlines included).
"""

import math
from fractions import Fraction

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

DEAD = float("-inf")


def is_dead(feature):
    """Is this row of features a token merged away?"""
    return bool(feature[0].isinf())


@torch.no_grad()
def forward(model, inputs, vit_removed, llm_removed, **options) -> Result:
    """Run prompt and pictures through the model, merging on the way.

    Args:
        model: `LlavaNextForConditionalGeneration` or `LlavaOnevisionForConditionalGeneration`, fp32.
        inputs: one unpadded row.
        vit_removed: units of a tile or frame before any merge -> block -> units to remove.
        llm_removed: visual tokens of a picture or video before any merge (newlines not counted; pooled
            ones, for a video), and how many of them the encoder left alive -> layer -> tokens to remove.
        options: see `Options`.
    """
    options = Options(**options)
    seen, merges = see(model, inputs, vit_removed, options)
    input_ids = inputs["input_ids"][0]
    return read(model, input_ids, len(input_ids), seen, merges, llm_removed, options)


@torch.no_grad()
def reader(model, inputs, vit_removed, llm_removed, **options):
    """A function of the tokens of an answer: logits `[L, vocab]` of prompt and answer, run anew at each call.

    Only prompt positions are ever scored, merged or asked for attention, so the merges are the prompt's own.
    """
    options = Options(**options)
    seen, merges = see(model, inputs, vit_removed, options)
    prompt = inputs["input_ids"][0]

    def run(answer):
        ids = torch.cat([prompt, torch.tensor(answer, dtype=torch.long)])
        return read(model, ids, len(prompt), seen, merges, llm_removed, options).logits

    return run


@torch.no_grad()
def generate(model, inputs, vit_removed, llm_removed, *, new_tokens, **options) -> list[int]:
    """Decode exactly `new_tokens` tokens greedily (no stopping token), running the whole sequence anew for each."""
    return greedy(reader(model, inputs, vit_removed, llm_removed, **options), new_tokens)


# ---------------------------------------------------------------- encoder


def see(model, inputs, removed, options):
    """Images in one call, videos in another: source -> pictures (see `see_images`), and the merges."""
    images, image_merges = see_images(model, inputs, removed, options)
    videos, video_merges = see_videos(model, inputs, removed, options)
    return {"image": images, "video": videos}, image_merges + video_merges


def encode(model, tiles, removed, source, options):
    """Encode tiles or frames: a list of projected features `[n * n, D]`, dead rows -inf, and the merges.

    Args:
        tiles: `[tiles, 3, height, width]`.
        removed: units of a tile -> block -> units to remove.
    """
    encoded, merges = [], []
    for segment, tile in enumerate(tiles):
        features, new_merges = encode_tile(model, tile, removed, segment, source, options)
        encoded.append(features)
        merges += new_merges
    return encoded, sorted(merges, key=lambda merge: merge.layer)  # stable: segments ascend within a block


def encode_tile(model, pixels, removed, segment, source, options):
    """One tile through the encoder and the projector."""
    tower, config = model.model.vision_tower, model.config
    tower = getattr(tower, "vision_model", tower)  # 4.57
    x = tower.embeddings(pixels[None])[0]
    first = 0
    if hasattr(tower, "pre_layrnorm"):  # CLIP
        x = tower.pre_layrnorm(x)
        first = 1  # row 0 is CLS, which is never a candidate nor a target but asks and is asked
    assert (config.vision_feature_select_strategy == "default") == bool(first)
    n_units = len(x) - first
    side = round(n_units**0.5)
    removed = removed(n_units)
    blocks = tower.encoder.layers
    end = config.vision_feature_layer % (len(blocks) + 1)  # recorded state 0 is the input of block 0

    merges = []
    units = list(range(n_units))  # the units still alive; x has `first` rows more
    sizes = [1] * n_units
    for layer, block in enumerate(blocks[:end]):
        attention, normed = block.self_attn, block.layer_norm1(x)
        heads = attention.num_heads
        q, k, v = (
            project(normed).reshape(len(x), heads, -1).transpose(0, 1)  # [H, S, d]
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        everywhere = torch.ones(len(x), len(x)).bool()
        copies = copies_of(sizes, 1, layer, removed, options, first)
        x = x + attention.out_proj(attend(q, k, v, everywhere, copies))
        if removed.get(layer, 0) > 0:
            importance = importance_of(q, k, everywhere, everywhere, options.score)
            kept, recycled, features = merge_segment(
                x[first:], q[:, first:], k[:, first:], importance[first:], removed[layer], 1, options, sizes,
                where=[(0, *divmod(unit, side)) for unit in units],
            )  # fmt: skip
            numbers = [units[i] for i in kept], [units[i] for i in recycled]
            merges.append(Merge("vit", layer, segment, *numbers, features, source))
            x = torch.cat([x[:first], features])
            units = numbers[0]
        x = x + block.mlp(block.layer_norm2(x))

    projected = model.model.multi_modal_projector(x[first:])
    features = projected.new_full((n_units, projected.shape[-1]), DEAD)
    features[units] = projected
    return features, merges


# ---------------------------------------------------------------- from tiles to pictures


def see_images(model, inputs, removed, options):
    """The row's pictures: for each its features `[T, D]` and which of them are newlines; and the merges."""
    if "pixel_values" not in inputs:
        return [], []
    config = model.config
    side = config.vision_config.image_size
    sizes = inputs["image_sizes"].tolist()
    # LLaVA-OneVision cuts a picture into tiles only if it is alone in its row
    tiled = inputs["batch_num_images"].tolist() == [1] if "batch_num_images" in inputs else True

    grids, tiles = [], []
    for pixels, size in zip(inputs["pixel_values"], sizes):
        height, width = best_resolution(size, config.image_grid_pinpoints) if tiled else (0, 0)
        grids.append((height // side, width // side))
        tiles.append(pixels[: 1 + grids[-1][0] * grids[-1][1]])  # what follows is padding
    encoded, merges = encode(model, torch.cat(tiles), removed, "image", options)

    pictures = []
    for size, grid in zip(sizes, grids):
        count = 1 + grid[0] * grid[1]
        own, encoded = encoded[:count], encoded[count:]
        base = list(own[0])
        newlines = [False] * len(base)
        # a picture without tiles is its base and one newline
        lines = pack(model.config, own[1:], grid, size) if tiled else [[]]
        for line in lines:
            base += [*line, model.model.image_newline]
            newlines += [False] * len(line) + [True]
        pictures.append((torch.stack(base), newlines))
    return pictures, merges


def see_videos(model, inputs, removed, options):
    """The row's videos: for each its features `[T, D]` and which of them are newlines; and the merges."""
    if "pixel_values_videos" not in inputs:
        return [], []
    pixels = inputs["pixel_values_videos"]  # [videos, frames, 3, height, width]
    config = model.config.vision_config
    side = config.image_size // config.patch_size
    frames, merges = encode(model, pixels.flatten(0, 1), removed, "video", options)
    videos = []
    for video in range(pixels.shape[0]):
        rows = []
        for frame in frames[video * pixels.shape[1] : (video + 1) * pixels.shape[1]]:
            lines = [list(line) for line in frame.split(side)]
            half = math.ceil(side / 2)
            rows += [feature for line in resample(lines, half, half) for feature in line]
        newlines = [False] * len(rows) + [True]
        videos.append((torch.stack([*rows, model.model.image_newline]), newlines))
    return videos, merges


def best_resolution(size, resolutions):
    """The resolution that keeps most pixels of the picture and, of equals, wastes least of its own."""
    height, width = size
    ranked = []
    for h, w in resolutions:
        scale = min(w / width, h / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        ranked.append((-effective, h * w - effective, len(ranked)))
    return resolutions[min(ranked)[2]]


def pack(config, tiles, grid, size):
    """Lay the tiles out, crop the padding, shrink what is too large: lines of features."""
    n = config.vision_config.image_size // config.vision_config.patch_size
    lines = [
        [tiles[r // n * grid[1] + c // n][r % n * n + c % n] for c in range(grid[1] * n)]
        for r in range(grid[0] * n)
    ]
    height, width = len(lines), len(lines[0])

    if size[1] / size[0] > width / height:
        padding = (height - int(round(size[0] * (width / size[1]), 7))) // 2
        lines = lines[padding : height - padding]
    else:
        padding = (width - int(round(size[1] * (height / size[0]), 7))) // 2
        lines = [line[padding : width - padding] for line in lines]

    if hasattr(config, "vision_aspect_ratio"):  # LLaVA-OneVision: "anyres_max_9"
        most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
        height, width = len(lines), len(lines[0])
        ratio = math.sqrt(height * width / (most * n**2))
        if ratio > 1.1:
            lines = resample(lines, int(height // ratio), int(width // ratio))
    return lines


def resample(lines, height, width):
    """Bilinear interpolation among the live: weights are renormalised, a token without a live source is dead.

    Weights are exact fractions: where an output falls onto one source, its neighbours have no say. (In single
    precision torch leaves a neighbour a weight of up to 4e-6 at some sizes, as 27 to 25, on which no token
    should live.)
    """
    resampled = []
    for vertical in weights(len(lines), height):
        resampled.append([])
        for horizontal in weights(len(lines[0]), width):
            total, mean = 0.0, 0.0
            for r, share in vertical:
                for c, other_share in horizontal:
                    weight = float(share * other_share)
                    if weight > 0 and not is_dead(lines[r][c]):
                        total, mean = total + weight, mean + weight * lines[r][c]
            resampled[-1].append(mean / total if total else torch.full_like(lines[0][0], DEAD))
    return resampled


def weights(before, after):
    """For each of `after` outputs its one or two sources with their weights; corners are not aligned."""
    pairs = []
    for i in range(after):
        source = max((i + Fraction(1, 2)) * before / after - Fraction(1, 2), Fraction(0))
        low = math.floor(source)
        high = min(low + 1, before - 1)
        pairs.append([(low, 1 - (source - low)), (high, source - low)])
    return pairs


# ---------------------------------------------------------------- language model


def read(model, input_ids, prompt_length, seen, merges, removed, options):
    """Run the language model (Llama, Mistral, Qwen2) over prompt and generated tokens.

    Args:
        seen: source -> pictures in prompt order, each features `[T, D]` and which of them are newlines.
        merges: of the encoder.
        removed: visual tokens of a segment, how many of them the encoder left alive -> layer -> tokens to
            remove.
    """
    language = model.model.language_model
    length = len(input_ids)

    # Only placeholders of the prompt are visual: a generated token is text, whatever its id.
    # A newline belongs to no segment. "text" must not take it for text, nor "visual" for visual.
    newline_label = None if options.queries == "visual" else "newline"
    x = language.embed_tokens(input_ids)  # [L, D]
    segment_of = [None] * length  # the segment of a visual position, None for text
    number, dead = {}, set()  # a visual position's place in its segment
    segments = []  # (first position, source, tokens, alive)
    for source, pictures in seen.items():
        token = getattr(model.config, f"{source}_token_id", None)
        places = iter([p for p in range(prompt_length) if int(input_ids[p]) == token])
        for segment, (features, newlines) in enumerate(pictures):
            first, tokens, alive = None, 0, 0
            for feature, newline in zip(features, newlines):
                position = next(places)
                first = position if first is None else first
                x[position] = feature
                segment_of[position] = newline_label if newline else (source, segment)
                if newline:
                    continue
                number[position] = tokens
                tokens += 1
                if is_dead(feature):
                    dead.add(position)
                else:
                    alive += 1
            segments.append((first, (source, segment), tokens, alive))
        assert next(places, None) is None, f"more {source} tokens than features"
    segments.sort(key=lambda segment: segment[0])  # as they appear in the prompt
    removed = [removed(tokens, alive) for _, _, tokens, alive in segments]

    held = [p for p in range(length) if p not in dead]  # the positions still alive, ascending
    x, angles = x[held], decoder_angles(model.config.text_config, length)[held]  # [S, D], [S, d]
    merges, alive = list(merges), []
    stood_for = {}  # segment -> how many of its tokens each stands for
    for layer, block in enumerate(language.layers):
        alive.append([p in held for p in range(length)])
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
        for segment, (_, label, _, _) in enumerate(segments):
            if removed[segment].get(layer, 0) == 0:
                continue
            rows = [i for i, p in enumerate(held) if segment_of[p] == label]
            asking = asking_queries(held, segment_of, label, prompt_length, options.queries)  # [S]
            importance = importance_of(q, k, causal, causal & asking[:, None], options.score)
            # Cropped, shrunk and pooled, tokens lie on no grid any more: neighbours are those next to each other
            # in the prompt, so that a newline keeps the end of a line from the start of the next.
            kept, recycled, merged = merge_segment(
                x[rows], q[:, rows], k[:, rows], importance[rows], removed[segment][layer], 1, options,
                stood_for.setdefault(segment, [1] * len(rows)), "llm", where=[(0, 0, held[i]) for i in rows],
            )  # fmt: skip
            numbers = [number[held[i]] for i in rows]
            kept_numbers, recycled_numbers = [numbers[i] for i in kept], [numbers[i] for i in recycled]
            merges.append(Merge("llm", layer, segment, kept_numbers, recycled_numbers, merged, label[0]))
            features[[rows[i] for i in kept]] = merged
            gone |= {rows[i] for i in range(len(rows)) if i not in kept}
        stay = [i for i in range(len(held)) if i not in gone]
        x, angles, held = features[stay], angles[stay], [held[i] for i in stay]

    alive.append([p in held for p in range(length)])
    hidden = x.new_zeros(length, x.shape[-1])
    hidden[held] = language.norm(x)
    pictures = [features for source in seen for features, _ in seen[source]]
    return Result(model.lm_head(hidden), merges, alive, torch.cat(pictures or [torch.empty(0)]))


def decoder_angles(config, length):
    """Rotation angles `[L, d]` of positions 0, 1, ..."""
    rope = getattr(config, "rope_parameters", None)  # transformers 5; 4.57 has rope_theta
    theta = rope["rope_theta"] if rope else config.rope_theta
    d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    frequencies = 1.0 / theta ** (torch.arange(0, d, 2).float() / d)  # [d / 2]
    angles = torch.arange(length).float()[:, None] * frequencies
    return torch.cat([angles, angles], dim=-1)
