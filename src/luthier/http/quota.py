"""A key's budget at the gate: counted before a request is worked on, told in OpenAI's headers, or a 429.

Source: https://platform.openai.com/docs/guides/rate-limits (`x-ratelimit-*`); times are written as Go writes
a duration, as OpenAI's are. Of tokens the day or the month is told, whichever has less left. Only what would
spend tokens is refused for want of them; to look at one's models and jobs stays free. How many requests of a
key are served at once, each server counts for itself. It does not know routes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.concurrency import run_in_threadpool

from luthier import budgets
from luthier.budgets import Allowance
from luthier.http import problems
from luthier.keys import Key
from luthier.store import Store

Headers = list[tuple[bytes, bytes]]


class Quota:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._open: Counter[str] = Counter()

    @asynccontextmanager
    async def held(self, key: Key | None, *, spends: bool) -> AsyncIterator[Allowance]:
        """What the key allows this request, which counts as open while the block lasts."""
        if key is None or not key.budget.bounds:
            yield Allowance(0)
            return
        most = key.budget.concurrent_requests
        if most is not None and self._open[key.id] >= most:
            yield Allowance(1, f"{most} requests at once")
            return
        self._open[key.id] += 1
        try:
            yield await run_in_threadpool(budgets.take, self._store, key, spends=spends)
        finally:
            self._open[key.id] -= 1
            if not self._open[key.id]:
                del self._open[key.id]


def told(left: Allowance) -> Headers:
    """What is left, in OpenAI's headers."""
    found: dict[str, object] = {
        "limit-requests": left.limit_requests, "remaining-requests": left.left_requests,
        "reset-requests": None if left.reset_requests_s is None else duration(left.reset_requests_s),
        "limit-tokens": left.limit_tokens, "remaining-tokens": left.left_tokens,
        "reset-tokens": None if left.reset_tokens_s is None else duration(left.reset_tokens_s),
    }  # fmt: skip
    return [
        (f"x-ratelimit-{name}".encode(), str(value).encode())
        for name, value in found.items()
        if value is not None
    ]


def refusal(left: Allowance) -> Any:
    headers = {name.decode(): value.decode() for name, value in told(left)}
    headers["retry-after"] = str(left.retry_after_s)
    what = f"this key's budget of {left.of} is used up; try again in {left.retry_after_s} s"
    return problems.refusal(429, what, "rate_limit_exceeded", headers)


def duration(seconds: float) -> str:
    """As Go writes it: `20ms`, `1.5s`, `6m0s`, `17h25m3s`."""
    thousandths = round(1000 * seconds)
    if 0 < thousandths < 1000:
        return f"{thousandths}ms"
    hours, rest = divmod(thousandths, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    said = f"{hours}h" if hours else ""
    said += f"{minutes}m" if hours or minutes else ""
    return f"{said}{rest / 1000:g}s"
