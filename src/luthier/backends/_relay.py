"""An engine whose tokens are computed by a server behind: the worker's interface over /v1/completions.

Source: vLLM's extensions of OpenAI's completions (https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html):
a prompt of token ids in, `return_token_ids` out. Text is made here, by the same `Unfolding` that the
embedded engine uses, so stop strings and half characters behave alike; a cancelled answer's connection is
cut, which ends it over there. What such a server cannot do as we promise it is refused before it is asked.

It does not know which server that is, nor how a release gets there: that is `Behind`.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from luthier import template
from luthier.backends._http import Door, Reply, Unreachable
from luthier.errors import LuthierError, ServeError
from luthier.serving.limits import Counts, Limits, busy
from luthier.serving.router import Target
from luthier.serving.text import Unfolding
from luthier.serving.worker import Ask, End, EngineFailed, Event, Failed, Reason, Said, Sink

COMPLETIONS = "/v1/completions"
REASONS = {"stop": Reason.STOP, "length": Reason.LENGTH}

log = logging.getLogger("luthier.backends")


class Unsupported(ServeError):
    """The backend in use cannot do this; another one can."""

    http_code = 400


@dataclass(frozen=True, slots=True)
class Place:
    """Where a release answers: the server, and what it is called there."""

    door: Door
    model: str
    path: str = COMPLETIONS


Token = tuple[int, float | None, tuple[tuple[int, float], ...]]


@dataclass(frozen=True, slots=True)
class Piece:
    """What one event of an answer brings, and why there is no more, if so."""

    tokens: Iterable[Token]
    ended: Reason | None = None


class Behind(Protocol):
    """The server: `held` makes a release answer there for as long as the block lasts, `asked` and `told` are
    the words that it is spoken to in."""

    def held(self, target: Target) -> AbstractContextManager[Place]: ...
    def asked(self, ask: Ask) -> dict[str, Any]: ...
    def told(self, reply: Reply, ask: Ask) -> Iterator[Piece]: ...
    def forget(self) -> None: ...
    def close(self) -> None: ...


@dataclass(slots=True, eq=False)
class _Line:
    ask: Ask
    sink: Sink
    cancelled: bool = False
    closed: bool = False
    begun: bool = False
    cut: Callable[[], None] | None = None

    def hold(self, cut: Callable[[], None]) -> None:
        """What ends the call. One that was cancelled while it connected ends here."""
        self.cut = cut
        if self.cancelled:
            cut()


class Relay:
    def __init__(self, behind: Behind, limits: Limits, name: str) -> None:
        self.behind = behind
        self._limits, self._name = limits, name
        self._changed = threading.Condition()
        self._lines: list[_Line] = []
        self._writers: dict[Path, Any] = {}
        self._writing = threading.Lock()
        self._closing = False
        self._threads = ThreadPoolExecutor(limits.active, "luthier-relay")

    def start(self) -> None:
        """Nothing runs before the first answer or `warm` asks for it."""

    def submit(self, ask: Ask, sink: Sink) -> Callable[[], None]:
        """Begin an answer; returns what cancels it. Raises `Busy`, `Unsupported`, or that we are closing."""
        self._require_able(ask)
        line = _Line(ask, sink)
        with self._changed:
            self._require_room()
            self._lines.append(line)
            self._threads.submit(self._answer, line)
        return partial(self._cancel, line)

    def require_room(self) -> None:
        with self._changed:
            self._require_room()

    def warm(self, target: Target) -> None:
        """Bring a release there ahead of its first request; raises what went wrong."""
        self._require_exact(target)
        with self.behind.held(target):
            pass

    def counts(self) -> Counts:
        with self._changed:
            active = min(len(self._lines), self._limits.active)
            return Counts(active, len(self._lines) - active)

    @property
    def alive(self) -> bool:
        return not self._closing

    def close(self, grace_s: float) -> None:
        """Refuse new requests, let others finish for up to `grace_s`, fail what is left, drop the server."""
        until_s = time.monotonic() + grace_s
        with self._changed:
            self._closing = True
            while self._lines and (left_s := until_s - time.monotonic()) > 0:
                self._changed.wait(left_s)
            late = [*self._lines]
        for line in late:
            line.closed = True
            self._cancel(line)
        self.behind.close()
        self._threads.shutdown()

    def _require_room(self) -> None:
        if self._closing:
            raise _closing()
        if len(self._lines) >= self._limits.active + self._limits.waiting:
            raise busy(len(self._lines) - self._limits.active, 1)

    def _require_able(self, ask: Ask) -> None:
        for asked, what in (
            (
                ask.grammar is not None,
                "hold answers to a grammar (response_format, required tools)",
            ),
            (ask.score_prompt, "score a prompt"),
            (ask.embed, "embed"),
        ):
            if asked:
                raise self._unable(what)
        self._require_exact(ask.target)

    def _require_exact(self, target: Target) -> None:
        """A release answers with the weights it was judged with, or not at all."""
        if target.int8:
            raise self._unable("answer with weights in int8, as this release was judged")

    def _unable(self, what: str) -> Unsupported:
        return Unsupported(
            f"the backend {self._name} cannot {what}", hint="the backend embedded can: luthier serve"
        )

    def _cancel(self, line: _Line) -> None:
        line.cancelled = True
        if line.cut is not None:
            line.cut()

    # ---- below: a thread of its own for every answer ---------------------------------------------------

    def _answer(self, line: _Line) -> None:
        """One answer from beginning to end. The place is free before its last event is told."""
        last: Event
        try:
            last = _closing_event() if line.cancelled else self._grow(line)
        except LuthierError as error:
            last = Failed(error)
        except Exception as error:
            log.exception("release %s: an answer failed", line.ask.target.release_digest[:12])
            last = Failed(EngineFailed(f"the engine failed ({type(error).__name__})"))
        with self._changed:
            self._lines.remove(line)
            self._changed.notify_all()
        if line.closed:
            last = _closing_event()
        if not line.cancelled or line.closed:
            self._tell(line, last)

    def _grow(self, line: _Line) -> Event:
        if line.ask.sampling.max_new_tokens < 1:
            return End(Reason.LENGTH, "")
        for last_try in (False, True):
            with self.behind.held(line.ask.target) as place:
                body = self.behind.asked(line.ask) | {"model": place.model}
                with place.door.call(place.path, body, line.hold) as reply:
                    if reply.status == 200:
                        return self._read(line, reply)
                    problem = reply.problem()
            if reply.status != 404 or last_try:
                raise _refused(reply.status, problem)
            self.behind.forget()  # it was started anew, without what we had loaded
        raise AssertionError("the second try returns or raises")

    def _read(self, line: _Line, reply: Reply) -> Event:
        text = Unfolding(self._writer(line.ask.target), line.ask.stops)
        for piece in self.behind.told(reply, line.ask):
            for token, logp, top in piece.tokens:
                with self._writing:
                    said = "" if token in line.ask.stop_ids else text.push(token)
                self._tell(line, Said(token, said, logp, top))
                if line.cancelled:
                    raise Unreachable("it was cancelled")
                if text.stopped:
                    return End(Reason.STOP, text.close())
            if piece.ended is not None:
                with self._writing:
                    return End(piece.ended, text.close())
        raise EngineFailed("the engine stopped while answering", hint="ask again")

    def _writer(self, target: Target) -> Any:
        with self._writing:
            if target.base_dir not in self._writers:
                self._writers[target.base_dir] = template.load_tokenizer(target.base_dir)
            return self._writers[target.base_dir]

    def _tell(self, line: _Line, event: Event) -> None:
        if line.cancelled and not line.closed:
            return
        try:
            line.sink(event)
        except Exception:
            log.exception("a listener failed; its request is cancelled")
            line.cancelled = True


def asked(ask: Ask) -> dict[str, Any]:
    """The fields that any such server takes."""
    how = ask.sampling
    body: dict[str, Any] = {
        "prompt": list(ask.prompt_ids),
        "max_tokens": how.max_new_tokens,
        "temperature": how.temperature,
        "top_p": how.top_p,
        "return_token_ids": True,
        "stream": True,
    }
    if how.top_k:
        body["top_k"] = how.top_k
    if how.seed is not None:
        body["seed"] = how.seed
    if how.presence_penalty:
        body["presence_penalty"] = how.presence_penalty
    if how.frequency_penalty:
        body["frequency_penalty"] = how.frequency_penalty
    if how.logit_bias:
        body["logit_bias"] = {str(token): more for token, more in how.logit_bias}
    if how.logprobs is not None:
        body["logprobs"] = how.logprobs
    return body


def told(reply: Reply, logprobs: int | None) -> Iterator[Piece]:
    """The pieces of an answer, as any such server tells them."""
    for choice in _choices(reply):
        reason = choice.get("finish_reason")
        if reason and reason not in REASONS:
            raise EngineFailed(f"the engine ended an answer with {str(reason)[:40]!r}")
        yield Piece(tokens(choice, logprobs), REASONS[reason] if reason else None)


def tokens(choice: Mapping[str, Any], logprobs: int | None) -> Iterator[Token]:
    """What one piece of an answer brings: its tokens, where asked with log-probabilities."""
    ids = choice.get("token_ids") or []
    if not isinstance(ids, list) or not all(type(one) is int for one in ids):
        raise Unreachable("it tells no token ids")
    if logprobs is None:
        yield from ((token, None, ()) for token in ids)
        return
    told = choice.get("logprobs") or {}
    own, tops = told.get("token_logprobs") or [], told.get("top_logprobs") or []
    for n, token in enumerate(ids):
        if n >= len(own) or own[n] is None:
            raise Unreachable("it tells no log-probabilities")
        found = (tops[n] if n < len(tops) else None) or {}
        ranked = sorted(((_token(name), logp) for name, logp in found.items()), key=lambda one: -one[1])
        yield token, float(own[n]), tuple(ranked[:logprobs])


def _token(name: str) -> int:
    if not name.startswith("token_id:") or not name[9:].isdecimal():
        raise Unreachable("it tells tokens by their text, not by their ids")
    return int(name[9:])


def _choices(reply: Reply) -> Iterator[Mapping[str, Any]]:
    """The one choice, piece by piece."""
    for told in reply.events():
        if told.get("error"):
            raise EngineFailed(f"the engine failed: {json.dumps(told['error'])[:300]}")
        yield from told.get("choices") or []


def _refused(status: int, problem: str) -> LuthierError:
    if status in (400, 422):
        return Unsupported(f"the engine refuses this request ({problem})")
    if status in (401, 403):
        return Unreachable(f"the engine does not take our key ({problem})")
    return EngineFailed(f"the engine failed ({problem})")


def _closing() -> ServeError:
    return ServeError("the server is shutting down", hint="ask again when it is back")


def _closing_event() -> Failed:
    return Failed(_closing())
