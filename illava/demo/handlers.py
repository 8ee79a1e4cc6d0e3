"""What happens when a user does something: plain functions from what is on the page to what comes next."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import gradio as gr

from illava.demo import cards
from illava.demo.asking import Answer, Asker, Prompt
from illava.demo.controls import own_of, plan_by, plan_of
from illava.demo.media import Clip, Limits, Picture, read
from illava.demo.overlays import Overlays
from illava.demo.sessions import Session, Sessions
from illava.errors import DemoError, IllavaError, UploadError
from illava.plan import Plan

_log = logging.getLogger(__name__)
# What a gallery hands over: each file with its caption.
Gallery = list[tuple[str, Any]] | None


class Shown(NamedTuple):
    """Everything that an answer changes on the page, in the order of its components."""

    notice: Any = gr.skip()
    unpatched: Any = gr.skip()
    patched: Any = gr.skip()
    verdict: Any = gr.skip()
    stairs: Any = gr.skip()
    merge: Any = gr.skip()
    importance: Any = gr.skip()
    overlay: Any = gr.skip()


@dataclass(frozen=True)
class Handlers:
    """The page's handlers for one model. Gradio passes `request`, which names the tab."""

    asker: Asker
    sessions: Sessions
    limits: Limits

    def look(self, request: gr.Request, gallery: Gallery) -> str:
        """Read what was brought; says what is wrong with it."""
        try:
            self._read(request, gallery)
        except IllavaError as error:
            return cards.notice(str(error))
        return ""

    def ask(
        self, request: gr.Request, gallery: Gallery, question: str, answer_tokens: float, *controls: Any
    ) -> Iterator[Shown]:
        """Ask both sides, the unpatched one first."""
        try:
            session = self.sessions.of(request.session_hash)
            stop = session.begin()
            session.asked = session.unpatched = session.overlays = None
            plan = plan_of(*controls)
            most = min(int(answer_tokens), self.limits.answer_tokens)
            prompt = self._prompt(self._read(request, gallery), question)
            waiting = cards.card("illava", None, state="after the unpatched model")
            looking = cards.card("unpatched", None, state="looking")
            yield Shown("", looking, waiting, "", "", _hidden(), _hidden(), "")
            for answer in self.asker.ask(prompt, None, answer_tokens=most, stop=stop):
                session.unpatched = answer
                yield Shown(unpatched=cards.card("unpatched", answer))
            if stop.is_set():  # half an answer is nothing to compare with
                yield Shown(patched=cards.card("illava", None, state="not asked"))
                return
            session.asked = prompt
            yield from self._patched(session, plan, most, 0, False)
        except Exception as error:
            yield Shown(notice=_words(error))

    def ask_again(
        self, request: gr.Request, merge: float, importance: bool, answer_tokens: float, *controls: Any
    ) -> Iterator[Shown]:
        """Ask the patched side again, under another plan; the unpatched answer stays as it is.

        Args:
            merge, importance: which overlay is shown, and whether with what ranked the tokens; stays so.
        """
        try:
            session = self.sessions.of(request.session_hash)
            if session.asked is None or session.unpatched is None:
                yield Shown()
                return
            session.begin()
            most = min(int(answer_tokens), self.limits.answer_tokens)
            yield from self._patched(session, plan_of(*controls), most, int(merge), importance)
        except Exception as error:
            yield Shown(notice=_words(error))

    def follow(self, rule: Any, vit_rule: Any) -> list[Any]:
        """What a newly chosen rule begins with: layers and share of its own."""
        return own_of(self.asker.settle(plan_by(rule, vit_rule)))

    def follow_encoder(self, rule: Any, vit_rule: Any) -> list[Any]:
        """The same of the encoder's rule, which leaves the decoder's layers as they are."""
        share, vit_layers, _, *others = self.follow(rule, vit_rule)
        return [share, vit_layers, gr.skip(), *others]

    def stop(self, request: gr.Request) -> None:
        """End the answer under way after the token that is being made."""
        self.sessions.of(request.session_hash).stop.set()

    def show(self, request: gr.Request, merge: float, importance: bool) -> tuple[str, str]:
        """The overlay of one merge, and its place on the stairs."""
        overlays = self.sessions.of(request.session_hash).overlays
        if overlays is None:
            return "", ""
        return overlays.html(int(merge), importance), cards.staircase(overlays.report, int(merge))

    def close(self, request: gr.Request) -> None:
        """The tab is gone."""
        self.sessions.close(request.session_hash)

    def _read(self, request: gr.Request, gallery: Gallery) -> tuple[Picture | Clip, ...]:
        """What was brought, decoded; it stays so until something else is brought.

        Raises:
            IllavaError: what is wrong with it.
        """
        session = self.sessions.of(request.session_hash)
        with session.reading:  # asking may begin while an upload is still being read
            before = session.files
            files = self.sessions.bring(request.session_hash, [file for file, _ in gallery or ()])
            if files != before or not session.shown:
                session.shown = ()
                if len(files) > self.limits.files:
                    raise UploadError(f"{len(files)} files are too many; bring at most {self.limits.files}")
                session.shown = tuple(read(file, self.limits) for file in files)
            return session.shown

    def _prompt(self, shown: tuple[Picture | Clip, ...], question: str) -> Prompt:
        if not shown:
            raise DemoError("there is nothing to look at yet; bring a picture or a video, or pick an example")
        if not question.strip():
            raise DemoError("there is no question yet; write one below the picture")
        if len(question) > self.limits.question:
            raise DemoError(
                f"the question has {len(question):,} characters; ask in at most {self.limits.question:,}"
            )
        return Prompt(shown, question.strip())

    def _patched(
        self, session: Session, plan: Plan, answer_tokens: int, merge: int, importance: bool
    ) -> Iterator[Shown]:
        """The patched side, and then everything that is known of it."""
        plain, prompt = session.unpatched, session.asked
        if prompt is None:
            return
        answer = Answer()
        yield Shown("", patched=cards.card("illava", None, plain, "looking"), verdict="")
        for answer in self.asker.ask(prompt, plan, answer_tokens=answer_tokens, stop=session.stop):
            yield Shown(patched=cards.card("illava", answer, plain))
        report = answer.report
        if report is None:
            session.overlays = None
            verdict = "" if session.stop.is_set() else cards.verdict(plain, answer)
            yield Shown(verdict=verdict, stairs="", merge=_hidden(), importance=_hidden(), overlay="")
            return
        session.overlays = overlays = Overlays(report, prompt.shown)
        last = overlays.last
        place = merge if 0 < merge <= last else last
        yield Shown(
            verdict=cards.verdict(plain, answer),
            stairs=cards.staircase(report, place),
            merge=gr.update(maximum=last, value=place, visible=True) if last else _hidden(),
            importance=gr.update(visible=last > 0),
            overlay=overlays.html(place, importance),
        )


def _hidden() -> Any:
    return gr.update(visible=False)


def _words(error: Exception) -> str:
    """What went wrong, for the page; what nobody foresaw goes to the log in full."""
    if isinstance(error, IllavaError):
        return cards.notice(str(error))
    _log.exception("a question could not be answered")
    first = (str(error).splitlines() or [""])[0]
    return cards.notice(
        f"this did not work: {type(error).__name__}: {first}. The server's log says where; another picture, "
        "question or plan may work"
    )
