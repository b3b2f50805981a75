"""Who may do what: every request is asked for a key, and every route for a line in the table below.

RFC 6750 (`Authorization: Bearer …`). The gate stands before the router and matches the path itself, so a
route that somebody adds is closed until the table opens it: what the table does not name is answered 404 or
405 and never reaches a handler. A key is looked up for each request, so a revoked or expired one opens
nothing from the next request on. What changes something is noted in the audit log once it is done (what moves
a job, by the very commit: `deed`), by the route and what its path names, never with a body or a key; so are
refusals, a bounded number a minute of each caller (`http.refusals`), and the number of those that were not.
Where several lines match a path and method, all of them must allow it.

A server that is full says so here, before a body is read, a budget touched or a thread waited for. Whose
request it is may then be known from a lookup of up to `LATELY_S` ago; that memory refuses, it never admits.

It does not know which file or job belongs to whom: handlers ask `caller(request).tenant`.
"""

from __future__ import annotations

import asyncio
import hmac
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from luthier import audit, keys
from luthier.chain import Deed
from luthier.errors import LuthierError
from luthier.http import problems, quota
from luthier.http.refusals import Refusals
from luthier.keys import Caller, Key
from luthier.keys import Scope as May
from luthier.store import Store

CALLER, ROUTE = "luthier.caller", "luthier.route"
SMALL = {"POST /v1/uploads", "POST /v1/uploads/{upload}/complete"}  # whose bodies the framework reads whole
SMALL_BYTES = 1024 * 1024
REFUSALS = 30  # refusals that are noted in a minute, of all callers together; the rest are not
LATELY_S, LATELY = 1.0, 1024  # how long and of how many keys it is remembered whose they are
DRAIN_BYTES = 64 * 1024  # of a refused request's body; a longer one ends the connection instead


@dataclass(frozen=True, slots=True)
class Need:
    """Any one of these scopes opens a route; `admin` opens all. `operator`: the server's own admin alone."""

    any_of: frozenset[May]
    operator: bool = False

    def allows(self, who: Caller) -> bool:
        return who.operator if self.operator else who.may(self.any_of)


def _any(*scopes: May) -> Need:
    return Need(frozenset(scopes))


OPEN = None
OPERATOR = Need(frozenset(), operator=True)
INFER, TRAIN = _any(May.INFER), _any(May.TRAIN)
SEE = _any(May.READ, May.TRAIN)  # one's own files, jobs and their results
ANY = _any(May.READ, May.TRAIN, May.INFER)
JOB = "/v1/fine_tuning/jobs/{job}"
PERMISSIONS = "/v1/fine_tuning/checkpoints/{model:path}/permissions"
ROUTES: dict[str, Need | None] = {
    "GET /health": OPEN,
    "GET /metrics": OPERATOR,
    "GET /openapi.json": ANY,
    "GET /v1/models": ANY,
    "GET /v1/models/{model:path}": ANY,
    "DELETE /v1/models/{model:path}": TRAIN,
    "POST /v1/chat/completions": INFER,
    "POST /v1/completions": INFER,
    "POST /v1/embeddings": INFER,
    "POST /v1/files": TRAIN,
    "GET /v1/files": SEE,
    "GET /v1/files/{file}": SEE,
    "GET /v1/files/{file}/content": SEE,
    "DELETE /v1/files/{file}": TRAIN,
    "POST /v1/uploads": TRAIN,
    "POST /v1/uploads/{upload}/parts": TRAIN,
    "POST /v1/uploads/{upload}/complete": TRAIN,
    "POST /v1/uploads/{upload}/cancel": TRAIN,
    "POST /v1/fine_tuning/jobs": TRAIN,
    "GET /v1/fine_tuning/jobs": SEE,
    "POST /v1/fine_tuning/quotes": TRAIN,
    f"GET {JOB}": SEE,
    f"GET {JOB}/events": SEE,
    f"GET {JOB}/checkpoints": SEE,
    f"POST {JOB}/cancel": TRAIN,
    f"POST {JOB}/pause": TRAIN,
    f"POST {JOB}/resume": TRAIN,
    f"GET {PERMISSIONS}": TRAIN,
    f"POST {PERMISSIONS}": TRAIN,
    f"DELETE {PERMISSIONS}/{{permission}}": TRAIN,
    "POST /v1/fine_tuning/alpha/graders/run": INFER,  # a grader may ask a model
    "POST /v1/fine_tuning/alpha/graders/validate": TRAIN,
}
ANSWERS = {
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "POST /v1/embeddings",
}  # the request log has them
DEEDS = {f"POST {JOB}/{verb}" for verb in ("cancel", "pause", "resume")}  # whose handlers write their `deed`
SPENDS = ANSWERS | {"POST /v1/fine_tuning/alpha/graders/run"}  # tokens


