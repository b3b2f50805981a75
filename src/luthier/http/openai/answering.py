"""One request with one or more answers: begun, told whole or in a stream, ended in good order.

Source: https://html.spec.whatwg.org/multipage/server-sent-events.html for the stream. Until the first event
of an answer is there, a refusal still has its own status; after it, a failure is an error event.
What the answers look like is told by a `Telling`; this module does not know chat, completions or JSON fields.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from fastapi import Request, Response
from fastapi.concurrency import run_in_threadpool
from starlette.background import BackgroundTask
from starlette.responses import StreamingResponse

from luthier.errors import LuthierError
from luthier.http import problems
from luthier.http.exchange import GONE, Exchange
from luthier.http.problems import RequestError
from luthier.serving.worker import Ask, Heard
from luthier.store import RequestRecord

log = logging.getLogger("luthier.http")
Note = Callable[[RequestRecord, str], None]  # and whose request it was
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int

    def as_dict(self) -> dict[str, int]:
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }


class Telling(Protocol):
    """What becomes of the events: chunks as they come, or one body at the end."""

    stream: bool
    include_usage: bool

    def opening(self) -> list[dict[str, Any]]: ...
    def heard(self, n: int, event: Heard) -> list[dict[str, Any]]: ...
    def counts(self, usage: Usage) -> dict[str, Any]: ...
    def whole(self, usage: Usage) -> dict[str, Any]: ...


async def respond(request: Request, note: Note, begin: Callable[[Exchange], Awaitable[Telling]]) -> Response:
    """Run one request from its body to its line in the log."""
    exchange = Exchange(request, note)
    try:
        telling = await begin(exchange)
        first = await exchange.next()
        if not telling.stream:
            return await _whole(exchange, telling, first)
        return StreamingResponse(
            _stream(exchange, telling, first),
            media_type="text/event-stream",
            headers={**exchange.headers, "cache-control": "no-cache", "x-accel-buffering": "no"},
            background=BackgroundTask(_close, exchange),  # runs even if the stream was never begun
        )
    except LuthierError as error:
        exchange.ended(problems.status(error), error)
        exchange.close()
        return problems.response(error, exchange.headers)
    except Exception as error:
        log.exception("a request failed")
        exchange.ended(500, error)
        exchange.close()
        return problems.response(error, exchange.headers)
    except asyncio.CancelledError:  # the server is being stopped
        exchange.close()
        raise


async def _whole(exchange: Exchange, telling: Telling, first: tuple[int, Heard]) -> Response:
    telling.heard(*first)
    while exchange.open:
        telling.heard(*await exchange.next())
    exchange.ended(200)
    exchange.close()
    content = await run_in_threadpool(lambda: written(telling.whole(_usage(exchange))))
    return Response(content, headers=exchange.headers, media_type="application/json")


async def _stream(exchange: Exchange, telling: Telling, first: tuple[int, Heard]) -> AsyncIterator[bytes]:
    try:
        for chunk in telling.opening():
            yield event(chunk)
        for chunk in telling.heard(*first):
            yield event(chunk)
        while exchange.open:
            for chunk in telling.heard(*await exchange.next()):
                yield event(chunk)
        if telling.include_usage:
            yield event(telling.counts(_usage(exchange)))
        exchange.ended(200)
        yield DONE
    except LuthierError as error:
        exchange.ended(problems.status(error), error)
        if exchange.status != GONE:
            yield event(problems.body(error))
            yield DONE
    finally:
        exchange.close()


def event(body: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8") + b"\n\n"


def written(body: dict[str, Any]) -> bytes:
    """As JSON, the members of its lists one by one: while one is written nothing else of the process runs,
    and two thousand vectors would hold up everybody's tokens."""
    members = (
        f"{_json(key)}:[{','.join(map(_json, value))}]"
        if isinstance(value, list)
        else f"{_json(key)}:{_json(value)}"
        for key, value in body.items()
    )
    return f"{{{','.join(members)}}}".encode()


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def within(most: int, asks: Iterable[Ask], param: str, n: int = 1) -> list[Ask]:
    """All of them, unless what they read, and may write `n` times, is more tokens than one request may be."""
    found, tokens = [], 0
    for ask in asks:
        found.append(ask)
        tokens += len(ask.prompt_ids) + n * ask.sampling.max_new_tokens
        if tokens > most:
            raise RequestError(f"more than {most} tokens in one request", param=param)
    return found


def _usage(exchange: Exchange) -> Usage:
    return Usage(exchange.prompt_tokens, exchange.completion_tokens)


async def _close(exchange: Exchange) -> None:
    exchange.close()
