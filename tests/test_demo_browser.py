"""The web page in a real browser: `pytest -m browser`. Needs Chromium (apt-get install chromium)."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image

import illava
import illava.demo
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
    tab.click("#ask")
    return answers(tab)


def answers(tab) -> tuple[str, str]:
    """Both answers, once the verdict is there."""
    tab.wait_for_selector(".verdict")
    return tuple(tab.evaluate(SAID.format(side)) for side in ("unpatched", "patched"))


def slide(tab, name: str, share: float) -> None:
    """Click on a slider's track, at this share of its width."""
    track = tab.locator(f"#{name} input[type=range]")
    box = track.bounding_box()
    track.click(position={"x": box["width"] * share, "y": box["height"] / 2})


@pytest.fixture(scope="module")
def by_hand():
    """Called with a picture and a question: both answers, without any of the page's code."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from illava.demo.loading import default_model

    processor = AutoProcessor.from_pretrained(default_model())
    model = AutoModelForImageTextToText.from_pretrained(default_model(), dtype=torch.float32).eval()

    def by_hand(file, question):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        inputs = processor(text=[text], images=[Image.open(file).convert("RGB")], return_tensors="pt")

        def said():
            out = model.generate(**inputs, max_new_tokens=64, do_sample=False)
            return processor.batch_decode(out[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)[0]

        plain = said().strip()
        with illava.patch(model, reduction=0.778) as handle:
            return (plain, said().strip()), handle.report.final_tokens

    return by_hand


@pytest.fixture(scope="module")
def pictures():
    """The shipped examples by name."""
    from illava.demo.samples import FOLDER

    return {file.stem: file for file in FOLDER.iterdir()}


def test_upload_ask_and_see_both_answers(open_tab, pictures, by_hand, tmp_path):
    shutil.copy(pictures["white"], tmp_path / "mine.jpg")
    question = "which digit is white ?"
    expected, left = by_hand(pictures["white"], question)
    tab = open_tab()
    upload(tab, tmp_path / "mine.jpg")
    assert ask(tab, question) == expected
    assert f"from {left} of 144 visual tokens" in tab.inner_text(".verdict")
    costs = tab.locator("#patched dd").all_inner_texts()
    assert len(costs) == 3
    assert "×" in costs[0]
    assert "%" in costs[2]


def test_the_merge_slider_changes_the_overlay(open_tab, pictures):
    tab = open_tab()
    upload(tab, pictures["green"])
    ask(tab, "which digit is green ?")
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


def test_the_reduction_slider_asks_the_patched_side_again(open_tab, pictures):
    tab = open_tab()
    upload(tab, pictures["white"])
    plain, _ = ask(tab, "which digit is white ?")
    before = tab.inner_text(".verdict")
    slide(tab, "reduction", 0.3)
    tab.wait_for_function(
        "b => { const v = document.querySelector('.verdict'); return v && v.innerText !== b }", arg=before
    )
    assert answers(tab)[0] == plain
    assert "of 144" in tab.inner_text(".verdict")
    assert tab.inner_text(".verdict") != before


def test_several_pictures_and_a_video_from_the_examples(open_tab):
    tab = open_tab()
    for number, word, count in ((4, "cyan", 4), (5, "order", 2)):
        tab.locator("#samples .thumbnail-item").nth(number).click()
        tab.wait_for_function(
            "w => document.querySelector('#question textarea, #question input').value.includes(w)", arg=word
        )
        tab.click("#ask")
        if number == 5:
            tab.wait_for_function("() => !document.querySelector('.verdict')")
        plain, patched = answers(tab)
        assert plain
        assert patched
        assert tab.locator(".overlay img").count() >= count


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


def test_two_tabs_at_once_do_not_disturb_each_other(open_tab, server, pictures, by_hand):
    questions = {"white": "which digit is white ?", "green": "which digit is green ?"}
    tabs = {name: open_tab() for name in questions}
    for name, tab in tabs.items():
        upload(tab, pictures[name])
        tab.locator("#question textarea, #question input").fill(questions[name])
    slide(tabs["green"], "reduction", 0.0)
    for tab in tabs.values():
        tab.click("#ask")
    seen = {name: answers(tab) for name, tab in tabs.items()}
    for name, question in questions.items():
        expected, _ = by_hand(pictures[name], question)
        assert seen[name][0] == expected[0]
    assert seen["green"][1] == seen["green"][0]
    assert "0.0% merged away" in tabs["green"].inner_text(".verdict")
    assert "0.0%" not in tabs["white"].inner_text(".verdict")


def test_nothing_is_kept_of_a_closed_tab(open_tab, server, pictures):
    before = {file for file in server.uploads.rglob("*") if file.is_file()}
    tab = open_tab()
    upload(tab, pictures["pink"])
    uploaded = {file for file in server.uploads.rglob("*") if file.is_file()} - before
    assert uploaded
    known = len(server.sessions)
    other = open_tab()  # so that something waits while the first one goes
    tab.close()
    for _ in range(120):
        if len(server.sessions) < known and not any(file.exists() for file in uploaded):
            break
        other.wait_for_timeout(250)
    assert len(server.sessions) < known
    assert not any(file.exists() for file in uploaded)


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
