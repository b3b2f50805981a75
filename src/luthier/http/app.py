"""The app: every route under one guard, health and metrics.

Source: https://platform.openai.com/docs/api-reference. Everything that may block (the database, hashing,
tokenising) runs in threads; the event loop only moves bytes. Every answer of a completion, an error after
the model was found too, says in `x-luthier-release` which release it came from. A full server turns requests
away at the guard; of those that were let in and then found no room, a few a minute are logged.
It does not know how the server is started, nor who owns the service's life.
"""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse

from luthier.assemblies import Assemblies
from luthier.errors import LuthierError
from luthier.http import openapi, problems
from luthier.http.auth import REFUSALS, Guard
from luthier.http.meter import Meter
from luthier.http.openai import chat, completions, embeddings, files, fine_tuning, graders, models, parts
from luthier.http.sparing import Sparing
from luthier.keys import Caller
from luthier.metrics import Ask
from luthier.serving.desk import Turn
from luthier.serving.service import Service
from luthier.serving.transcript import Transcript
from luthier.store import RequestRecord
from luthier.uploads import Uploads


def create_app(
    service: Service,
    key: str,
    uploads: Uploads,
    judges: Mapping[str, Ask] | None = None,
    transcript: Transcript | None = None,
) -> FastAPI:
    """The ASGI app over a started service; every route but /health asks for a key, and `key` opens all.
    `judges`: graders may ask these, by name, of other servers. `transcript`: where prompts and answers go."""
    app = FastAPI(
        title="luthier", docs_url=None, redoc_url=None, redirect_slashes=False
    )  # the docs pages would load scripts from afar
    meter, logged = Meter(service, transcript), Sparing(REFUSALS)
    app.state.transcript = transcript

    def full(who: Caller) -> LuthierError | None:
        """Why no answer can be begun for this caller now: nothing but a counter remembers that it asked."""
        try:
            service.worker.require_room(Turn(who.tenant))
        except LuthierError as error:
            meter.turned_away(who.tenant, error)
            return error
        return None

    app.add_middleware(Guard, store=service.store, served=key, full=full)
    app.add_exception_handler(LuthierError, _refused)
    app.add_exception_handler(HTTPException, _no_route)
    app.add_exception_handler(RequestValidationError, _misspelt)
    app.add_exception_handler(Exception, _bug)

    def note(record: RequestRecord, tenant: str) -> None:
        meter.note(record, tenant)
        if record.status != 429 or record.prompt_tokens or logged():  # what was spent is always told
            service.journal.note(record)

    @app.get("/health")
    async def health() -> JSONResponse:
        """Whether answers can be given, and whether prompts are logged; asks for no key and says nothing
        about models."""
        said = {"status": service.state}
        if transcript is not None:
            said["prompt_log"] = "failing" if transcript.failing else "on"
        return JSONResponse(said, 200 if service.worker.alive else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Counters and histograms in Prometheus' text format."""
        return Response(meter.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    app.include_router(chat.routes(service, note))
    app.include_router(completions.routes(service, note))
    app.include_router(embeddings.routes(service, note))
    app.include_router(graders.routes(service, judges or {}, note))
    app.include_router(fine_tuning.routes(service.store, uploads.home, uploads))
    app.include_router(models.routes(service.router))
    app.include_router(files.routes(uploads))
    app.include_router(parts.routes(Assemblies(service.store, uploads)))
    app.openapi = openapi.describe(app)  # type: ignore[method-assign]
    return app


async def _refused(request: Request, error: Exception) -> Response:
    return problems.response(error)


async def _no_route(request: Request, error: Exception) -> Response:
    code = error.status_code if isinstance(error, HTTPException) else 404
    if code == 400:  # what the framework says of a body that it could not read
        return problems.refusal(400, "the body is not JSON that can be read; is it nested too deep?", None)
    if code == 413 and isinstance(error, HTTPException):
        return problems.response(problems.TooLarge(error.detail, code="body_too_large"))
    what = "this path does not take this method" if code == 405 else problems.no_path(request.url.path)
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
