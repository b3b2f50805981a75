"""The key: every path but /health asks for it before anything else happens.

RFC 6750 (`Authorization: Bearer …`). Only the key's SHA-256 is kept, and it is compared in constant time,
so neither memory dumps nor timing give it away. A plain hash is enough for a key of 256 random bits; a
key that a person chose is only as good as their choice. It knows one key, no scopes and no tenants.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from luthier.http import problems
from luthier.keys import LOCAL, Caller

OPEN_PATHS = frozenset({"/health"})


def new_key() -> str:
    return f"lt-{secrets.token_urlsafe(32)}"


def fingerprint(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class Guard:
    """ASGI middleware, so that a new route is closed unless it is listed here as open."""

    def __init__(self, app: ASGIApp, key_sha256: bytes) -> None:
        self._app = app
        self._key_sha256 = key_sha256

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS and not self._knows(scope):
            refused = problems.refusal(
                401, "incorrect or missing API key", "invalid_api_key", {"www-authenticate": "Bearer"}
            )
            await refused(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) != 1:
            return False
        scheme, _, key = given[0].partition(b" ")
        right = hmac.compare_digest(hashlib.sha256(key.strip()).digest(), self._key_sha256)
        return right and scheme.lower() == b"bearer"


def caller(request: Request) -> Caller:
    """Who asks: with one key there is one caller."""
    del request
    return LOCAL
