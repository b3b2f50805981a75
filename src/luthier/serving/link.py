"""Messages between two processes of ours: length-prefixed JSON over a socket pair.

A frame is four bytes of length (big-endian) and a JSON list of messages. Nothing else is ever understood,
so the worst a broken peer can do is to say nonsense. What is posted while a frame is being written goes
together into the next one: many small events become few writes, and whoever posts never waits.
It does not know what messages mean.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

LENGTH = struct.Struct(">I")
FRAME_BYTES = 256 * 1024 * 1024  # a length beyond this is not a frame of ours

Message = dict[str, Any]


class Link:
    """One end. `messages` is for one thread; `post` is for any."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._posted: deque[Message] = deque()
        self._changed = threading.Condition()
        self._writing = True
        self._writer = threading.Thread(target=self._write, name="luthier-link", daemon=True)
        self._writer.start()

    def post(self, message: Message) -> None:
        """Send soon, in order. After the other end is gone this does nothing."""
        with self._changed:
            if self._writing:
                self._posted.append(message)
                self._changed.notify()

    def messages(self) -> Iterator[Message]:
        """What the other end posts, until it is gone."""
        while (head := self._read(LENGTH.size)) is not None:
            (length,) = LENGTH.unpack(head)
            body = self._read(length) if length <= FRAME_BYTES else None
            if body is None:
                return
            yield from json.loads(body)

    def close(self) -> None:
        """Send what was posted, then hang up."""
        with self._changed:
            self._writing = False
            self._changed.notify()
        if self._writer is not threading.current_thread():
            self._writer.join(timeout=5.0)
        self.cut()

    def cut(self) -> None:
        """Hang up now; both ends' `messages` end."""
        with suppress(OSError):  # the other end was quicker
            self._end.shutdown(socket.SHUT_RDWR)
        self._end.close()

    def _read(self, size: int) -> bytes | None:
        data = bytearray()
        while len(data) < size:
            try:
                piece = self._end.recv(min(size - len(data), 1 << 20))
            except OSError:
                return None
            if not piece:
                return None
            data += piece
        return bytes(data)

    def _write(self) -> None:
        while True:
            with self._changed:
                while not self._posted and self._writing:
                    self._changed.wait()
                batch = [*self._posted]
                self._posted.clear()
            if not batch:
                return
            body = json.dumps(batch, separators=(",", ":")).encode("utf-8", "surrogatepass")
            try:
                self._end.sendall(LENGTH.pack(len(body)) + body)
            except OSError:
                with self._changed:
                    self._writing = False
                    self._posted.clear()
                return
