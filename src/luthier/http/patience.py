"""Connections that are too many or too slow: turned away, or cut off, and no cost to anyone else meanwhile.

Source: https://docs.python.org/3/library/asyncio-protocol.html#flow-control-callbacks. What the kernel does
not take is not written: at most one piece of a response waits here, and `BUFFER_BYTES` (which Linux doubles)
in the kernel. Who takes nothing for `SEND_S`, so that not even a third of that gets free, is hung up on;
its request sees a client that left, and gives back its place and its blocks. What an answer says meanwhile
waits in its exchange and is bounded by the answer's own length.
Who sends slowly is cut off too, with a 408: a request's head must be whole `HEAD_S` after the connection (or
the head's first byte), and a body must bring `BODY_BYTES` in each `BODY_S`, counted only while we read.
A refusal does not wait for the rest of a body. Who goes on sending one may do so for `REST_BYTES` and
`SEND_S`, so that a client that sends first and reads then still finds its answer; then it is hung up on.
A connection beyond `CONNECTIONS` is told 429 to its first bytes, which are not even parsed, and closed once
it has heard (RFC 9112 §9.6: who closes on unread bytes may destroy the answer).
It does not know HTTP beyond uvicorn's protocol, nor who is slow on purpose.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from contextlib import suppress

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from luthier.http import problems

CONNECTIONS = 1000
LINGER_S = 2.0
RETRY_S = 5
SEND_S = 30.0
BUFFER_BYTES = 256 * 1024
HEAD_S = 10.0
BODY_S = 20.0
BODY_BYTES = 4096
REST_BYTES = 8 * 1024 * 1024

log = logging.getLogger("luthier.http")


def _spelt(line: str, kind: str, what: str, code: str | None) -> bytes:
    """A whole answer as bytes, for connections that have no request yet."""
    body = json.dumps(problems.shape(what, kind, None, code)).encode()
    head = (
        f"HTTP/1.1 {line}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body


TOO_MANY = _spelt(
    f"429 Too Many Requests\r\nretry-after: {RETRY_S}", problems.KINDS[429],
    f"{CONNECTIONS} connections are open already (try again in {RETRY_S} s)", "rate_limit_exceeded",
)  # fmt: skip
TOO_LATE = _spelt("408 Request Timeout", "invalid_request_error", "the request came too slowly", None)


class Patient(H11Protocol):
    """uvicorn's HTTP/1.1, with an end to waiting for a reader."""

    _late: asyncio.TimerHandle | None = None
    _unwanted: asyncio.TimerHandle | None = None  # set on one connection too many
    _told = False
    _head: asyncio.TimerHandle | None = None  # runs while a request's head is not whole
    _body: asyncio.TimerHandle | None = None  # runs while a body is on its way
    _brought = 0  # bytes in this span of `BODY_S`
    _held_up = False  # in this span it was we who did not read
    _rest: asyncio.TimerHandle | None = None  # runs while a body goes on after its answer
    _rest_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            self._unwanted = self.loop.call_later(LINGER_S, transport.abort)
            return
        transport.set_write_buffer_limits(high=1, low=0)  # under TLS, 0 would mean: never write
        with suppress(OSError):  # it has hung up already
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
        self._head = self.loop.call_later(HEAD_S, self._too_slow)

    def data_received(self, data: bytes) -> None:
        if self._unwanted is not None:
            self._turn_away()
            return
        self._rest_bytes += len(data)
        if self._rest is not None and self._rest_bytes > REST_BYTES:
            self._hang_up()
            return
        super().data_received(data)
        self._brought += len(data)
        self._watch()
        self._watch_rest()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()
        self._watch_rest()

    def _turn_away(self) -> None:
        if not self._told:
            self._told = True
            self.transport.write(TOO_MANY)
            if self.transport.can_write_eof():
                self.transport.write_eof()

    def _watch(self) -> None:
        """Which of the two the client owes us now: a head, a body, or neither."""
        self._held_up |= self.flow.read_paused or self.conn.they_are_waiting_for_100_continue
        begun = self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])
        if begun and self._head is None:
            self._head = self.loop.call_later(HEAD_S, self._too_slow)
        elif not begun and self._head is not None:
            self._head.cancel()
            self._head = None
        if self.conn.their_state is h11.SEND_BODY:
            if self._body is None:
                self._span()
        elif self._body is not None:
            self._body.cancel()
            self._body = None

    def _span(self) -> None:
        self._brought, self._held_up = 0, self.flow.read_paused or self.conn.they_are_waiting_for_100_continue
        self._body = self.loop.call_later(BODY_S, self._weigh)

    def _weigh(self) -> None:
        self._body = None
        paused = self.flow.read_paused or self.conn.they_are_waiting_for_100_continue
        if self._brought < BODY_BYTES and not (self._held_up or paused):
            self._too_slow()
        elif not self.transport.is_closing():
            self._span()

    def _sends_on(self) -> bool:
        """Whether this client is still sending the body of a request that was answered."""
        answered = self.cycle is not None and self.cycle.response_complete
        return answered and self.conn.their_state is h11.SEND_BODY

    def _watch_rest(self) -> None:
        if not self._sends_on():
            if self._rest is not None:
                self._rest.cancel()
                self._rest = None
        elif self._rest is None and not self.transport.is_closing():
            self._rest, self._rest_bytes = self.loop.call_later(SEND_S, self._hang_up), 0

    def _hang_up(self) -> None:
        log.warning("a client went on sending after its answer and is cut off")
        self.transport.abort()

    def _too_slow(self) -> None:
        self._head = None
        log.warning("a client sends too slowly and is cut off")
        said = self.cycle is not None and self.cycle.response_started
        if not said or (self.cycle.response_complete and not self._sends_on()):  # one answer a request
            self.transport.write(TOO_LATE)
        self.transport.close()
        self._unwanted = self.loop.call_later(LINGER_S, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._late = self.loop.call_later(SEND_S, self._cut)

    def resume_writing(self) -> None:
        self._in_time()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._in_time()
        for timer in (self._head, self._body, self._rest, self._unwanted):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def _in_time(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _cut(self) -> None:
        log.warning("a client read nothing for %.0f s and is cut off", SEND_S)
        self.transport.abort()
