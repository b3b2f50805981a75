"""What a key may spend: requests a minute before they are worked on, tokens once they are known.

Source: the generic cell rate algorithm (ITU-T I.371) for requests: one time per key says when its bucket will
be empty, and a minute's worth may come at once. Tokens are counted by UTC day, and the days add up to months.
Both are rows of the store, changed in one transaction each, so several servers on one database share a budget
and a restart forgets nothing. A request that begins within the tokens may end beyond them; the next one that
would spend any is refused. This module does not know HTTP, nor what a token costs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import func, select, update

from luthier.keys import Key
from luthier.schema.keys import ALLOWANCES, SPENT
from luthier.store import Store

MINUTE_S = 60.0


@dataclass(frozen=True, slots=True)
class Allowance:
    """Whether a request may be worked on, and what is left: `retry_after_s` is 0 where it may. `reset_…_s` is
    when all of a limit is there again."""

    retry_after_s: int
    of: str = ""
    limit_requests: int | None = None
    left_requests: int | None = None
    limit_tokens: int | None = None
    left_tokens: int | None = None
    reset_requests_s: float | None = None
    reset_tokens_s: float | None = None


@dataclass(frozen=True, slots=True)
class _Tokens:
    """What a key has left of one period's tokens, and when the period ends."""

    of: str
    limit: int
    left: int
    reset_s: int


def take(store: Store, key: Key, now_s: float | None = None, *, spends: bool = True) -> Allowance:
    """Count a request of this key, unless a budget is used up: of tokens, only for one that `spends` them."""
    moment_s = time.time() if now_s is None else now_s
    limit = key.budget.requests_per_minute
    tokens = min(_tokens(store, key, moment_s), key=lambda one: (one.left, -one.reset_s), default=None)
    of_tokens: dict[str, Any] = {}
    if tokens is not None:
        of_tokens = {
            "limit_tokens": tokens.limit, "left_tokens": tokens.left, "reset_tokens_s": float(tokens.reset_s),
        }  # fmt: skip
        if not tokens.left and spends:
            return Allowance(tokens.reset_s, tokens.of, limit, **of_tokens)
    if limit is None:
        return Allowance(0, **of_tokens)
    wait_s, left, reset_s = _arrive(store, key.id, limit, moment_s)
    of = "requests per minute" if wait_s else ""
    return Allowance(math.ceil(wait_s), of, limit, left, reset_requests_s=reset_s, **of_tokens)


def _tokens(store: Store, key: Key, moment_s: float) -> Iterator[_Tokens]:
    day, month = key.budget.tokens_per_day, key.budget.tokens_per_month
    if day is not None:
        left = max(0, day - spent_today(store, key.id, moment_s))
        yield _Tokens("tokens per day", day, left, _until_s(moment_s, _midnight))
    if month is not None:
        left = max(0, month - spent_this_month(store, key.id, moment_s))
        yield _Tokens("tokens per month", month, left, _until_s(moment_s, _first_of_next))


def _arrive(store: Store, key_id: str, limit: int, moment_s: float) -> tuple[float, int, float]:
    """Seconds to wait (0: it is counted), how many more may come at once, and seconds until all may again."""
    each_s = MINUTE_S / limit
    which = ALLOWANCES.c.key_id == key_id
    with store.writing() as connection:
        known = connection.execute(
            select(ALLOWANCES.c.empty_at_s).where(which).with_for_update()
        ).scalar_one()
        then_s = max(known, moment_s) + each_s
        if then_s - moment_s > MINUTE_S + 1e-6:
            return then_s - moment_s - MINUTE_S, 0, known - moment_s
        connection.execute(update(ALLOWANCES).where(which).values(empty_at_s=then_s))
    return 0.0, int((MINUTE_S - (then_s - moment_s)) / each_s + 1e-6), then_s - moment_s


def spend(store: Store, key_id: str, tokens: int, now_s: float | None = None) -> None:
    """Count tokens that were read and written for this key."""
    if tokens <= 0:
        return
    day = _day(time.time() if now_s is None else now_s)
    row = {"key_id": key_id, "day": day, "tokens": tokens}
    with store.writing() as connection:
        if connection.dialect.name == "postgresql":
            from sqlalchemy.dialects.postgresql import insert as insert_or
        else:
            from sqlalchemy.dialects.sqlite import insert as insert_or  # type: ignore[assignment]
        more = {"tokens": SPENT.c.tokens + tokens}
        statement = insert_or(SPENT).values(row)
        connection.execute(statement.on_conflict_do_update(index_elements=["key_id", "day"], set_=more))


def spent_today(store: Store, key_id: str, now_s: float | None = None) -> int:
    day = _day(time.time() if now_s is None else now_s)
    rows = store.rows(select(SPENT.c.tokens).where(SPENT.c.key_id == key_id, SPENT.c.day == day))
    return int(rows[0]["tokens"]) if rows else 0


def spent_this_month(store: Store, key_id: str, now_s: float | None = None) -> int:
    month = _day(time.time() if now_s is None else now_s)[: len("2026-01-")]
    mine = SPENT.c.key_id == key_id, SPENT.c.day.startswith(month, autoescape=True)
    return int(
        store.rows(select(func.coalesce(func.sum(SPENT.c.tokens), 0).label("tokens")).where(*mine))[0][
            "tokens"
        ]
    )


def _day(moment_s: float) -> str:
    return datetime.fromtimestamp(moment_s, UTC).date().isoformat()


def _until_s(moment_s: float, end: Callable[[datetime], datetime]) -> int:
    now = datetime.fromtimestamp(moment_s, UTC)
    return max(1, math.ceil((end(now) - now).total_seconds()))


def _midnight(now: datetime) -> datetime:
    return (now + timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)


def _first_of_next(now: datetime) -> datetime:
    return _midnight((now.replace(day=28) + timedelta(days=4)).replace(day=1) - timedelta(days=1))
