"""The web page in a real browser: `pytest -m browser`. Needs Chromium (apt-get install chromium)."""

import re
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image

import illava
import illava.demo
from illava.demo import asking, media
from illava.demo.media import Limits
from illava.demo.overlays import Overlays
from illava.demo.samples import FOLDER, SAMPLES
from illava.errors import DemoError

pytestmark = pytest.mark.browser
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
MINUTE = 60_000  # Playwright counts milliseconds
SEVERAL, VIDEO = 4, 5  # among the examples
SAID = "document.querySelector('#{0} .said').innerText.trim()"


@pytest.fixture(scope="module")
def server():
    from illava.demo.loading import default_model, load
    from illava.demo.server import Server

    with Server(load(default_model(), "cpu"), host="127.0.0.1", port=_free_port()) as server:
        yield server


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.fail("no Chromium here; on Debian: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def open_tab(server, chromium):
    """Called: a tab of a browser of its own; whatever it asks another machine for is noted in `outside`."""
    contexts, outside = [], []

    def open_tab():
        context = chromium.new_context(viewport={"width": 1280, "height": 1000})
        contexts.append(context)
        tab = context.new_page()
        tab.set_default_timeout(MINUTE)
        tab.on("request", lambda r: None if r.url.startswith(LOCAL) else outside.append(r.url))
        tab.goto(server.url)
        tab.wait_for_selector("#ask")
        tab.wait_for_selector("#patched .answer")  # drawn by the page itself, so it is alive
        return tab

    yield open_tab
    for context in contexts:
        context.close()
    assert not outside


LOCAL = ("http://127.0.0.1", "data:", "blob:")


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def upload(tab, *files) -> None:
    """As a user does: by the upload field of an empty gallery."""
    tab.locator("#shown input[type=file]").set_input_files([str(file) for file in files])
    tab.wait_for_function(
        "n => document.querySelectorAll('#shown .grid-container img, #shown .grid-container video, "
        "#shown .preview img').length >= n",
        arg=len(files),
    )


def ask(tab, question: str) -> tuple[str, str]:
    """Both answers to a question."""
    tab.locator("#question textarea, #question input").fill(question)
    return answers(tab, lambda: tab.click("#ask"))


def answers(tab, act) -> tuple[str, str]:
    """Both answers, once there is a verdict that was not there before this was done."""
    tab.evaluate("document.querySelectorAll('.verdict').forEach(x => x.dataset.old = 'yes')")
    act()
    return answered(tab)


def answered(tab) -> tuple[str, str]:
    """Both answers, once there is a verdict."""
    tab.wait_for_selector(".verdict:not([data-old])")
    return tuple(tab.evaluate(SAID.format(side)) for side in ("unpatched", "patched"))


def says(tab, words: tuple[str, str]) -> None:
    """Wait until both sides say these; while a rule is being taken over the last verdict is drawn again."""
    for side, said in zip(("unpatched", "patched"), words, strict=True):
        tab.wait_for_function(f"said => {SAID.format(side)} === said", arg=said)


def eventually(found):
    """What this function finds on the server, as soon as it finds something."""
    end = time.monotonic() + MINUTE / 1000
    while not (result := found()):
        assert time.monotonic() < end, "nothing in a minute"
        time.sleep(0.05)
    return result


def slide(tab, name: str, share: float) -> None:
    """Click on a slider's track, at this share of its width."""
    track = tab.locator(f"#{name} input[type=range]")
    box = track.bounding_box()
    track.click(position={"x": box["width"] * share, "y": box["height"] / 2})


@pytest.fixture(scope="module")
def by_hand():
    """Called with a picture, a question and a plan: both answers and the report, without the page's code."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from illava.demo.loading import default_model

    processor = AutoProcessor.from_pretrained(default_model())
    model = AutoModelForImageTextToText.from_pretrained(default_model(), dtype=torch.float32).eval()

    def by_hand(file, question, **plan):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        inputs = processor(text=[text], images=[Image.open(file).convert("RGB")], return_tensors="pt")

        def said():
            out = model.generate(**inputs, max_new_tokens=64, do_sample=False)
            return processor.batch_decode(out[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)[0]

        plain = said().strip()
        with illava.patch(model, **{"reduction": 0.778, "trace": True} | plan) as handle:
            return (plain, said().strip()), handle.report

    return by_hand


@pytest.fixture(scope="module")
def pictures():
    """The shipped examples by name."""
    return {file.stem: file for file in FOLDER.iterdir()}


def test_upload_ask_and_see_both_answers(open_tab, pictures, by_hand, tmp_path):
    shutil.copy(pictures["white"], tmp_path / "mine.jpg")
    question = "which digit is white ?"
    expected, report = by_hand(pictures["white"], question)
    tab = open_tab()
    upload(tab, tmp_path / "mine.jpg")
    assert ask(tab, question) == expected
    assert f"from {report.final_tokens} of 144 visual tokens" in tab.inner_text(".verdict")
    costs = tab.locator("#patched dd").all_inner_texts()
    assert len(costs) == 3
    assert "×" in costs[0]
    assert "%" in costs[2]


@pytest.fixture
def gate(monkeypatch):
    """Tokens come when they are let through: `gate.release(2)`, and all of them at the end."""
    gate, put = threading.Semaphore(0), asking._Tap.put
    closed = threading.Event()

    def waiting(self, value):
        while not (self.next_tokens_are_prompt or closed.is_set() or gate.acquire(timeout=0.05)):
            pass
        put(self, value)

    gate.open = closed.set
    monkeypatch.setattr(asking._Tap, "put", waiting)
    yield gate
    gate.open()


def said(tab, side: str, words: str) -> None:
    """Waits until a side says just this."""
    tab.wait_for_function("w => " + SAID.format(side) + " === w", arg=words)


def pick(tab, number: int) -> None:
    """Click on an example, and wait until it is in the gallery with its question."""
    sample = SAMPLES[number]
    tab.locator("#samples .thumbnail-item").nth(number).click()
    tab.wait_for_function(
        "q => document.querySelector('#question textarea, #question input').value === q", arg=sample.question
    )
    tab.wait_for_function(
        "n => document.querySelectorAll('#shown .grid-container img, #shown .grid-container video').length"
        " === n",
        arg=len(sample.names),
    )


def test_both_answers_stream(open_tab, gate):
    tab = open_tab()
    pick(tab, VIDEO)
    tab.click("#ask")
    said(tab, "unpatched", "looking")
    said(tab, "patched", "after the unpatched model")
    gate.release(2)  # a word is shown when the next one begins
    tab.wait_for_selector("#unpatched .caret")
    said(tab, "unpatched", "zero")
    gate.release(1)
    said(tab, "unpatched", "zero two")
    gate.release(3)  # one and the end there, and then two here
    said(tab, "patched", "zero")
    said(tab, "unpatched", "zero two six")
    assert not tab.locator(".verdict").count()
    gate.open()
    tab.wait_for_selector(".verdict")
    assert tab.locator(".caret").count() == 0
    assert tab.inner_text("#patched .said") == "zero two six"


def test_stop_ends_the_answer_under_way(open_tab, gate, server, monkeypatch):
    # Otherwise it would be sixty-four tokens long.
    monkeypatch.setattr(server.handlers.asker.model.generation_config, "eos_token_id", None)
    tab = open_tab()
    pick(tab, VIDEO)
    tab.click("#ask")
    gate.release(1)
    tab.wait_for_selector("#unpatched .caret")
    with tab.expect_response("**/run/predict") as told:
        tab.click("#stop")
    assert told.value.ok
    gate.open()
    said(tab, "patched", "not asked")
    words = tab.inner_text("#unpatched .said").split()
    assert 1 <= len(words) <= 4  # ended by the token that was being made, or the one after it
    assert not tab.locator(".verdict").count()


def test_the_merge_slider_changes_the_overlay(open_tab, pictures):
    tab = open_tab()
    upload(tab, pictures["green"])
    ask(tab, "which digit is green ?")
    tab.wait_for_selector(".overlay img")
    seen = {}
    for share in (0.99, 0.5, 0.01):
        before = tab.inner_text(".overlay h3")
        slide(tab, "merge", share)
        if share < 0.9:
            tab.wait_for_function("b => document.querySelector('.overlay h3').innerText !== b", arg=before)
        seen[tab.inner_text(".overlay h3").lower()] = tab.get_attribute(".overlay img", "src")
        assert tab.locator(".stairs .step.now").count() == 1
    assert len(set(seen.values())) == 3, seen.keys()
    assert any("before any merge" in title and "144" in title for title in seen)
    counts = [int(text) for text in tab.locator(".stairs .count").all_inner_texts()]
    assert counts[0] == 144
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] < 40
    # And with the attention below.
    before = tab.inner_text(".overlay h3")
    slide(tab, "merge", 0.99)
    tab.wait_for_function("b => document.querySelector('.overlay h3').innerText !== b", arg=before)
    height = "document.querySelector('.overlay img').naturalHeight"
    alone = tab.evaluate(height)
    tab.click("#importance input")
    tab.wait_for_function(f"h => {height} > 1.5 * h", arg=alone)


def test_the_reduction_slider_asks_the_patched_side_again(open_tab, pictures):
    tab = open_tab()
    upload(tab, pictures["white"])
    plain, _ = ask(tab, "which digit is white ?")
    before = tab.inner_text(".verdict")
    assert answers(tab, lambda: slide(tab, "reduction", 0.3))[0] == plain
    assert "of 144" in tab.inner_text(".verdict")
    assert tab.inner_text(".verdict") != before


def pick_from(tab, label: str, choice: str) -> None:
    """Open a list of the controls, and click on one of its choices."""
    tab.get_by_label(label, exact=True).click()
    tab.get_by_role("option", name=choice).click()
    tab.keyboard.press("Escape")


def test_share_layers_and_rule_are_drawn_as_set(open_tab, server, pictures, by_hand):
    """One after the other: bars, answer and overlay are those of a model patched so by hand."""
    question, file = "which digit is green ?", pictures["green"]
    tab = open_tab()
    upload(tab, file)
    ask(tab, question)
    default, more = server.handlers.asker.default, 1
    seen, shares = [tab.get_attribute(".overlay img", "src")], []
    assert more not in default.vit_layers
    plan = {"vit_layers": default.vit_layers, "llm_layers": default.llm_layers}
    tab.get_by_text("layers and rules").click()

    def share():
        slide(tab, "encoder-share", 0.9)
        plan["encoder_share"] = int(tab.input_value("#encoder-share input[type=number]")) / 100

    def layers():
        pick_from(tab, "encoder blocks that merge", str(more))
        plan["vit_layers"] = (*default.vit_layers, more)

    def rule():
        pick_from(tab, "merging rule", "prune: drop the rest")
        plan.clear()  # layers and share are that rule's own
        plan["merge"] = "prune"

    for change in (share, layers, rule):
        change()
        expected, report = by_hand(file, question, **plan)
        (picture,) = report.pictures
        left = ["144", *(str(record.tokens_out) for record in picture.layers)]
        tab.wait_for_function(
            "left => [...document.querySelectorAll('.stairs .count')].map(x => x.innerText).join() === left",
            arg=",".join(left),
        )
        says(tab, expected)
        place = int(tab.input_value("#merge input[type=number]"))
        drawn = Overlays(report, [media.read(file, Limits())]).html(place)
        tab.wait_for_function(
            "s => document.querySelector('.overlay img').src === s", arg=re.search(r'src="([^"]+)"', drawn)[1]
        )
        seen.append(tab.get_attribute(".overlay img", "src"))
        shares.append(plan.get("encoder_share"))
    assert shares[0] == shares[1] > 0.8 > default.encoder_share
    assert len(set(seen)) == 4


def test_several_pictures_and_a_video_from_the_examples(open_tab):
    tab = open_tab()
    several, video = ("third", "third"), ("zero two six", "zero two six")
    for number, words, tokens in ((SEVERAL, several, "256"), (VIDEO, video, "144")):
        pick(tab, number)
        assert answers(tab, lambda: tab.click("#ask")) == words
        assert f"of {tokens} visual" in tab.inner_text(".verdict")
        tab.wait_for_selector(".overlay img")
        width, height = tab.evaluate(
            "(x => [x.naturalWidth, x.naturalHeight])(document.querySelector('.overlay img'))"
        )
        assert (width > height) == (number == VIDEO)  # frames lie side by side, pictures below each other
    tab.get_by_text("layers and rules").click()
    pick_from(tab, "merging rule", "recycle: the paper's")
    says(tab, ("zero two six", "zero six"))  # as docs/demo.md tells


@pytest.mark.parametrize("name", ["notes.png", "broken.mp4"])
def test_a_bad_file_is_said_in_words(open_tab, pictures, tmp_path, name):
    (tmp_path / name).write_bytes(
        b"these are no pixels" if name.endswith("png") else pictures["clip"].read_bytes()[:400]
    )
    tab = open_tab()
    tab.locator("#shown input[type=file]").set_input_files(str(tmp_path / name))
    tab.wait_for_selector(".notice.error")
    words = tab.inner_text(".notice.error")
    assert name in words.lower()
    assert "bring" in words
    assert "Traceback" not in tab.inner_text("body")


def test_asking_without_a_picture_is_answered_in_words(open_tab):
    tab = open_tab()
    tab.click("#ask")
    tab.wait_for_selector(".notice.error")
    assert "nothing to look at" in tab.inner_text(".notice.error")


def test_two_tabs_at_once_do_not_disturb_each_other(open_tab, server, pictures, by_hand, gate):
    questions = {"white": "which digit is white ?", "green": "which digit is green ?"}
    expected = {name: by_hand(pictures[name], question)[0] for name, question in questions.items()}
    assert expected["white"] != expected["green"]
    tabs = {name: open_tab() for name in questions}
    for name, tab in tabs.items():
        upload(tab, pictures[name])
        tab.locator("#question textarea, #question input").fill(questions[name])
    slide(tabs["green"], "reduction", 0.0)
    tabs["white"].click("#ask")
    said(tabs["white"], "unpatched", "looking")  # and held there, so that both are under way
    tabs["green"].click("#ask")
    gate.open()
    seen = {name: answered(tab) for name, tab in tabs.items()}
    assert seen["white"] == expected["white"]
    assert seen["green"] == (expected["green"][0],) * 2  # not merged: what it asked for
    assert "this plan merges none" in tabs["green"].inner_text(".verdict")
    assert "merged away" in tabs["white"].inner_text(".verdict")
    assert tabs["white"].locator("section.overlay").count() == 1
    assert tabs["green"].locator("section.overlay").count() == 0


def test_nothing_is_kept_of_a_closed_tab(open_tab, server, pictures):
    others = set(server.sessions)
    tab = open_tab()
    upload(tab, pictures["writing"])
    (name,) = eventually(lambda: set(server.sessions) - others)
    (file,) = eventually(lambda: server.sessions.of(name).files)
    assert file.is_file()
    tab.close()
    eventually(lambda: name not in server.sessions)
    assert not file.exists()


@pytest.mark.parametrize("path", ["/etc/hostname", str(Path(illava.__file__))])
def test_no_file_of_the_machine_is_read(open_tab, server, path):
    tab = open_tab()
    status = tab.evaluate("p => fetch('/gradio_api/file=' + p).then(r => r.status)", path)
    assert status in (403, 404)
    config = tab.evaluate("fetch('/config').then(r => r.json())")
    looks = [d["id"] for d in config["dependencies"] if len(d["inputs"]) == 1 and len(d["outputs"]) == 1]
    assert looks
    for number in looks:
        body = {
            "data": [[{"image": {"path": path, "meta": {"_type": "gradio.FileData"}}, "caption": None}]],
            "fn_index": number,
            "session_hash": "someone",
        }
        said = tab.evaluate(
            """async body => {
                const post = {method: 'POST', headers: {'Content-Type': 'application/json'},
                              body: JSON.stringify(body)};
                const joined = await fetch('/gradio_api/queue/join', post);
                if (!joined.ok) return 'refused ' + joined.status;
                const told = await fetch('/gradio_api/queue/data?session_hash=someone');
                const reader = told.body.getReader(); let all = '';
                for (let n = 0; n < 50; n++) {
                    const {value, done} = await reader.read();
                    if (done) break;
                    all += new TextDecoder().decode(value);
                    if (all.includes('process_completed') || all.includes('unexpected_error')) break;
                }
                await reader.cancel();
                return all;
            }""",
            body,
        )
        assert "refused" in said or '"success":false' in said or "not an upload" in said, said
    assert not any(server.sessions.of("someone").shown)


def test_a_port_that_is_taken_is_said_in_words(server):
    from illava.demo.loading import default_model

    port = int(server.url.rstrip("/").rsplit(":", 1)[1])
    with ThreadPoolExecutor(1) as pool:  # Playwright's loop is in this thread
        failed = pool.submit(illava.demo.launch, default_model(), port=port, device="cpu").exception()
    assert isinstance(failed, DemoError)
    assert f"port {port}" in str(failed)
