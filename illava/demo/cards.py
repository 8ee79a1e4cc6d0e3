"""What the page says in HTML: answers and their cost, tokens per layer, words where something is wrong."""

from __future__ import annotations

from html import escape

from illava.demo.asking import Answer
from illava.report import Report


def notice(words: str, kind: str = "error") -> str:
    """Something the user should read; `kind` is `"error"` or `"hint"`. Empty words show nothing."""
    if not words:
        return ""
    role = "alert" if kind == "error" else "status"
    return f'<div class="notice {kind}" role="{role}">{escape(words[:1].upper() + words[1:])}</div>'


def card(title: str, answer: Answer | None, beside: Answer | None = None, state: str = "") -> str:
    """One side's answer and its cost.

    Args:
        beside: the other side, where ratios to it are to be shown.
        state: what to say while there is no answer.
    """
    said = f'<span class="waiting">{escape(state)}</span>' if answer is None else escape(answer.text.strip())
    if answer is not None and not answer.done:
        said += '<span class="caret"></span>'
    cells = "".join(_cell(*row) for row in _costs(answer, beside))
    side = "unpatched" if title == "unpatched" else "patched"
    return (
        f'<section class="answer {side}"><h3>{escape(title)}</h3><p class="said">{said or "&nbsp;"}</p>'
        f'<dl class="costs">{cells}</dl></section>'
    )


def _cell(name: str, value: str, ratio: str) -> str:
    return f'<div><dt>{name}</dt><dd>{value}<span class="ratio">{ratio or "&nbsp;"}</span></dd></div>'


def _costs(answer: Answer | None, beside: Answer | None) -> list[tuple[str, str, str]]:
    """Name, value and ratio to the other side, of what is known."""
    none = "–"
    if answer is None:
        return [(name, none, "") for name in ("first token", "tokens / s", "memory")]
    other = beside if beside is not None and beside.done and answer.report is not None else None
    first = answer.first_seconds
    rate = answer.tokens_per_second
    memory, its = answer.cache_bytes, other.cache_bytes if other else 0
    label = "KV cache"
    if answer.peak_bytes is not None:
        memory, its, label = answer.peak_bytes, (other.peak_bytes or 0) if other else 0, "peak memory"
    return [
        (
            "first token",
            none if first is None else _time(first),
            f"{other.first_seconds / first:.2f}× as fast" if other and other.first_seconds and first else "",
        ),
        ("tokens / s", none if rate is None else f"{rate:.3g}", ""),
        (
            label,
            _size(memory) if answer.done else none,
            f"{memory / its:.0%} of it" if its else "",
        ),
    ]


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _size(size: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 2**10:.0f} KiB"


def verdict(unpatched: Answer | None, patched: Answer) -> str:
    """One line below both answers, where both are done: whether they agree, and for how many tokens."""
    if unpatched is None or not (unpatched.done and patched.done):
        return ""
    same = unpatched.text.strip() == patched.text.strip()
    report = patched.report
    words = " from <b>all</b> visual tokens: this plan merges none"
    if report is not None:
        words = (
            f" from <b>{report.final_tokens:,} of {report.tokens:,}</b> visual tokens "
            f"({report.reduction:.1%} merged away); {report.flops.speedup_bound:.2f}× less arithmetic before "
            "the first token"
        )
    return (
        f'<div class="verdict {"same" if same else "differs"}">'
        f"<b>{'The same answer' if same else 'Another answer'}</b>{words}"
        "<small>times are of one run each; illava bench measures</small></div>"
    )


def staircase(report: Report, place: int) -> str:
    """Visual tokens left after each merging layer, all pictures together, as bars.

    Args:
        place: the bar that stands out, 0 for the first.
    """
    if not report.tokens:
        return ""
    left: dict[tuple[str, int], int] = {}
    for picture in report.pictures:
        for record in picture.layers:
            key = record.stage, record.layer
            left[key] = left.get(key, 0) + record.tokens_out
    begun = sum(p.encoded_units or p.tokens for p in report.pictures)
    rows = [("before", "start", begun)]
    rows += [(_layer_name(*key), key[0], count) for key, count in left.items()]
    bars = "".join(
        f'<div class="step {stage}{" now" if number == place else ""}"><span class="layer">{name}</span>'
        f'<span class="track"><span class="bar" style="width:{100 * count / begun:.1f}%"></span></span>'
        f'<span class="count">{count:,}</span></div>'
        for number, (name, stage, count) in enumerate(rows)
    )
    notes = " ".join(sorted({escape(p.note) for p in report.pictures if p.note}))
    return f'<section class="stairs"><h3>tokens per layer</h3>{bars}<p class="note">{notes}</p></section>'


def _layer_name(stage: str, layer: int) -> str:
    if stage == "vit":
        return f"encoder {layer}"
    return "before the decoder" if layer < 0 else f"decoder {layer}"
