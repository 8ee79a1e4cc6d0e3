"""The example server, asked by OpenAI's own client over loopback."""

import asyncio
import base64
import io
import socket
import threading
import time

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

import illava
import tiny_checkpoint
from illava import Plan

for package in ("fastapi", "uvicorn", "openai"):
    pytest.importorskip(package, reason=f'needs {package}: pip install ".[serve]" openai')

import httpx  # noqa: E402  # comes with openai
import openai  # noqa: E402
import serve  # noqa: E402
import uvicorn  # noqa: E402

from illava.harness.answering import Answerer  # noqa: E402


@pytest.fixture(scope="module")
def answerer(tmp_path_factory):
    folder = tiny_checkpoint.build(tmp_path_factory.mktemp("checkpoint") / "tiny")
    return Answerer.load(str(folder), Plan(reduction=0.778))


@pytest.fixture
def server(answerer):
    """A running server: its service, and a client of it."""
    service = serve.Service(answerer, "tiny", longest_queue=2, most_tokens=400)
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    running = uvicorn.Server(uvicorn.Config(serve.application(service), log_level="warning"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not running.started:
        assert thread.is_alive()
        time.sleep(0.01)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    yield service, client
    client.close()
    running.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


def address(width=140, height=112):
    file = io.BytesIO()
    Image.fromarray(load_sample_image("china.jpg")).resize((width, height)).save(file, "png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def broken_chunk():
    """A PNG whose second chunk has no name."""
    data = bytearray(base64.b64decode(address().partition(",")[2]))
    data[37:41] = b"\x00\x00\x00\x00"
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def asked(text="what is this?", url=None):
    content = [{"type": "image_url", "image_url": {"url": url}}] if url else []
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def whole(client, **settings):
    settings = {"messages": asked(url=address()), "max_completion_tokens": 6} | settings
    return client.chat.completions.create(model="tiny", **settings)


def test_an_answer_is_that_of_the_patched_model(server, answerer):
    service, client = server
    reply = whole(client)
    data = base64.b64decode(address().partition(",")[2])
    picture = Image.open(io.BytesIO(data))
    conversation = [{"role": "user", "content": [
        {"type": "image", "image": picture}, {"type": "text", "text": "what is this?"}
    ]}]  # fmt: skip
    ((expected, _),) = answerer.answer([conversation], max_new_tokens=6, do_sample=False)
    assert reply.choices[0].message.content == expected
    assert reply.usage.completion_tokens <= 6
    assert reply.usage.prompt_tokens == answerer.inputs([conversation])["input_ids"].shape[1]
    assert reply.usage.visual_tokens == 20
    assert reply.usage.visual_tokens_left == answerer.handle.report.pictures[0].final_tokens < 8
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert service.answered == 1


def test_a_stream_says_the_same_piece_by_piece(server):
    _, client = server
    stream = list(whole(client, stream=True, stream_options={"include_usage": True}))
    plain = whole(client)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(pieces) == plain.choices[0].message.content
    assert stream[-2].choices[0].finish_reason == plain.choices[0].finish_reason
    assert stream[-1].usage == plain.usage


def test_text_alone_system_and_turns_are_answered(server):
    _, client = server
    reply = whole(client, messages=[{"role": "system", "content": "be brief"}, *asked("hello")])
    assert not hasattr(reply.usage, "visual_tokens")
    turns = [*asked(url=address()), {"role": "assistant", "content": "a house"}, *asked("and now?")]
    assert whole(client, messages=turns).usage.visual_tokens == 20
    sampled = [whole(client, temperature=2.0).choices[0].message.content for _ in range(4)]
    assert len(set(sampled)) > 1


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("https://example.org/a.png", "must be a data URL"),
        ("file:///etc/passwd", "must be a data URL"),
        ("data:image/png;base64,bm8gcGljdHVyZQ==", "cannot be read"),
        ("data:image/png;base64,%%%", "cannot be read"),
        (address()[:-400], "cannot be read"),
        ("data:image/png;base64,\u00e4", "cannot be read"),
        (broken_chunk(), "cannot be read"),
    ],
)
def test_a_bad_picture_is_a_bad_request(server, url, says):
    _, client = server
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=says):
            whole(client, messages=asked(url=url), stream=stream)
    assert whole(client).choices, "and the next is answered"


def test_what_is_not_understood_is_refused(server):
    _, client = server
    for settings in ({"logprobs": True}, {"n": 2}, {"messages": []}, {"max_completion_tokens": 0}):
        with pytest.raises(openai.UnprocessableEntityError):
            whole(client, **settings)


def slowed(model, seconds, failing=()):
    """Every pass of the language model takes that long, and the first ones fail."""
    failing = list(failing)

    def wait(*_):
        time.sleep(seconds)
        if failing:
            raise failing.pop(0)

    return model.model.language_model.register_forward_pre_hook(wait)


