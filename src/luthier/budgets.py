"""What a key may spend: requests a minute before they are worked on, tokens a day once they are known.

Source: the generic cell rate algorithm (ITU-T I.371) for requests: one time per key says when its bucket will
be empty, and a minute's worth may come at once. Tokens are counted by UTC day. Both are rows of the store,
changed in one transaction each, so several servers on one database share a budget and a restart forgets
nothing. A request that begins within the day's tokens may end beyond them; the next one is refused. This
module does not know HTTP, nor what a token costs.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from sqlalchemy import select, update

from luthier.keys import Key
from luthier.schema.keys import ALLOWANCES, SPENT
from luthier.store import Store

MINUTE_S = 60.0


@dataclass(frozen=True, slots=True)
class Allowance:
    """Whether a request may be worked on, and what is left: `retry_after_s` is 0 where it may."""

    retry_after_s: int
    of: str = ""
    limit_requests: int | None = None
    left_requests: int | None = None
    limit_tokens: int | None = None
    left_tokens: int | None = None


def take(store: Store, key: Key, now_s: float | None = None) -> Allowance:
    """Count one request of this key, unless a budget is used up."""
    moment_s = time.time() if now_s is None else now_s
    limit, tokens = key.budget.requests_per_minute, key.budget.tokens_per_day
    spent = spent_today(store, key.id, moment_s) if tokens is not None else 0
    left_tokens = None if tokens is None else max(0, tokens - spent)
    if left_tokens == 0:
        return Allowance(_until_midnight_s(moment_s), "tokens per day", limit, None, tokens, 0)
    if limit is None:
        return Allowance(0, "", None, None, tokens, left_tokens)
    wait_s, left = _arrive(store, key.id, limit, moment_s)
    return Allowance(
        math.ceil(wait_s), "requests per minute" if wait_s else "", limit, left, tokens, left_tokens
    )


def _arrive(store: Store, key_id: str, limit: int, moment_s: float) -> tuple[float, int]:
    """Seconds to wait (0: it is counted), and how many more may come at once."""
    each_s = MINUTE_S / limit
    which = ALLOWANCES.c.key_id == key_id
    with store.writing() as connection:
        known = connection.execute(
            select(ALLOWANCES.c.empty_at_s).where(which).with_for_update()
        ).scalar_one()
        then_s = max(known, moment_s) + each_s
        if then_s - moment_s > MINUTE_S + 1e-6:
            return then_s - moment_s - MINUTE_S, 0
        connection.execute(update(ALLOWANCES).where(which).values(empty_at_s=then_s))
    return 0.0, int((MINUTE_S - (then_s - moment_s)) / each_s + 1e-6)


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


def _day(moment_s: float) -> str:
    return datetime.fromtimestamp(moment_s, UTC).date().isoformat()


def _until_midnight_s(moment_s: float) -> int:
    now = datetime.fromtimestamp(moment_s, UTC)
    midnight = (now + timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)
    return max(1, math.ceil((midnight - now).total_seconds()))
