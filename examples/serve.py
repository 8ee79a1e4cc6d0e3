"""Serve a patched model to OpenAI clients: `python examples/serve.py MODEL --reduction 0.778`.

    from openai import OpenAI
    client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")

Chat completions with text and pictures (as data URLs), streamed or whole. One model answers one request at a
time; those that come meanwhile wait in a queue of bounded length, and one too many is told to come again
(HTTP 429 with Retry-After) instead of making everybody slow.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import logging
import threading
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Literal

try:
    import torch
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, StreamingResponse
    from PIL import Image
    from pydantic import BaseModel, Field
    from transformers import AsyncTextIteratorStreamer, StoppingCriteria

    import illava
    from illava.harness.answering import Answerer
    from illava.harness.arguments import plan_from_arguments
    from illava.memory import is_memory
except ModuleNotFoundError as missing:
    raise SystemExit(
        f'serve.py needs {missing.name}, which is not installed: run `pip install ".[serve]"`'
    ) from missing


_log = logging.getLogger("illava.serve")


class ImageURL(BaseModel):
    url: str


class Part(BaseModel):
    """A part of a message, as OpenAI's clients write it."""

    type: Literal["text", "image_url"]
    text: str = ""
    image_url: ImageURL | None = None


class Message(BaseModel):
    role: Literal["system", "user", "assistant"]
    content: str | list[Part]


class StreamOptions(BaseModel):
    include_usage: bool = False


class Chat(BaseModel):
    """What of OpenAI's chat completions is understood; other fields are refused, not overlooked."""

    model_config = {"extra": "forbid"}

    messages: list[Message] = Field(min_length=1)
    model: str = ""
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=0.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] = 1
    user: str | None = None


