"""What stands where on the page, and which handler answers to what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from illava.demo import cards, samples
from illava.demo.controls import draw_controls
from illava.demo.handlers import Handlers

STYLE = Path(__file__).resolve().parent / "page.css"
# Fonts of the reader's own machine: the page asks no other server for anything.
FONTS = ["Inter", "ui-sans-serif", "system-ui", "sans-serif"]


def theme() -> Any:
    """The page's colours and fonts."""
    plain: dict[str, Any] = {
        "body_background_fill": "*neutral_50",
        "block_background_fill": "white",
        "block_label_text_weight": "600",
        "block_label_background_fill": "*block_background_fill",
        "block_label_text_color": "*body_text_color",
        "block_title_background_fill": "transparent",
        "block_title_text_color": "*body_text_color",
        "block_title_text_weight": "600",
        "block_title_padding": "0",
        "button_primary_background_fill": "*primary_600",
        "button_primary_background_fill_hover": "*primary_500",
        "button_primary_text_color": "white",
    }
    for name in ("label_background_fill", "label_text_color", "title_background_fill", "title_text_color"):
        plain[f"block_{name}_dark"] = plain[f"block_{name}"]
    return gr.themes.Soft(
        primary_hue="emerald", secondary_hue="slate", neutral_hue="slate", font=FONTS,
        font_mono=["ui-monospace", "monospace"],
    ).set(**plain)  # fmt: skip


def draw_page(handlers: Handlers) -> gr.Blocks:
    """The page for one model."""
    asker, limits = handlers.asker, handlers.limits
    device = str(asker.model.device).upper()
    with gr.Blocks(title="illava", analytics_enabled=False, delete_cache=(600, 86_400)) as page:
        gr.HTML(
            "<header><h1>illava</h1><p>The same model answers twice: as it is, and with redundant visual "
            "tokens merged.</p>"
            f"<p class='model'>{cards.escape(asker.name)} <span>{device}</span></p></header>",
            elem_id="head",
        )
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                gallery = gr.Gallery(
                    label="pictures, or a video", interactive=True, type="filepath", columns=4, height=235,
                    object_fit="contain", file_types=["image", "video"], elem_id="shown",
                    buttons=["fullscreen"],
                )  # fmt: skip
                # A path that is an address would make this machine fetch it.
                gallery.async_move_resource_to_block_cache = _only_files(gallery)  # type: ignore[method-assign]
                question = gr.Textbox(
                    label="question", placeholder="which digit is white ?", max_length=limits.question,
                    lines=1, elem_id="question",
                )  # fmt: skip
                with gr.Row():
                    ask = gr.Button("Ask", variant="primary", elem_id="ask", scale=3)
                    stop = gr.Button("Stop", elem_id="stop", scale=1, min_width=80)
            with gr.Column(scale=4, min_width=320):
                controls = draw_controls(asker.default)
                answer_tokens = gr.Slider(
                    1, limits.answer_tokens, min(64, limits.answer_tokens), step=1,
                    label="answer at most, tokens",
                )  # fmt: skip
        gr.HTML("<h3>or pick one of these</h3>", elem_id="pick")
        examples = gr.Gallery(
            [(sample.files[0], sample.question) for sample in samples.SAMPLES],
            label="examples", show_label=False, columns=len(samples.SAMPLES), allow_preview=False,
            interactive=False, object_fit="cover", elem_id="samples", buttons=[], container=False,
        )  # fmt: skip
        notice = gr.HTML(elem_id="notice", padding=False)
        with gr.Row(equal_height=True, elem_id="answers"):
            unpatched = gr.HTML(
                cards.card("unpatched", None, state="ask something"), elem_id="unpatched", padding=False
            )
            patched = gr.HTML(
                cards.card("illava", None, state="ask something"), elem_id="patched", padding=False
            )
        verdict = gr.HTML(elem_id="verdict", padding=False)
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=320, elem_id="through"):
                merge = gr.Slider(
                    0, 1, 0, step=1, label="merge by merge", visible=False, elem_id="merge",
                    info="0 is the picture as it came; each step is one merging layer",
                )  # fmt: skip
                stairs = gr.HTML(elem_id="stairs", padding=False)
                importance = gr.Checkbox(
                    label="show what merges ranked the tokens by", visible=False,
                    elem_id="importance", container=False,
                )  # fmt: skip
            with gr.Column(scale=5, min_width=320):
                overlay = gr.HTML(elem_id="overlay", padding=False)

        shown = [notice, unpatched, patched, verdict, stairs, merge, importance, overlay]
        busy: dict[str, Any] = {
            "outputs": shown, "concurrency_id": "model", "concurrency_limit": 1, "show_progress": "minimal",
            "show_progress_on": [patched], "api_visibility": "private",
        }  # fmt: skip
        quick: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        gr.on([gallery.upload, gallery.change, gallery.delete], handlers.look, gallery, notice, **quick)
        gr.on(
            [ask.click, question.submit], handlers.ask,
            [gallery, question, answer_tokens, *controls.all], trigger_mode="once", **busy,
        )  # fmt: skip
        again: dict[str, Any] = {
            "fn": handlers.ask_again, "inputs": [merge, importance, answer_tokens, *controls.all],
            "trigger_mode": "always_last", **busy,
        }  # fmt: skip
        rules = [controls.rule, controls.vit_rule]
        for rule, follow in zip(rules, (handlers.follow, handlers.follow_encoder), strict=True):
            rule.input(follow, rules, controls.follow, **quick).then(**again)
        gr.on(
            [controls.reduction.release, controls.encoder_share.release]
            + [c.input for c in controls.follow[1:]],
            **again,
        )
        stop.click(handlers.stop, queue=False, **quick)
        gr.on(
            [merge.input, importance.input], handlers.show, [merge, importance], [overlay, stairs],
            trigger_mode="always_last", **quick,
        )  # fmt: skip
        examples.select(_pick, None, [gallery, question], **quick)
        page.unload(handlers.close)
    return page


def _pick(picked: gr.SelectData) -> tuple[list[str], str]:
    sample = samples.SAMPLES[picked.index]
    return sample.files, sample.question


def _only_files(gallery: gr.Gallery) -> Any:
    keep = gallery.async_move_resource_to_block_cache

    async def move(path: Any) -> Any:
        if "://" in str(path):
            raise gr.Error("Addresses are not looked up; upload the file itself.")
        return await keep(path)

    return move
