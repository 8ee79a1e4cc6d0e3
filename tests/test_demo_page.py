"""The web page as it is served, without a browser: what it answers, bounds, refuses and says."""

import dataclasses
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForImageTextToText

from illava.demo import asking, media
from illava.demo.loading import default_model, load
from illava.demo.media import Limits
from illava.demo.samples import FOLDER, SAMPLES
from illava.plan import Plan


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("gradio", reason='the web page needs Gradio: pip install ".[demo]"')
    from illava.demo.server import Server

    torch.set_num_threads(1)
    limits = Limits(file_bytes=100_000, files=2, question=40, answer_tokens=8, waiting=2, folder_bytes=10**6)
    with Server(load(default_model(), "cpu"), host="127.0.0.1", port=free_port(), limits=limits) as server:
        yield server
    assert not server.uploads.exists()


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def tab(server):
    """A tab, as Gradio names it to the page's handlers."""
    request = SimpleNamespace(session_hash=uuid.uuid4().hex)
    yield request
    server.handlers.close(request)


def plan_of(server, reduction=77.8, rule="bipartite"):
    own = server.handlers.asker.settle(Plan(merge=rule))
    return (
        reduction, 100 * own.encoder_share, own.vit_layers, own.llm_layers, rule, "same", "attention", "text",
        "window",
    )  # fmt: skip


def last(shown, name):
    """The last thing that was put there."""
    import gradio

    skipped = gradio.skip()
    return [value for step in shown if (value := getattr(step, name)) != skipped][-1]


def ask(server, tab, sample=SAMPLES[0], question=None, plan=None):
    gallery = [(file, None) for file in sample.files]
    chosen = plan_of(server) if plan is None else plan
    return list(server.handlers.ask(tab, gallery, question or sample.question, 8, *chosen))