class RefusedError(Exception):
    """A request that cannot be answered, with its HTTP status."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass
class Service:
    """One model, and who waits for it.

    Attributes:
        answerer: the patched model.
        name: what clients call it.
        longest_queue: requests that may wait while one is answered.
        most_tokens: of an answer, whatever is asked for.
        unfinished, answered: requests, now and since the start.
    """

    answerer: Answerer
    name: str
    longest_queue: int = 8
    most_tokens: int = 1024
    unfinished: int = 0
    answered: int = 0

    def __post_init__(self) -> None:
        self._turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def waiting(self) -> int:
        """Requests in the queue: one of the unfinished has its turn."""
        return max(0, self.unfinished - 1)

    def submit(self, chat: Chat) -> Answer:
        """Have a request answered when its turn comes.

        Raises:
            RefusedError: too many wait already.
        """
        # Counted here, not where the turn begins: several may come before the first of them has it.
        if self.unfinished > self.longest_queue:
            raise RefusedError(429, f"{self.waiting} requests are waiting already; try again in a moment")
        answer = Answer(chat)
        self.unfinished += 1
        answer.task = asyncio.create_task(self._answer(answer))
        self._tasks.add(answer.task)  # the event loop itself would forget it
        answer.task.add_done_callback(self._tasks.discard)
        return answer

    async def _answer(self, answer: Answer) -> None:
        """Whatever becomes of the client, the model is free again when this ends."""
        try:
            async with self._turn:
                answer.begun = True
                streamer = AsyncTextIteratorStreamer(
                    self.answerer.processor.tokenizer, True, skip_special_tokens=True
                )
                worker = asyncio.create_task(asyncio.to_thread(self._generate, answer, streamer))
                async for piece in streamer:
                    answer.parts.put_nowait(piece)
                usage = await worker
            self.answered += 1
            answer.parts.put_nowait(usage)
        except asyncio.CancelledError:  # while it waited
            answer.parts.put_nowait(RefusedError(499, "the client is gone"))
        except RefusedError as refused:
            answer.parts.put_nowait(refused)
        except Exception as error:  # whatever a model may raise: its client is told, the next has its turn
            _log.exception("a request failed")
            answer.parts.put_nowait(RefusedError(500, f"{type(error).__name__}: {error}"))
        finally:
            self.unfinished -= 1

    @torch.inference_mode()
    def _generate(self, answer: Answer, streamer: AsyncTextIteratorStreamer) -> Usage:
        chat, model = answer.chat, self.answerer.model
        asked = chat.max_completion_tokens or chat.max_tokens or self.most_tokens
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if chat.temperature > 0:
            sampling = {"do_sample": True, "temperature": chat.temperature, "top_p": chat.top_p}
        try:
            if answer.unwanted.is_set():
                raise RefusedError(499, "the client is gone")
            inputs = self.answerer.inputs([in_transformers_form(chat.messages)])
            ids = model.generate(
                **inputs, **sampling, streamer=streamer, stopping_criteria=[Unwanted(answer)],
                max_new_tokens=min(asked, self.most_tokens),
            )  # fmt: skip
        except (MemoryError, RuntimeError) as error:
            if not is_memory(error):
                raise
            remedy = "send smaller pictures, or serve with a higher --reduction"
            raise RefusedError(413, f"this request does not fit in memory; {remedy}") from error
        finally:
            streamer.end()
        prompt, whole = inputs["input_ids"].shape[1], ids.shape[1]
        ends = model.generation_config.eos_token_id
        ended = int(ids[0, -1]) in (ends if isinstance(ends, list) else [ends])
        counts = {"prompt_tokens": prompt, "completion_tokens": whole - prompt, "total_tokens": whole}
        report = self.answerer.handle.report
        if report is not None and "pixel_values" in inputs:
            counts["visual_tokens"] = sum(picture.tokens for picture in report.pictures)
            counts["visual_tokens_left"] = sum(picture.final_tokens for picture in report.pictures)
        return Usage("stop" if ended else "length", counts)


@dataclass(frozen=True)
class Usage:
    """Why an answer ended, and the tokens it took."""

    finish_reason: str
    counts: dict[str, int]


class Answer:
    """An answer in the making: its text piece by piece, then its usage, or what went wrong."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        self.parts: asyncio.Queue[str | Usage | RefusedError] = asyncio.Queue()
        self.task: asyncio.Task[None] | None = None
        self.begun = False
        self.unwanted = threading.Event()

    def end(self) -> None:
        """Its client is gone: what is being generated stops, what still waits gives its place back."""
        self.unwanted.set()
        if self.task is not None and not self.begun:
            self.task.cancel()

    async def next_part(self) -> str | Usage:
        """The next piece, or the usage behind the last one; raises what went wrong."""
        while (part := await self.parts.get()) == "":
            pass
        if isinstance(part, RefusedError):
            raise part
        return part


class Unwanted(StoppingCriteria):
    """Ends an answer that nobody listens to any more."""

    def __init__(self, answer: Answer) -> None:
        self._unwanted = answer.unwanted

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self._unwanted.is_set(), device=input_ids.device)


