"""One request from its arrival to its line in the log.

Events come from the worker's thread into the event loop; a client that goes away is noticed while it
waits, too, and its place in the worker is free before the next token. Each exchange leaves exactly one
record, whatever became of it: counts and times, never text. Status 499 (nginx's) marks a client that left.
It does not know JSON or shapes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime

from fastapi.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request

from luthier import keys
from luthier.errors import ServeError
from luthier.http.auth import caller
from luthier.http.problems import RequestError, TooLarge
from luthier.serving.desk import Turn
from luthier.serving.limits import Busy
from luthier.serving.router import Target
from luthier.serving.service import Service
from luthier.serving.traffic import Again, Route
from luthier.serving.worker import Ask, End, Event, Failed, Heard, Said
from luthier.store import RequestRecord

BODY_S = 30.0
GONE = 499


class ClientGone(ServeError):
    """Nobody is listening any more."""

    http_code = GONE


class TooSlow(RequestError):
    """The body did not arrive in time."""

    http_code = 408


class Exchange:
    def __init__(self, request: Request, note: Callable[[RequestRecord, str], None]) -> None:
        self.request = request
        self.who = caller(request)
        self.turn = Turn(self.who.tenant)
        self._note: Callable[[RequestRecord, str], None] | None = note
        self._events: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()
        self._cancels: list[Callable[[], None]] = []
        self.open = 0  # answers that have not ended
        self._heard = False
        self._watcher: asyncio.Task[None] | None = None
        self._at = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._began_s = time.monotonic()
        self._first_token_s: float | None = None
        self.model = ""
        self.release: str | None = None
        self.route: Route | None = None
        self.prompt_tokens = self.completion_tokens = 0
        self.status = GONE  # until it ends some other way
        self.error: str | None = "ClientGone"

    @property
    def headers(self) -> dict[str, str]:
        headers = {"x-luthier-release": self.release} if self.release else {}
        if self.route is not None and self.route.known is not None:
            headers["x-luthier-cache"] = "hit" if self.route.known else "miss"
        return headers

    async def body(self, limit_bytes: int) -> bytes:
        """The request's body; too large or too slow is refused without reading on."""
        declared = self.request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > limit_bytes:
            raise _too_large(limit_bytes)
        data = bytearray()
        try:
            async with asyncio.timeout(BODY_S):
                async for chunk in self.request.stream():
                    data += chunk
                    if len(data) > limit_bytes:
                        raise _too_large(limit_bytes)
        except TimeoutError:
            raise TooSlow(f"the body did not arrive within {BODY_S:g} s") from None
        except ClientDisconnect:
            raise ClientGone("the client left before its request was read") from None
        return bytes(data)

    async def find(self, service: Service, model: str, user: str | None) -> Target:
        """The release that answers, for a caller who may see it."""
        service.worker.require_room(self.turn)  # before any thread: a refusal must not queue
        who = self.who

        def route() -> Route:
            target = service.router.resolve(model, who.tenant)
            return service.traffic.route(model, target, f"{who.key_id}/{user or ''}")

        self.model = model
        self.route = await run_in_threadpool(route)
        self.release = self.route.target.release_digest
        return self.route.target

    def begin(self, service: Service, asks: Sequence[Ask], n: int = 1, again: Again | None = None) -> None:
        """Start the answers, all or none: `n` to each ask, the sampled ones with seeds that follow on.
        `again` makes the same request of another release, for a shadow."""
        assert self.route is not None, "`find` comes first"
        loop = asyncio.get_running_loop()
        most = service.limits.active + service.limits.waiting
        if len(asks) * n > most:
            raise RequestError(f"{len(asks) * n} answers at once, and this server takes on {most}")
        service.worker.require_room(self.turn, len(asks) * n)

        def sink(at: int) -> Callable[[Event], None]:
            def hear(event: Event) -> None:
                with suppress(RuntimeError):  # the loop is closed: nobody listens
                    loop.call_soon_threadsafe(self._events.put_nowait, (at, event))

            return hear

        self._watcher = asyncio.create_task(self._watch())
        turn = replace(self.turn, more=len(asks) * n > 1)  # that there is room for all was just found
        for ask in (_again(ask, copy) for ask in asks for copy in range(n)):
            self._cancels.append(service.traffic.start(self.route, ask, sink(self.open), turn, again))
            self.open += 1
        self.prompt_tokens = sum(len(ask.prompt_ids) for ask in asks)  # of what is refused, none is charged

    async def next(self) -> tuple[int, Heard]:
        """The next event, and of which answer; a failure or a client that left is raised."""
        found = await self._events.get()
        if found is None:
            raise ClientGone("the client left")
        at, event = found
        if isinstance(event, Failed):
            if isinstance(event.error, Busy) and not self._heard:  # its places in the queue were lost
                self.prompt_tokens = 0
            raise event.error
        self._heard = True
        if isinstance(event, Said):
            self.completion_tokens += 1
            if self._first_token_s is None:
                self._first_token_s = time.monotonic() - self._began_s
        if isinstance(event, End):
            self.open -= 1
        return at, event

    def ended(self, status: int, error: Exception | None = None) -> None:
        self.status, self.error = status, type(error).__name__ if error else None

    def close(self) -> None:
        """Free the place and leave the record; a second call does nothing."""
        note, self._note = self._note, None
        if note is None:
            return
        if self._watcher is not None:
            self._watcher.cancel()
        for cancel in self._cancels:
            cancel()
        record = RequestRecord(
            at=self._at,
            release=self.release,
            model=keys.hidden(self.model),
            status=self.status,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            first_token_s=self._first_token_s,
            total_s=time.monotonic() - self._began_s,
            error=self.error,
            key_id=self.who.key_id,
            tenant=self.who.tenant,
        )
        if self.route is not None:
            self.route.ended(record)
        note(record, caller(self.request).tenant)

    async def _watch(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass
        for cancel in self._cancels:
            cancel()
        self._events.put_nowait(None)


def _again(ask: Ask, copy: int) -> Ask:
    if copy == 0 or ask.sampling.seed is None:
        return ask
    return replace(ask, sampling=replace(ask.sampling, seed=ask.sampling.seed + copy))


def _too_large(limit_bytes: int) -> TooLarge:
    return TooLarge(f"the body is larger than {limit_bytes} bytes", code="body_too_large")