def caller(request: Request) -> Caller:
    """Who sent this request; every handler of a closed route may ask."""
    who = request.scope[CALLER]
    assert isinstance(who, Caller)
    return who


def deed(request: Request) -> Deed:
    """What the audit log says of this request, for the transaction that carries it out."""
    who = caller(request)
    return Deed(request.scope[ROUTE], keys.hidden(request.scope["path"])[:200], who.key_id, who.tenant)


@dataclass(frozen=True, slots=True)
class _Line:
    route: str
    method: str
    path: re.Pattern[str]
    need: Need | None


def _lines(routes: Mapping[str, Need | None]) -> tuple[_Line, ...]:
    return tuple(
        _Line(route, route.split()[0], compile_path(route.split()[1])[0], need)
        for route, need in routes.items()
    )


Full = Callable[[Caller], LuthierError | None]


class Guard:
    """ASGI middleware. `served` is the one key that is not in the store: the one `serve` was given.
    `full` says why no answer can be begun for a caller now, and None where one can."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        store: Store,
        served: str,
        full: Full,
        routes: Mapping[str, Need | None] = ROUTES,
    ) -> None:
        self._app = app
        self._store = store
        self._served = Caller(keys.SERVED, keys.LOCAL, frozenset({May.ADMIN}))
        self._served_sha256 = keys.fingerprint(served.encode("utf-8", "surrogateescape"))
        self._full = full
        self._quota = quota.Quota(store)
        self._lines = _lines(routes)
        self._refusals = Refusals()
        self._telling: asyncio.Task[None] | None = None
        self._lately: OrderedDict[str, tuple[float, Caller]] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # there are no websockets here
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        at_path = [line for line in self._lines if line.path.fullmatch(scope["path"])]
        lines = [line for line in at_path if line.method == method]
        needs = [line.need for line in lines if line.need is not None]
        if lines and not needs:
            await self._app(scope, receive, send)
            return
        sha256 = _shown(scope)
        answers = bool(lines) and lines[0].route in ANSWERS
        known = self._remembered(sha256) if answers else None
        if known is not None and (error := self._full(known)) is not None:
            await _turned_away(scope, error)(scope, receive, send)
            return
        found = await self._who(sha256)
        if isinstance(found, str):
            await self._note_refusal(scope, found)
            await _unknown(found)(scope, receive, send)
            return
        who, key = found
        if not lines:
            await _nowhere(scope, known=bool(at_path))(scope, receive, send)
        elif (missing := next((need for need in needs if not need.allows(who)), None)) is not None:
            await self._note_refusal(scope, "missing scope", who)
            await _forbidden(missing)(scope, receive, send)
        else:
            scope[CALLER], scope[ROUTE] = who, lines[0].route
            if answers and known is None and (error := self._newly_full(sha256, who)) is not None:
                await _turned_away(scope, error)(scope, receive, send)
                return
            await self._let_in(scope, receive, send, (lines[0], who, key))

    async def _let_in(
        self, scope: Scope, receive: Receive, send: Send, what: tuple[_Line, Caller, Key | None]
    ) -> None:
        """Within its budget; and into the audit log if it changed something."""
        line, who, key = what
        async with self._quota.held(key, spends=line.route in SPENDS) as left:
            if left.retry_after_s:
                await quota.refusal(left)(scope, receive, send)
            else:
                await self._served_to(scope, receive, send, (line, who, quota.told(left)))

    async def _served_to(
        self, scope: Scope, receive: Receive, send: Send, what: tuple[_Line, Caller, quota.Headers]
    ) -> None:
        line, who, extra = what
        status = 500
        if line.route in SMALL:
            receive = _bounded(receive)

        async def heard(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *extra]}
            await send(message)

        try:
            await self._app(scope, receive, heard)
        finally:
            if line.method != "GET" and line.route not in ANSWERS | DEEDS and status < 400:
                await run_in_threadpool(self._note, line, scope["path"], who)

    async def _who(self, sha256: str | None) -> tuple[Caller, Key | None] | str:
        """The caller and its key, or why there is none."""
        if sha256 is None:
            return "incorrect or missing API key"
        if hmac.compare_digest(sha256, self._served_sha256):
            return self._served, None
        key = await run_in_threadpool(keys.known, self._store, sha256)
        if key is None:
            return "incorrect or missing API key"
        return (key.caller, key) if key.state == "active" else f"this API key is {key.state}"

    def _remembered(self, sha256: str | None) -> Caller | None:
        """Whose key this was a moment ago; enough to refuse by, not to let in."""
        if sha256 is None or hmac.compare_digest(sha256, self._served_sha256):
            return None if sha256 is None else self._served
        until_s, who = self._lately.get(sha256, (0.0, None))
        return who if time.monotonic() < until_s else None

    def _newly_full(self, sha256: str | None, who: Caller) -> LuthierError | None:
        """The same of a caller that had to be looked up, and is remembered from now on."""
        if sha256 is not None:
            self._lately[sha256] = (time.monotonic() + LATELY_S, who)
            self._lately.move_to_end(sha256)
            while len(self._lately) > LATELY:
                self._lately.popitem(last=False)
        return self._full(who)

    def _note(self, line: _Line, path: str, who: Caller) -> None:
        told = keys.hidden(path, self._served_sha256)[:200]
        audit.note(self._store, line.route, told, actor=who.key_id, tenant=who.tenant)

    async def _note_refusal(self, scope: Scope, why: str, who: Caller | None = None) -> None:
        """Into the audit log, or into the count of those that are not."""
        client = str((scope.get("client") or ("?",))[0])
        if not self._refusals.may_write(who.key_id if who else client, a_key=who is not None):
            if self._telling is None or self._telling.done():
                self._telling = asyncio.create_task(self._tell_later(self._refusals.left_s()))
            return
        facts = {"why": why, "method": scope["method"], "client": client}
        told = keys.hidden(scope["path"], self._served_sha256)[:200]

        def write() -> None:
            actor, tenant = (who.key_id, who.tenant) if who else ("unknown", "")
            audit.note(self._store, "refused", told, actor=actor, tenant=tenant, facts=facts)

        await run_in_threadpool(write)

    async def _tell_later(self, wait_s: float) -> None:
        """What was not written, once the minute is over or the server ends."""
        try:
            await asyncio.sleep(wait_s)
        except asyncio.CancelledError:
            self._tell_silence()
            raise
        await run_in_threadpool(self._tell_silence)

    def _tell_silence(self) -> None:
        silence = self._refusals.silence()
        if silence is not None:
            told = f"{silence.more} more were not written"
            facts = {"more": silence.more, "by": silence.by}
            audit.note(self._store, "refused", told, actor="luthier", tenant=keys.LOCAL, facts=facts)


def _shown(scope: Scope) -> str | None:
    """The fingerprint of the key that a request shows, if it shows one."""
    given = [value for name, value in scope["headers"] if name == b"authorization"]
    scheme, _, secret = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
    secret = secret.strip()
    return keys.fingerprint(secret) if scheme.lower() == b"bearer" and secret else None


def _turned_away(scope: Scope, error: LuthierError) -> Any:
    """A refusal before the body was read. What is left of a short one is cheaper to read than a connection is
    to make anew; a long one ends with its connection."""
    headers = dict(scope["headers"])
    declared = headers.get(b"content-length", b"")
    short = declared.isdigit() and len(declared) < 10 and int(declared) <= DRAIN_BYTES
    return problems.response(error, {} if short else {"connection": "close"})


def _bounded(receive: Receive) -> Receive:
    """A body that ends in an error once it is larger than any that these routes take: in one of the
    framework's, for any other it would call a body that cannot be read."""
    read = 0

    async def counted() -> Message:
        nonlocal read
        message = await receive()
        read += len(message.get("body", b""))
        if read > SMALL_BYTES:
            raise HTTPException(413, f"the body is larger than {SMALL_BYTES} bytes")
        return message

    return counted


def _unknown(why: str) -> Any:
    return problems.refusal(401, why, "invalid_api_key", {"www-authenticate": "Bearer"})


def _nowhere(scope: Scope, *, known: bool) -> Any:
    if known:
        return problems.refusal(405, "this path does not take this method", None)
    return problems.refusal(404, problems.no_path(scope["path"]), None)


def _forbidden(need: Need) -> Any:
    wanted = " or ".join(sorted(need.any_of or {May.ADMIN}))
    return problems.refusal(403, f"this key may not do this: it takes the scope {wanted}", "missing_scope")
