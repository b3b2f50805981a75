"""One request from its arrival to its line in the log.

Events come from the worker's thread into the event loop; a client that goes away is noticed while it
waits, too, and its place in the worker is free before the next token. Each exchange leaves exactly one
record, whatever became of it: counts and times, never text; words go to a transcript, where the operator
asked for one. Status 499 (nginx's) marks a client that left.

A request of hundreds of answers is fed to the engine: no more at once than there are places, and the next
only while half the queue stays free for others. Once something of it was heard it is not refused any more:
an answer that lost its place in the queue is asked for again.
It does not know JSON or shapes.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
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
from luthier.serving.transcript import Page, Transcript
from luthier.serving.worker import Ask, End, Event, Failed, Heard, Said
from luthier.store import RequestRecord

BODY_S = 30.0
ROOM_S = 600.0  # after that a request waits for room no more; OpenAI's clients wait for an answer so long
LOOK_S = 0.05  # between two looks for room
GONE = 499


class ClientGone(ServeError):
    """Nobody is listening any more."""

    http_code = GONE


class TooSlow(RequestError):
    """The body did not arrive in time."""

    http_code = 408


@dataclass(slots=True, eq=False)
class _Line:
    """An answer that was started."""

    ask: Ask
    cancel: Callable[[], None]
    heard: bool = False


class Exchange:
    def __init__(self, request: Request, note: Callable[[RequestRecord, str], None]) -> None:
        self.request = request
        self.who = caller(request)
        self.turn = Turn(self.who.tenant)
        self._note: Callable[[RequestRecord, str], None] | None = note
        self._id = f"req_{uuid.uuid4().hex}"
        self._transcript: Transcript | None = request.app.state.transcript
        self._page = Page(self._id, request.url.path)
        self._events: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()
        self._lines: dict[int, _Line] = {}  # under way
        self._todo: deque[tuple[int, Ask]] = deque()  # still to be started
        self._window = 0  # how many may be under way at once, where the rest is fed
        self._copies = 1
        self._look_s = 0.0
        self._start: Callable[[int, Ask, Turn], Callable[[], None]] | None = None
        self._roomy: Callable[[], bool] = bool  # not before there is something to start
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
        headers = {"x-request-id": self._id}
        if self.release:
            headers["x-luthier-release"] = self.release
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
        if self._transcript is not None:
            self._page.asked = bytes(data)
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
        most = service.limits.active + service.limits.waiting
        if len(asks) * n > most:
            raise RequestError(f"{len(asks) * n} answers at once, and this server takes on {most}")
        service.worker.require_room(self.turn, len(asks) * n)
        self._take(service, asks, n, again)
        turn = replace(self.turn, more=len(asks) * n > 1)  # that there is room for all was just found
        while self._todo:
            self._start_one(turn)
        self.prompt_tokens = sum(len(ask.prompt_ids) for ask in asks)  # of what is refused, none is charged

    def feed(self, service: Service, asks: Sequence[Ask], n: int = 1) -> None:
        """Start as many answers as the server has places, if it has room now; the rest as `next` finds room.
        What fits into the places at once begins together or not at all."""
        self._window = service.limits.active
        if len(asks) * n <= self._window:
            self.begin(service, asks, n)
            return
        self._take(service, asks, n, None)
        self._feed_one()
        self._top_up()

    def _take(self, service: Service, asks: Sequence[Ask], n: int, again: Again | None) -> None:
        route, loop = self.route, asyncio.get_running_loop()
        assert route is not None, "`find` comes first"

        def start(at: int, ask: Ask, turn: Turn) -> Callable[[], None]:
            def hear(event: Event) -> None:
                with suppress(RuntimeError):  # the loop is closed: nobody listens
                    loop.call_soon_threadsafe(self._events.put_nowait, (at, event))

            return service.traffic.start(route, ask, hear, turn, again)

        self._start, self._roomy, self._copies = start, service.worker.roomy, n
        self._todo.extend(enumerate(_again(ask, copy) for ask in asks for copy in range(n)))
        self.open = len(self._todo)
        self._watcher = asyncio.create_task(self._watch())

    def _start_one(self, turn: Turn) -> None:
        assert self._start is not None
        at, ask = self._todo[0]
        self._lines[at] = _Line(ask, self._start(at, ask, turn))
        self._todo.popleft()

    def _feed_one(self) -> None:
        """Start the next and count it; the copies of an ask are read once."""
        at, ask = self._todo[0]
        self._start_one(self.turn)
        if at % self._copies == 0:
            self.prompt_tokens += len(ask.prompt_ids)

    def _top_up(self) -> None:
        """Start what may be started now. Of a request nothing of which is under way, one is tried even while
        many others wait: the desk knows what it is due."""
        while self._todo and len(self._lines) < self._window and time.monotonic() >= self._look_s:
            if self._lines and not self._roomy():
                return
            try:
                self._feed_one()
            except Busy:
                if self._too_old():
                    raise
                self._look_s = time.monotonic() + LOOK_S
                return

    def _too_old(self) -> bool:
        return time.monotonic() - self._began_s > ROOM_S

    async def _event(self) -> tuple[int, Event] | None:
        """The next thing that is heard; what room is found for meanwhile is started."""
        while True:
            self._top_up()
            if not self._todo or len(self._lines) >= self._window:
                return await self._events.get()
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    return await self._events.get()

    async def next(self) -> tuple[int, Heard]:
        """The next event, and of which answer; a failure or a client that left is raised."""
        while True:
            found = await self._event()
            if found is None:
                raise ClientGone("the client left")
            at, event = found
            if not isinstance(event, Failed):
                break
            if not self._put_back(at, event):
                if isinstance(event.error, Busy) and not self._heard:  # its places in the queue were lost
                    self.prompt_tokens = 0
                raise event.error
        self._heard = self._lines[at].heard = True
        if self._transcript is not None:
            self._page.hear(at, event)
        if isinstance(event, Said):
            self.completion_tokens += 1
            if self._first_token_s is None:
                self._first_token_s = time.monotonic() - self._began_s
        if isinstance(event, End):
            self.open -= 1
            del self._lines[at]
        return at, event

    def _put_back(self, at: int, event: Failed) -> bool:
        """Ask again, a moment later, for an answer that lost its place before anything was heard of it."""
        line = self._lines.pop(at)
        if not (self._window and self._heard and isinstance(event.error, Busy)):
            return False
        if line.heard or self._too_old():
            return False
        self._todo.appendleft((at, line.ask))
        if at % self._copies == 0:
            self.prompt_tokens -= len(line.ask.prompt_ids)
        self._look_s = time.monotonic() + LOOK_S
        return True

    def _cancel_all(self) -> None:
        self._todo.clear()
        for line in self._lines.values():
            line.cancel()

    def ended(self, status: int, error: Exception | None = None) -> None:
        self.status, self.error = status, type(error).__name__ if error else None

    def close(self) -> None:
        """Free the place and leave the record; a second call does nothing."""
        note, self._note = self._note, None
        if note is None:
            return
        if self._watcher is not None:
            self._watcher.cancel()
        self._cancel_all()
        self._start = None
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
        if self._transcript is not None:
            self._transcript.keep(self._page, record)

    async def _watch(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass
        self._cancel_all()
        self._events.put_nowait(None)


def _again(ask: Ask, copy: int) -> Ask:
    if copy == 0 or ask.sampling.seed is None:
        return ask
    return replace(ask, sampling=replace(ask.sampling, seed=ask.sampling.seed + copy))


def _too_large(limit_bytes: int) -> TooLarge:
    return TooLarge(f"the body is larger than {limit_bytes} bytes", code="body_too_large")
