"""Connections that are too many or too slow: turned away, or cut off, and no cost to anyone else meanwhile.

Source: https://docs.python.org/3/library/asyncio-protocol.html#flow-control-callbacks. What the kernel does
not take is not written: at most one piece of a response waits here, and `BUFFER_BYTES` (which Linux doubles)
in the kernel. Who takes nothing for `SEND_S`, so that not even a third of that gets free, is hung up on;
its request sees a client that left, and gives back its place and its blocks. What an answer says meanwhile
waits in its exchange and is bounded by the answer's own length.
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

from uvicorn.protocols.http.h11_impl import H11Protocol

from luthier.http import problems

CONNECTIONS = 1000
LINGER_S = 2.0
RETRY_S = 5
SEND_S = 30.0
BUFFER_BYTES = 256 * 1024

log = logging.getLogger("luthier.http")


def _too_many() -> bytes:
    what = f"{CONNECTIONS} connections are open already (try again in {RETRY_S} s)"
    body = json.dumps(problems.shape(what, problems.KINDS[429], None, "rate_limit_exceeded")).encode()
    head = (
        f"HTTP/1.1 429 Too Many Requests\r\nretry-after: {RETRY_S}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body


TOO_MANY = _too_many()


class Patient(H11Protocol):
    """uvicorn's HTTP/1.1, with an end to waiting for a reader."""

    _late: asyncio.TimerHandle | None = None
    _unwanted: asyncio.TimerHandle | None = None  # set on one connection too many
    _told = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            self._unwanted = self.loop.call_later(LINGER_S, transport.abort)
            return
        transport.set_write_buffer_limits(high=1, low=0)  # under TLS, 0 would mean: never write
        with suppress(OSError):  # it has hung up already
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)

    def data_received(self, data: bytes) -> None:
        if self._unwanted is None:
            super().data_received(data)
        elif not self._told:
            self._told = True
            self.transport.write(TOO_MANY)
            if self.transport.can_write_eof():
                self.transport.write_eof()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._late = self.loop.call_later(SEND_S, self._cut)

    def resume_writing(self) -> None:
        self._in_time()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._in_time()
        if self._unwanted is not None:
            self._unwanted.cancel()
        super().connection_lost(exc)

    def _in_time(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _cut(self) -> None:
        log.warning("a client read nothing for %.0f s and is cut off", SEND_S)
        self.transport.abort()