def in_transformers_form(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages with their pictures decoded."""
    turns = []
    for message in messages:
        parts = (
            [Part(type="text", text=message.content)] if isinstance(message.content, str) else message.content
        )
        content = [
            {"type": "text", "text": part.text}
            if part.type == "text"
            else {"type": "image", "image": picture(part.image_url)}
            for part in parts
        ]
        turns.append({"role": message.role, "content": content})
    return turns


def picture(address: ImageURL | None) -> Image.Image:
    """The picture of a data URL; addresses are not fetched, so that nobody can send this server elsewhere."""
    head, comma, data = (address.url if address else "").partition(",")
    if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
        raise RefusedError(400, "image_url must be a data URL: data:image/png;base64,...")
    try:
        opened = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        return opened.convert("RGB")
    except Exception as error:  # what a broken picture raises is up to each of PIL's readers
        raise RefusedError(400, f"a picture cannot be read: {error}") from error


def application(service: Service) -> FastAPI:
    """The server, for uvicorn or any other that speaks ASGI."""
    app = FastAPI(title="illava", docs_url="/")

    @app.exception_handler(RefusedError)
    async def refuse(request: Request, error: RefusedError) -> JSONResponse:
        headers = {"Retry-After": "1"} if error.status == 429 else {}
        return JSONResponse({"error": as_error(error)}, error.status, headers=headers)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "waiting": service.waiting, "answered": service.answered}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": service.name, "object": "model", "owned_by": "illava"}]}

    @app.post("/v1/chat/completions")
    async def complete(chat: Chat, request: Request) -> Any:
        about = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": service.name,
        }
        answer = service.submit(chat)
        watching = asyncio.create_task(watch(request, answer))
        try:
            # What cannot be answered is said before the first byte, with a status.
            part = await answer.next_part()
            text = ""
            while isinstance(part, str) and not chat.stream:
                text += part
                part = await answer.next_part()
        finally:
            watching.cancel()
        if chat.stream:
            return StreamingResponse(events(answer, part, about), media_type="text/event-stream")
        choice = {"index": 0, "finish_reason": part.finish_reason,
                  "message": {"role": "assistant", "content": text}}  # fmt: skip
        return about | {"object": "chat.completion", "choices": [choice], "usage": part.counts}

    return app


CHUNK = {"object": "chat.completion.chunk"}


async def watch(request: Request, answer: Answer) -> None:
    """End an answer whose client leaves while it waits for the first piece, or for the whole."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.2)
    answer.end()


async def events(answer: Answer, part: str | Usage, about: dict[str, Any]) -> AsyncIterator[str]:
    """An answer as server-sent events; a client that leaves ends it."""
    try:
        yield event_of(about, {"role": "assistant", "content": ""})
        while isinstance(part, str):
            yield event_of(about, {"content": part})
            part = await answer.next_part()
        yield event_of(about, {}, part.finish_reason)
        if answer.chat.stream_options and answer.chat.stream_options.include_usage:
            yield f"data: {json.dumps(about | CHUNK | {'choices': [], 'usage': part.counts})}\n\n"
        yield "data: [DONE]\n\n"
    except RefusedError as error:  # too late for a status
        yield f"data: {json.dumps({'error': as_error(error)})}\n\n"
    finally:
        answer.end()


def event_of(about: dict[str, Any], delta: dict[str, Any], reason: str | None = None) -> str:
    """A piece of an answer as a server-sent event."""
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    return f"data: {json.dumps(about | CHUNK | {'choices': [choice]})}\n\n"


def as_error(error: RefusedError) -> dict[str, Any]:
    """As OpenAI's clients read it."""
    kinds = {429: "rate_limit_error", 500: "server_error"}
    kind = kinds.get(error.status, "invalid_request_error")
    return {"message": str(error), "type": kind, "code": None, "param": None}


def main() -> None:
    """Load the model, then serve until interrupted."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("model", help="folder of a checkpoint, or a name on the hub")
    parser.add_argument("--reduction", type=float, help="share of the visual tokens to remove")
    parser.add_argument(
        "--plan", help="paper, release, or a file with a plan's JSON, as `illava plan` writes"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where")
    parser.add_argument("--dtype", default="auto", help="of the weights")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0 for any that is free")
    parser.add_argument("--queue", type=int, default=8, help="requests that may wait")
    parser.add_argument("--max-tokens", type=int, default=1024, help="longest answer")
    options = parser.parse_args()
    said = {"plan": options.plan, "reduction": options.reduction}
    plan = plan_from_arguments({name: value for name, value in said.items() if value is not None})
    answerer = Answerer.load(options.model, plan, device=options.device, dtype=options.dtype)
    service = Service(answerer, options.model, options.queue, options.max_tokens)
    uvicorn.run(application(service), host=options.host, port=options.port)


if __name__ == "__main__":
    try:
        main()
    except illava.IllavaError as error:  # its message says what to do; a traceback adds nothing
        raise SystemExit(f"illava: {error}") from error
