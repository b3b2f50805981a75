"""Fine-tuning jobs over HTTP, in the shapes of OpenAI's API; and what it lacks: quotes and a live stream.

Source: https://platform.openai.com/docs/api-reference/fine-tuning and the official client's resources. A job
of another tenant and one that never was are the same 404. `events?stream=true` sends every event from the
first on as server-sent events, and `data: [DONE]` once the job has ended; `after` or `Last-Event-ID` begins
later. Of streams, and of quotes that are being made, a tenant may have a quarter of those there may be; a
stream ends when the key that opened it does.
It does not know queues' tables or workers.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool
from starlette.background import BackgroundTask
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response, StreamingResponse

from luthier import keys
from luthier.home import Home
from luthier.http import problems
from luthier.http.auth import caller, deed
from luthier.http.places import Places
from luthier.http.problems import RequestError, TooLarge
from luthier.jobs import ask, quote
from luthier.jobs.asked import Create, parse
from luthier.jobs.queue import Queue
from luthier.jobs.records import ENDED, Job, Told
from luthier.store import Store
from luthier.uploads import Uploads

BODY_BYTES = 1024 * 1024
BODY_S = 30.0
BEAT_S = 0.5
QUIET_BEATS = 30  # without an event, a comment shows that the stream lives
FOLLOWERS = 64  # live streams; each asks the database twice a second
QUOTES = 4  # that may wait at a time
SHARE = 4  # of both, one tenant has one part in so many
After = Annotated[str | None, Query(max_length=128, description="the last id of the page before")]
Limit = Annotated[int, Query(ge=1, le=100)]
JOBS = "/v1/fine_tuning/jobs"
JOB = JOBS + "/{fine_tuning_job_id}"


@dataclass(frozen=True)
class Following:
    """A live stream: whose key opened it, what it follows, and what gives its place back."""

    store: Store
    queue: Queue
    job: Job
    key_id: str
    free: Callable[[], None]


def inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """A JSON schema without references, as an OpenAPI operation can hold it."""
    known = schema.pop("$defs", {})

    def whole(value: Any) -> Any:
        if isinstance(value, list):
            return [whole(item) for item in value]
        if not isinstance(value, dict):
            return value
        if "$ref" in value:
            return whole(known[value["$ref"].rsplit("/", 1)[-1]])
        return {key: whole(item) for key, item in value.items()}

    return dict(whole(schema))


BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": inlined(Create.model_json_schema())}},
    }
}


def routes(store: Store, home: Home, uploads: Uploads) -> APIRouter:
    """The routes over one home's jobs."""
    router = APIRouter()
    queue = Queue(store)
    quotes = Places(QUOTES, QUOTES // SHARE, "other quotes are being made; try again soon")

    @router.post(JOBS, openapi_extra=BODY)
    async def create(request: Request) -> dict[str, Any]:
        """Ask for a job. Its files are read next, then it waits for a worker."""
        asked = await run_in_threadpool(parse, await _body(request))
        made = await run_in_threadpool(ask.create, asked, caller(request).tenant, store, uploads)
        return ask.job_object(made)

    @router.post("/v1/fine_tuning/quotes", openapi_extra=BODY)
    async def quoted(request: Request) -> dict[str, Any]:
        """What that job would take: tokens, minutes, memory, and money where a price is set."""
        body, tenant = await _body(request), caller(request).tenant
        async with quotes.one(tenant):
            return await run_in_threadpool(quote.elsewhere, body, tenant, home)

    @router.get(JOBS)
    def listed(request: Request, after: After = None, limit: Limit = 20) -> dict[str, Any]:
        """The caller's jobs, newest first; `metadata[key]=value` keeps those that have it."""
        wanted = metadata_filter(request)
        found, more = queue.page(caller(request).tenant, after, limit, wanted)
        return ask.page([ask.job_object(job) for job in found], more)

    @router.get(JOB)
    def retrieve(request: Request, fine_tuning_job_id: str) -> dict[str, Any]:
        """One of the caller's jobs."""
        return ask.job_object(queue.get(caller(request).tenant, fine_tuning_job_id))

    _moves(router, queue)
    _told(router, store, queue)
    _permissions(router)
    return router


def _moves(router: APIRouter, queue: Queue) -> None:
    """What its owner may do with a job."""

    @router.post(JOB + "/cancel")
    def cancel(request: Request, fine_tuning_job_id: str) -> dict[str, Any]:
        """Stop a job for good."""
        return ask.job_object(queue.cancel(caller(request).tenant, fine_tuning_job_id, deed(request)))

    @router.post(JOB + "/pause")
    def pause(request: Request, fine_tuning_job_id: str) -> dict[str, Any]:
        """Save what is trained and stop, until the job is resumed."""
        return ask.job_object(queue.pause(caller(request).tenant, fine_tuning_job_id, deed(request)))

    @router.post(JOB + "/resume")
    def resume(request: Request, fine_tuning_job_id: str) -> dict[str, Any]:
        """Go on with a paused job from what was saved."""
        return ask.job_object(queue.resume(caller(request).tenant, fine_tuning_job_id, deed(request)))


def _told(router: APIRouter, store: Store, queue: Queue) -> None:
    """What happened to a job, and what it left on the way."""
    full = "too many follow jobs at once; read pages of events instead"
    followers = Places(FOLLOWERS, FOLLOWERS // SHARE, full)

    @router.get(JOB + "/events")
    async def events(
        request: Request,
        fine_tuning_job_id: str,
        after: After = None,
        limit: Limit = 20,
        stream: bool = False,
    ) -> Response:
        """What happened, newest first; or with `stream` from the first event on, as it happens."""
        who = caller(request)
        job = await run_in_threadpool(queue.get, who.tenant, fine_tuning_job_id)
        if stream:
            after = after or request.headers.get("last-event-id")
            await run_in_threadpool(_page, queue, job.id, after)  # an unknown `after` is refused before it
            following = Following(store, queue, job, who.key_id, followers.take(who.tenant))
            return StreamingResponse(
                _live(following, after),
                media_type="text/event-stream",
                headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
                background=BackgroundTask(_left, following),  # runs even if the stream was never begun
            )
        found, more = await run_in_threadpool(_newest, queue, job.id, after, limit)
        return JSONResponse(ask.page([ask.event_object(one) for one in found], more))

    @router.get(JOB + "/checkpoints")
    def checkpoints(
        request: Request, fine_tuning_job_id: str, after: After = None, limit: Limit = 10
    ) -> dict[str, Any]:
        """Models of the job's last epochs, newest first; each can be asked by its name."""
        job = queue.get(caller(request).tenant, fine_tuning_job_id)
        found, more = queue.checkpoints(job.id, after, limit)
        return ask.page([ask.checkpoint_object(one) for one in found], more)


def _permissions(router: APIRouter) -> None:
    """What OpenAI offers for sharing checkpoints between projects: refused by its name."""
    place = "/v1/fine_tuning/checkpoints/{fine_tuned_model_checkpoint}/permissions"

    def refuse() -> None:
        raise RequestError(
            "checkpoint permissions are not supported: a model is its owner's alone",
            code="unsupported_operation",
        )

    @router.post(place)
    def permit(fine_tuned_model_checkpoint: str) -> None:
        """Not supported."""
        refuse()

    @router.get(place)
    def permitted(fine_tuned_model_checkpoint: str) -> None:
        """Not supported."""
        refuse()

    @router.delete(place + "/{permission_id}")
    def forbid(fine_tuned_model_checkpoint: str, permission_id: str) -> None:
        """Not supported."""
        refuse()


def metadata_filter(request: Request) -> Mapping[str, str] | None:
    """`metadata[key]=value` pairs of the query; `metadata=null` selects jobs without any."""
    found: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name == "metadata":
            if value != "null" or found:
                raise RequestError("write `metadata[key]=value`, or `metadata=null` alone", param="metadata")
            return {}
        if name.startswith("metadata[") and name.endswith("]"):
            found[name[len("metadata[") : -1]] = value
    return found or None


async def _body(request: Request) -> bytes:
    """The request's body; too large is refused without reading on."""
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for chunk in request.stream():
                data += chunk
                if len(data) > BODY_BYTES:
                    raise TooLarge(f"the body is larger than {BODY_BYTES} bytes")
    except (TimeoutError, ClientDisconnect):
        raise RequestError("the body did not arrive") from None
    return bytes(data)


async def _live(following: Following, after: str | None) -> AsyncIterator[bytes]:
    try:
        async for piece in _events(following, after):
            yield piece
    finally:
        following.free()


async def _left(following: Following) -> None:
    following.free()


async def _events(following: Following, after: str | None) -> AsyncIterator[bytes]:
    quiet = 0
    while True:
        key, now, found, more = await run_in_threadpool(_look, following, after)
        if key != "active":
            said = problems.shape(f"this API key is {key}", "invalid_request_error", None, "invalid_api_key")
            yield f"event: error\ndata: {json.dumps(said)}\n\n".encode()
            return
        for one in found:
            after, text = one.id, json.dumps(ask.event_object(one), separators=(",", ":"))
            yield f"id: {one.id}\ndata: {text}\n\n".encode()
        if now.status in ENDED and not more:
            yield b"data: [DONE]\n\n"
            return
        quiet = 0 if found else quiet + 1
        if quiet and quiet % QUIET_BEATS == 0:
            yield b": still at it\n\n"
        if not more:
            await asyncio.sleep(BEAT_S)


def _look(following: Following, after: str | None) -> tuple[str, Job, list[Told], bool]:
    """How its key stands, and the job before its events: what ends it is among them."""
    key, now = keys.standing(following.store, following.key_id), following.queue.get(None, following.job.id)
    return (key, now, *_page(following.queue, now.id, after))


def _page(queue: Queue, job_id: str, after: str | None) -> tuple[list[Told], bool]:
    return queue.events(job_id, after, 100, newest=False)


def _newest(queue: Queue, job_id: str, after: str | None, limit: int) -> tuple[list[Told], bool]:
    return queue.events(job_id, after, limit, newest=True)
