"""The routes: chat completions, models, health and metrics.

Source: https://platform.openai.com/docs/api-reference. Everything that may block (the database, hashing,
tokenising) runs in threads; the event loop only moves bytes. Every answer of a completion, an error after
the model was found too, says in `x-luthier-release` which release it came from.
It does not know how the server is started, nor who owns the service's life.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, StreamingResponse

from luthier.assemblies import Assemblies
from luthier.errors import LuthierError
from luthier.http import chat, problems
from luthier.http.auth import Guard, caller, fingerprint
from luthier.http.chat import Asked, ChatRequest, Shape, Usage
from luthier.http.exchange import GONE, Exchange
from luthier.http.meter import Meter
from luthier.http.openai import files, fine_tuning, graders, models, parts
from luthier.serving.service import Service
from luthier.serving.worker import End, Heard
from luthier.store import RequestRecord
from luthier.uploads import Uploads

log = logging.getLogger("luthier.http")

SCHEMA = ChatRequest.model_json_schema()
BODY = {"requestBody": {"required": True, "content": {"application/json": {"schema": SCHEMA}}}}


def create_app(service: Service, key: str, uploads: Uploads) -> FastAPI:
    """The ASGI app over a started service; every route but /health asks for `key`."""
    app = FastAPI(
        title="luthier", docs_url=None, redoc_url=None, redirect_slashes=False
    )  # the docs pages would load scripts from afar
    app.add_middleware(Guard, key_sha256=fingerprint(key))
    app.add_exception_handler(LuthierError, _refused)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(RequestValidationError, _misspelt)
    app.add_exception_handler(Exception, _bug)
    meter = Meter(service)

    def note(record: RequestRecord) -> None:
        meter.note(record)
        service.journal.note(record)

    @app.get("/health")
    async def health() -> JSONResponse:
        """Whether answers can be given; asks for no key and says nothing about models."""
        return JSONResponse({"status": service.state}, 200 if service.worker.alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counters and histograms in Prometheus' text format."""
        return Response(meter.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.post("/v1/chat/completions", openapi_extra=BODY, response_class=JSONResponse)
    async def completions(request: Request) -> Response:
        """Go on with a conversation. Differs from OpenAI: greedy (temperature 0) unless a temperature is
        given, and `n` > 1, log-probabilities, penalties, tools and response formats are refused."""
        return await _complete(request, service, note)

    app.include_router(graders.routes(service))
    app.include_router(fine_tuning.routes(service.store, uploads.home, uploads))
    app.include_router(models.routes(service.router))
    app.include_router(files.routes(uploads))
    app.include_router(parts.routes(Assemblies(service.store, uploads)))
    return app


async def _complete(request: Request, service: Service, note: Callable[[RequestRecord], None]) -> Response:
    exchange = Exchange(request, note)
    try:
        asked, first = await _begin(exchange, service)
        shape = Shape(asked.model, exchange.release or "", asked.include_usage)
        if not asked.stream:
            return await _whole(exchange, shape, first)
        return StreamingResponse(
            _stream(exchange, shape, first),
            media_type="text/event-stream",
            headers={**exchange.headers, "cache-control": "no-cache", "x-accel-buffering": "no"},
            background=BackgroundTask(_close, exchange),  # runs even if the stream was never begun
        )
    except LuthierError as error:
        exchange.ended(problems.status(error), error)
        exchange.close()
        return problems.response(error, exchange.headers)
    except Exception as error:
        log.exception("a chat request failed")
        exchange.ended(500, error)
        exchange.close()
        return problems.response(error, exchange.headers)
    except asyncio.CancelledError:  # the server is being stopped
        exchange.close()
        raise


async def _begin(exchange: Exchange, service: Service) -> tuple[Asked, Heard]:
    """Up to the first event of the answer: until here, a refusal can still have its own status."""
    asked = chat.parse(await exchange.body(service.limits.body_bytes))
    exchange.model = asked.model
    tenant = caller(exchange.request).tenant
    target = await run_in_threadpool(service.router.resolve, asked.model, tenant)
    exchange.release = target.release_digest
    ask = await run_in_threadpool(service.prepare, target, asked.messages, asked.options)
    exchange.begin(service, ask)
    return asked, await exchange.next()


async def _whole(exchange: Exchange, shape: Shape, event: Heard) -> Response:
    pieces = [event.text]
    while not isinstance(event, End):
        event = await exchange.next()
        pieces.append(event.text)
    exchange.ended(200)
    exchange.close()
    usage = Usage(exchange.prompt_tokens, exchange.completion_tokens)
    return JSONResponse(shape.whole("".join(pieces), event.reason.value, usage), headers=exchange.headers)


async def _stream(exchange: Exchange, shape: Shape, event: Heard) -> AsyncIterator[bytes]:
    try:
        yield shape.chunk({"role": "assistant", "content": ""})
        while True:
            if event.text:
                yield shape.chunk({"content": event.text})
            if isinstance(event, End):
                break
            event = await exchange.next()
        yield shape.chunk({}, event.reason.value)
        if shape.include_usage:
            yield shape.counts(Usage(exchange.prompt_tokens, exchange.completion_tokens))
        exchange.ended(200)
        yield chat.DONE
    except LuthierError as error:
        exchange.ended(problems.status(error), error)
        if exchange.status != GONE:
            yield chat.event(problems.body(error))
            yield chat.DONE
    finally:
        exchange.close()


async def _close(exchange: Exchange) -> None:
    exchange.close()


async def _refused(request: Request, error: Exception) -> Response:
    return problems.response(error)


async def _no_route(request: Request, error: Exception) -> Response:
    code = error.status_code if isinstance(error, HTTPException) else 404
    what = "this path does not take this method" if code == 405 else f"no such path: {request.url.path[:100]}"
    return problems.refusal(code, what, None)


async def _misspelt(request: Request, error: Exception) -> Response:
    """A path, query or body that a route's own types refuse."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(str(step) for step in first["loc"][1:4])
    what = f"{place}: {first['msg']}" if place else str(first["msg"])
    return problems.response(problems.RequestError(what, param=place.split(".")[0] or None))


async def _bug(request: Request, error: Exception) -> Response:
    return problems.response(error)