def test_a_full_queue_says_so_and_loses_nobody(server, answerer):
    """The model is held until five were refused: one request is in work then, and two wait."""
    service, client = server
    port, refusals = client.base_url.port, threading.Event()

    def held(*_):
        refusals.wait(60)

    hook = answerer.model.model.language_model.register_forward_pre_hook(held)
    try:

        async def all_at_once():
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}/v1", timeout=60) as many:
                body = {"model": "tiny", "messages": asked(url=address()), "max_tokens": 4}
                asks = [many.post("/chat/completions", json=body) for _ in range(8)]
                replies = []
                for reply in asyncio.as_completed(asks):
                    replies.append(await reply)
                    if len(replies) == 5:
                        refusals.set()
                return replies

        replies = asyncio.run(all_at_once())
    finally:
        refusals.set()
        hook.remove()
    assert [reply.status_code for reply in replies] == [429] * 5 + [200] * 3
    refused = next(reply for reply in replies if reply.status_code == 429)
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["type"] == "rate_limit_error"
    texts = {r.json()["choices"][0]["message"]["content"] for r in replies if r.status_code == 200}
    assert len(texts) == 1
    assert (service.answered, service.waiting) == (3, 0)
    assert whole(client).choices


def test_the_queue_is_bounded_when_all_come_at_the_same_moment(answerer):
    """Before the first of them has its turn."""
    service = serve.Service(answerer, "tiny", longest_queue=2)

    async def burst():
        answers, refused = [], 0
        for _ in range(8):
            try:
                answers.append(service.submit(serve.Chat(messages=asked(), max_tokens=1)))
            except serve.RefusedError as refusal:
                refused += refusal.status == 429
        for answer in answers:
            while isinstance(await answer.next_part(), str):
                pass
        return len(answers), refused

    assert asyncio.run(burst()) == (3, 5)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_model(stream, server, answerer):
    service, client = server
    hook = slowed(answerer.model, 0.1)
    try:
        began = time.monotonic()
        if stream:
            answer = whole(client, stream=True, max_completion_tokens=400)
            next(iter(answer))
            answer.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                whole(client.with_options(timeout=0.5), max_completion_tokens=400)
        assert whole(client, max_completion_tokens=2).choices
        assert time.monotonic() - began < 20, "not the 40 seconds of the whole answer"
    finally:
        hook.remove()


def test_a_client_that_leaves_while_it_waits_gives_its_place_back(server, answerer):
    service, client = server
    released, calls = threading.Event(), []

    def held(*_):
        calls.append(service.unfinished)
        released.wait(60)

    def soon(expected):
        for _ in range(3000):
            if service.unfinished == expected:
                return True
            time.sleep(0.01)
        return False

    hook = answerer.model.model.language_model.register_forward_pre_hook(held)
    first = threading.Thread(target=whole, args=(client,), kwargs={"max_completion_tokens": 1})
    try:
        first.start()
        assert soon(1)
        with pytest.raises(openai.APITimeoutError):
            whole(client.with_options(timeout=0.5))
        assert soon(1), "though the first is not answered yet"
        released.set()
        first.join(60)
    finally:
        released.set()
        hook.remove()
    assert soon(0)
    assert (service.answered, len(calls)) == (1, 1)


def test_a_failure_is_told_and_the_next_is_answered(server, answerer):
    service, client = server
    hook = slowed(answerer.model, 0, [
        RuntimeError("no such layer"), torch.OutOfMemoryError("CUDA"), RuntimeError("can't allocate memory")
    ])  # fmt: skip
    try:
        with pytest.raises(openai.InternalServerError, match="no such layer") as failed:
            whole(client)
        assert failed.value.body["type"] == "server_error"
        for _ in range(2):
            with pytest.raises(openai.APIStatusError, match="does not fit in memory.*--reduction") as refused:
                whole(client)
            assert refused.value.status_code == 413
        assert whole(client).choices
    finally:
        hook.remove()


def test_the_command_says_what_is_wrong(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["serve.py", str(tmp_path), "--reduction", "2"])
    with pytest.raises(illava.PlanError, match="reduction"):
        serve.main()


@pytest.mark.parametrize(
    ("options", "plan"),
    [
        ([], Plan()),
        (["--reduction", "0.5"], Plan(reduction=0.5)),
        (["--plan", "plan.json"], Plan((3,), (2,), 0.889)),
        (["--plan", "plan.json", "--reduction", "0.5"], Plan((3,), (2,), 0.5)),
    ],
)
def test_the_command_serves_the_plan_that_is_asked_for(options, plan, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.json").write_text(Plan((3,), (2,), 0.889).to_json())
    loaded = []
    monkeypatch.setattr(serve.Answerer, "load", lambda model, plan, **_: loaded.append(plan))
    monkeypatch.setattr(serve.uvicorn, "run", lambda *_, **__: None)
    monkeypatch.setattr("sys.argv", ["serve.py", "model", *options])
    serve.main()
    assert loaded == [plan]
