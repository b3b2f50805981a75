"""A door to one server and to no other: its host, a list of paths, bounded answers, calls that can be cut.

Source: RFC 9110 and 9112 through the standard library; server-sent events as the WHATWG describes them. No
redirect is followed, no proxy of the environment is used, and a path that is not on the list is never sent.
It does not know what is asked or answered.
"""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from luthier.errors import ServeError

LOOPBACK = {"127.0.0.1", "::1", "localhost"}
LINE_BYTES = 4 * 1024 * 1024
ANSWER_BYTES = 16 * 1024 * 1024


class Unreachable(ServeError):
    """The server behind does not answer, or what it says is no answer."""

    http_code = 502


@dataclass(frozen=True)
class Door:
    """`key` goes out as a bearer token; it is no part of what is printed."""

    url: str
    paths: frozenset[str]
    key: str | None = field(default=None, repr=False)
    timeout_s: float = 120.0

    @contextmanager
    def call(
        self, path: str, body: object = None, cut: Callable[[Callable[[], None]], None] | None = None
    ) -> Iterator[Reply]:
        """Ask (POST, or GET without a body). `cut` is given what ends the call from another thread."""
        if path not in self.paths:
            raise ValueError(f"{path} is not a path that may be asked for")
        parts = urlsplit(self.url)
        address = (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
        link: http.client.HTTPConnection
        if parts.scheme == "https":
            link = http.client.HTTPSConnection(
                *address, timeout=self.timeout_s, context=ssl.create_default_context()
            )
        else:
            link = http.client.HTTPConnection(*address, timeout=self.timeout_s)
        try:
            link.connect()
            if cut is not None and link.sock is not None:
                cut(_cutter(link.sock))
            sent = None if body is None else json.dumps(body).encode()
            link.request(
                "GET" if sent is None else "POST", parts.path.rstrip("/") + path, sent, self._headers()
            )
            yield Reply(link.getresponse())
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(f"{self.url} does not answer: {type(error).__name__}: {error}") from error
        finally:
            link.close()

    def _headers(self) -> Mapping[str, str]:
        headers = {"content-type": "application/json", "connection": "close"}
        return headers if self.key is None else {**headers, "authorization": f"Bearer {self.key}"}


class Reply:
    def __init__(self, answer: http.client.HTTPResponse) -> None:
        self._answer = answer
        self.status = answer.status

    @property
    def wait_s(self) -> float:
        """How long a busy server asks to be left alone; one second where it does not say."""
        told = self._answer.getheader("retry-after", "")
        return float(told) if told.isdecimal() else 1.0

    def text(self) -> str:
        """All of it, if it is not too long."""
        held = self._answer.read(ANSWER_BYTES + 1)
        if len(held) > ANSWER_BYTES:
            raise Unreachable(f"an answer of more than {ANSWER_BYTES} bytes")
        return held.decode("utf-8", "replace")

    def json(self) -> dict[str, Any]:
        return _object(self.text())

    def problem(self) -> str:
        """What an answer that is no 200 says, in a few words."""
        text = self.text()
        with suppress(Unreachable):
            told = _object(text)
            inner = told.get("error", told)
            if isinstance(inner, dict) and isinstance(inner.get("message"), str):
                text = inner["message"]
        return f"{self.status}: {' '.join(text.split())[:300]}"

    def events(self) -> Iterator[dict[str, Any]]:
        """The objects of a stream, up to its [DONE]; a stream that breaks off before is `Unreachable`."""
        while line := self._answer.readline(LINE_BYTES + 1):
            if len(line) > LINE_BYTES:
                raise Unreachable(f"a line of more than {LINE_BYTES} bytes")
            if not line.startswith(b"data:"):
                continue
            told = line[5:].strip().decode("utf-8", "replace")
            if told == "[DONE]":
                return
            yield _object(told)
        raise Unreachable("the stream broke off")


def checked(url: str, *, near: bool = False) -> str:
    """A url that names one host over HTTP, and where `near`, this machine; raises `ValueError`."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError("write http://host:port or https://host")
    if parts.username or parts.password:
        raise ValueError("a url here holds no password: name a variable of the environment as `key_env`")
    if near and parts.hostname not in LOOPBACK:
        raise ValueError("it must listen on this machine alone: its routes load and unload adapters")
    if not near and parts.scheme == "http" and parts.hostname not in LOOPBACK:
        raise ValueError("beyond this machine only https is spoken")
    _ = parts.port  # raises ValueError for one that is none
    return url.rstrip("/")


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise Unreachable(f"an answer that is no JSON: {text[:100]!r}") from error
    if not isinstance(value, dict):
        raise Unreachable(f"an answer that is no object: {text[:100]!r}")
    return value


def _cutter(held: socket.socket) -> Callable[[], None]:
    def cut() -> None:
        with suppress(OSError):
            held.shutdown(socket.SHUT_RDWR)

    return cut
