"""A client that does not read what it asked for is cut off, and costs no one else anything meanwhile.

Source: https://docs.python.org/3/library/asyncio-protocol.html#flow-control-callbacks. What the kernel does
not take is not written: at most one piece of a response waits here, and `BUFFER_BYTES` (which Linux doubles)
in the kernel. Who takes nothing for `SEND_S`, so that not even a third of that gets free, is hung up on;
its request sees a client that left, and gives back its place and its blocks. What an answer says meanwhile
waits in its exchange and is bounded by the answer's own length.
It does not know HTTP beyond uvicorn's protocol, nor who is slow on purpose.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from contextlib import suppress

from uvicorn.protocols.http.h11_impl import H11Protocol

SEND_S = 30.0
BUFFER_BYTES = 256 * 1024

log = logging.getLogger("luthier.http")


class Patient(H11Protocol):
    """uvicorn's HTTP/1.1, with an end to waiting for a reader."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=1, low=0)  # under TLS, 0 would mean: never write
        with suppress(OSError):  # it has hung up already
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._late = self.loop.call_later(SEND_S, self._cut)

    def resume_writing(self) -> None:
        self._in_time()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._in_time()
        super().connection_lost(exc)

    def _in_time(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _cut(self) -> None:
        log.warning("a client read nothing for %.0f s and is cut off", SEND_S)
        self.transport.abort()
