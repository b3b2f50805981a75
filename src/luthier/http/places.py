"""Places for what is dear: so many at once in all, and of those only a share for one tenant.

Without a line, who finds no place is told to come back. With one, a tenant's next few wait a while, and a
place that gets free goes to whoever waits and has the fewest, the longest waiting first. It lives on the
event loop alone, so it needs no lock. It does not know what is done in a place, nor for how long.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from luthier.http.problems import RequestError


class TooMany(RequestError):
    """As many as this server takes on at once are being served, in all or of this tenant."""

    http_code = 429
    retry_after_s = 1


@dataclass(frozen=True, slots=True)
class Line:
    """How many of one tenant may wait for a place, and how long."""

    length: int = 0
    wait_s: float = 0.0


NO_LINE = Line()


class Places:
    def __init__(self, total: int, share: int, full: str, line: Line = NO_LINE) -> None:
        """`full`: what is said to those who find no place."""
        self._total, self._share, self._full, self._line = total, share, full, line
        self._held: Counter[str] = Counter()
        self._waiting: list[tuple[str, asyncio.Future[None]]] = []

    def take(self, tenant: str) -> Callable[[], None]:
        """A place at once, or `TooMany`. Returns what gives it back, once however often it is called."""
        if not self._room(tenant):
            raise self._refusal()
        self._held[tenant] += 1
        held = [tenant]
        return lambda: self._free(held.pop()) if held else None

    def _free(self, tenant: str) -> None:
        self._held[tenant] -= 1
        if not self._held[tenant]:
            del self._held[tenant]
        able = [turn for turn in self._waiting if self._room(turn[0])]
        if able:
            turn = min(able, key=lambda one: self._held[one[0]])
            self._waiting.remove(turn)
            self._held[turn[0]] += 1
            turn[1].set_result(None)

    @asynccontextmanager
    async def one(self, tenant: str) -> AsyncIterator[None]:
        """A place while the block lasts, waited for in line."""
        if self._room(tenant):
            self._held[tenant] += 1
        else:
            await self._come(tenant)
        try:
            yield
        finally:
            self._free(tenant)

    async def _come(self, tenant: str) -> None:
        if sum(name == tenant for name, _ in self._waiting) >= self._line.length:
            raise self._refusal()
        turn = tenant, asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await asyncio.wait({turn[1]}, timeout=self._line.wait_s)
        except asyncio.CancelledError:
            if turn in self._waiting:
                self._waiting.remove(turn)
            else:
                self._free(tenant)
            raise
        if turn in self._waiting:
            self._waiting.remove(turn)
            raise self._refusal()

    def _room(self, tenant: str) -> bool:
        return self._held.total() < self._total and self._held[tenant] < self._share

    def _refusal(self) -> TooMany:
        return TooMany(self._full, code="rate_limit_exceeded")