@pytest.mark.parametrize("part", ["page.draw_page", "page.theme", "handlers.Handlers"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_page_that_cannot_be_opened_leaves_nothing_behind(part, error, tmp_path, monkeypatch):
    pytest.importorskip("gradio", reason='the web page needs Gradio: pip install ".[demo]"')
    from illava.demo.server import Server

    def fail(*_):
        raise error("no page")

    monkeypatch.setattr(f"illava.demo.{part}", fail)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("GRADIO_TEMP_DIR", "before")
    asker = asking.Asker(AutoModelForImageTextToText.from_pretrained(default_model()), None, "reader")
    asker._thread.submit(int).result()  # there is a thread now
    (thread,) = asker._thread._threads
    with pytest.raises(error, match="no page"):
        Server(asker, host="127.0.0.1", port=free_port())
    assert list(tmp_path.iterdir()) == []
    assert os.environ["GRADIO_TEMP_DIR"] == "before"
    assert not thread.is_alive()


def test_both_sides_answer_and_say_what_it_cost(server, tab):
    shown = ask(server, tab)
    for side in ("unpatched", "patched"):
        assert '<p class="said">six</p>' in last(shown, side)
    assert "<b>The same answer</b> from <b>32 of 144</b>" in last(shown, "verdict")
    assert last(shown, "merge")["maximum"] == 7
    before, _ = server.handlers.show(tab, 0, False)
    after, stairs = server.handlers.show(tab, 2, False)
    assert "before any merge" in before
    assert "after encoder block 3" in after
    assert before.split("base64,")[1] != after.split("base64,")[1]
    assert stairs.count('class="step vit now"') == 1
    again = list(server.handlers.ask_again(tab, 2, False, 8, *plan_of(server, 0)))
    assert "this plan merges none" in last(again, "verdict")
    assert last(again, "overlay") == ""


# Of every control a value that is not the page's first, and what it means in a plan.
OTHER = {
    "reduction": (61.5, "reduction", 0.615),
    "encoder_share": (73, "encoder_share", 0.73),
    "vit_layers": ([2, 5], "vit_layers", (2, 5)),
    "llm_layers": ([3], "llm_layers", (3,)),
    "rule": ("linear", "merge", "linear"),
    "vit_rule": ("bipartite", "vit_merge", "bipartite"),
    "score": ("lse", "score", "lse"),
    "queries": ("visual", "queries", "visual"),
    "windows": ("picture", "window_score", "picture"),
}


def test_every_control_is_heard(server, tab, monkeypatch):
    """Each alone, and all at once, by both who ask; the components stand in the order of the values."""
    from illava.demo import controls

    assert list(OTHER) == [field.name for field in dataclasses.fields(controls.Controls)]
    first = list(plan_of(server, rule="recycle"))
    heard, ask_asker = [], asking.Asker.ask

    def watched(asker, prompt, plan, **rest):
        heard.append(plan)
        return ask_asker(asker, prompt, plan, **rest)

    begun = controls.plan_of(*first)
    for place, (value, setting, meant) in enumerate(OTHER.values()):
        assert getattr(begun, setting) != meant
        changed = controls.plan_of(*first[:place], value, *first[place + 1 :])
        assert changed == dataclasses.replace(begun, **{setting: meant})
    monkeypatch.setattr(asking.Asker, "ask", watched)
    values, plan = zip(*((value, (name, meant)) for value, name, meant in OTHER.values()), strict=True)
    ask(server, tab, plan=first)
    list(server.handlers.ask_again(tab, 0, False, 8, *values))
    ask(server, tab, plan=values)
    assert heard == [None, begun, Plan(**dict(plan)), None, Plan(**dict(plan))]


def test_layers_and_share_follow_the_rule(server):
    """As an unnamed layer or share does in a plan; what ranks tokens can be chosen where they are ranked."""
    from illava.demo.controls import SAME

    for rule, vit_rule, ranked in (
        ("recycle", SAME, True), ("bipartite", SAME, False), ("bipartite", "bipartite", False),
        ("bipartite", "prune", True), ("linear", "bipartite", True),
    ):  # fmt: skip
        own = server.handlers.asker.settle(Plan(merge=rule, vit_merge=None if vit_rule == SAME else vit_rule))
        share, vit, llm, *others = server.handlers.follow(rule, vit_rule)
        assert share["value"] == 100 * own.encoder_share
        assert (vit["value"], llm["value"]) == ([*own.vit_layers], [*own.llm_layers])
        assert [update["interactive"] for update in others] == [ranked] * 3
        one = server.handlers.follow_encoder(rule, vit_rule)
        assert one[:2] == [share, vit]
        assert "value" not in one[2], "the decoder's layers stay as they are"
    vit, llm = (server.handlers.follow("recycle", SAME)[i]["value"] for i in (1, 2))
    default = server.handlers.asker.default
    assert vit != [*default.vit_layers]
    assert llm != [*default.llm_layers]


def test_what_is_wrong_is_said_in_words(server, tab, monkeypatch):
    for gallery, question, words in (
        ([], "what ?", "There is nothing to look at yet; bring a picture"),
        (SAMPLES[0].files, "  ", "There is no question yet"),
        (SAMPLES[0].files, "?" * 41, "has 41 characters; ask in at most 40"),
        (SAMPLES[4].files, "what ?", "4 files are too many; bring at most 2"),
        (["/etc/hostname"], "what ?", "Hostname is not an upload"),
    ):
        asked = server.handlers.ask(tab, [(f, None) for f in gallery], question, 8, *plan_of(server))
        assert words in last(list(asked), "notice")
    beyond = (77.8, 40, (99,), (1,), "bipartite", "same", "attention", "text", "window")
    assert "99" in last(ask(server, tab, plan=beyond), "notice")

    def fail(*_, **__):
        raise RuntimeError("<b>boom</b>\nsecond line")

    monkeypatch.setattr(server.handlers.asker.model, "generate", fail)
    notice = last(ask(server, tab), "notice")
    assert "This did not work: RuntimeError: &lt;b&gt;boom&lt;/b&gt;. The server" in notice
    assert "second line" not in notice


def test_an_answer_is_no_longer_than_the_page_allows(server, tab, monkeypatch):
    asked = []
    generate = server.handlers.asker.model.generate
    monkeypatch.setattr(
        server.handlers.asker.model,
        "generate",
        lambda **kwargs: asked.append(kwargs["max_new_tokens"]) or generate(**kwargs),
    )
    gallery = [(file, None) for file in SAMPLES[0].files]
    list(server.handlers.ask(tab, gallery, SAMPLES[0].question, 10**6, *plan_of(server)))
    assert max(asked) == 8


def test_a_closed_tab_ends_its_answer(server, tab):
    answers = server.handlers.ask(
        tab, [(file, None) for file in SAMPLES[5].files], SAMPLES[5].question, 8, *plan_of(server)
    )
    next(answers)
    session = server.sessions.of(tab.session_hash)
    server.handlers.close(tab)
    assert session.stop.is_set()
    assert last(list(answers), "patched").count("not asked") == 1
    assert tab.session_hash not in server.sessions


def test_half_an_answer_is_compared_with_nothing(server, tab):
    """Stopped before the patched side was asked, sliders have nothing to ask again."""
    handlers = server.handlers
    files, question = [(file, None) for file in SAMPLES[5].files], SAMPLES[5].question
    answers = handlers.ask(tab, files, question, 8, *plan_of(server))
    next(answers)
    handlers.stop(tab)
    assert last(list(answers), "patched").count("not asked") == 1
    assert len(list(handlers.ask_again(tab, 0, False, 8, *plan_of(server)))) == 1
    assert server.sessions.of(tab.session_hash).asked is None


def test_closing_does_not_wait_for_a_long_answer(server, monkeypatch):
    own = server.handlers.asker
    asker = asking.Asker(own.model, own.processor, own.name)
    monkeypatch.setattr(own.model.generation_config, "eos_token_id", None)
    put = asking._Tap.put
    monkeypatch.setattr(asking._Tap, "put", lambda tap, value: (time.sleep(0.05), put(tap, value)))
    prompt = asking.Prompt([media.read(FOLDER / "white.jpg", Limits())], SAMPLES[0].question)
    answers = asker.ask(prompt, Plan(), answer_tokens=1_000, stop=threading.Event())  # fifty seconds
    next(answers)
    begun = time.monotonic()
    asker.close()
    assert time.monotonic() - begun < 10
    assert next(x for x in answers if x.done).report is None


def post(server, path, body, **headers):
    """Status and text of what the page says to this."""
    request = urllib.request.Request(server.url + path.lstrip("/"), body, headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def upload(server, content: bytes):
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + content
    body += b"\r\n--x--\r\n"
    return post(server, "gradio_api/upload", body, **{"Content-Type": "multipart/form-data; boundary=x"})


def announce(server, length: str | None, path: str = "upload"):
    """What the page says to the head of a request, before any of it has come."""
    connection = http.client.HTTPConnection(server.url.split("/")[2], timeout=30)
    connection.putrequest("POST", f"/gradio_api/{path}")
    if length is not None:
        connection.putheader("Content-Length", length)
    connection.endheaders()
    with closing(connection), connection.getresponse() as answer:
        return answer.status, answer.read().decode()


def test_uploads_are_bounded_one_by_one_and_together(server, monkeypatch):
    status, said = upload(server, b"small")
    assert status == 200
    assert json.loads(said)[0].startswith(str(server.uploads))
    assert upload(server, b"x" * 100_001)[0] == 413  # Gradio's own, of a file
    limits = server.handlers.limits
    assert announce(server, str(limits.request_bytes + 1)) == (413, "bring at most 1 MiB at once")
    assert announce(server, str(2**20 + 1), "queue/join") == (413, "bring at most 1 MiB at once")
    for path in ("component_server", "process_recording", "run/ask", "call/ask"):  # Gradio's, not the page's
        assert announce(server, "10", path) == (404, "nothing is posted here")
    assert announce(server, None) == (411, "what is sent has to say how long it is")
    (server.uploads / "others").write_bytes(b"x" * limits.folder_bytes)
    status, said = upload(server, b"small")
    assert status == 507
    assert "all users together" in said
    (server.uploads / "others").unlink()
    assert upload(server, b"small")[0] == 200


@pytest.mark.parametrize("path", ["/etc/hostname", str(FOLDER.parent / "server.py"), "../server.py"])
def test_no_file_of_the_machine_is_served(server, path):
    assert post(server, f"gradio_api/file={path}", None)[0] in (403, 404)


def test_a_shipped_example_is_served(server):
    with urllib.request.urlopen(f"{server.url}gradio_api/file={FOLDER / 'white.jpg'}") as answer:
        assert answer.read() == (FOLDER / "white.jpg").read_bytes()


def test_more_questions_than_the_queue_holds_are_turned_away(server, monkeypatch):
    go = threading.Event()
    monkeypatch.setattr(type(server.handlers.asker), "_answer", lambda *_: go.wait(30))
    config = json.loads(post(server, "config", None)[1])
    asking = next(d for d in config["dependencies"] if len(d["inputs"]) == 12 and len(d["outputs"]) == 8)
    gallery = [
        {"image": {"path": SAMPLES[0].files[0], "meta": {"_type": "gradio.FileData"}}, "caption": None}
    ]
    body = {"data": [gallery, "what ?", 8, *plan_of(server)], "fn_index": asking["id"]}
    try:
        said = [
            post(
                server, "gradio_api/queue/join", json.dumps(body | {"session_hash": f"tab{n}"}).encode(),
                **{"Content-Type": "application/json"},
            )
            for n in range(8)
        ]  # fmt: skip
    finally:
        go.set()
    statuses = [status for status, _ in said]
    assert statuses[0] == 200
    assert 503 in statuses, said
    assert "full" in said[-1][1].lower()
    assert statuses.count(200) <= 4  # one being answered or about to be, and those that wait


@pytest.mark.slow
@pytest.mark.parametrize(("ended_with", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_the_command_serves_until_it_is_ended_and_leaves_no_upload(tmp_path, ended_with, status):
    pytest.importorskip("gradio", reason='the web page needs Gradio: pip install ".[demo]"')
    root, folder = Path(__file__).resolve().parent.parent, tmp_path / "temporary"
    folder.mkdir()
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
        "TMPDIR": str(folder),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    port, said = free_port(), tmp_path / "said"
    with said.open("w") as out:
        command = subprocess.Popen(
            [sys.executable, "-m", "illava", "demo", "--port", str(port), "--device", "cpu"],
            cwd=tmp_path, env=environment, stdout=out, stderr=subprocess.STDOUT,
            # A shell that runs tests in the background has them ignore Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
    try:
        end = time.monotonic() + 300
        while not (at := re.search(r"illava is at (\S+) ", said.read_text())):
            assert command.poll() is None, said.read_text()
            assert time.monotonic() < end, "no address in five minutes: " + said.read_text()
            time.sleep(0.1)
        assert at[1] == f"http://127.0.0.1:{port}/"
        opened = SimpleNamespace(url=at[1])
        code, page = post(opened, "/", None)
        assert code == 200
        assert "The same model answers twice" in page
        code, uploaded = upload(opened, b"a picture")
        assert code == 200
        (file,) = (Path(name) for name in json.loads(uploaded))
        assert file.read_bytes() == b"a picture"
        assert file.is_relative_to(folder)
        command.send_signal(ended_with)
        assert command.wait(timeout=120) == status, said.read_text()
    finally:
        command.kill()
        command.wait()
    assert "Traceback" not in said.read_text()
    assert ("the page is closed; what was uploaded is deleted" in said.read_text()) == (status == 130)
    assert [path for path in folder.rglob("*") if path.is_file()] == []
    assert list(folder.glob("illava-demo-*")) == []
