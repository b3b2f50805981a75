"""The chain under the audit log: an entry is appended inside the transaction of the deed it tells of.

Source: hash-chained logs (Schneier & Kelsey 1999). Each entry's hash is SHA-256 over the hash before it and
its own canonical JSON. Since the entry and the deed are one commit, neither can be there without the other,
wherever a process dies. The newest hash and its number stand in `audit.head` beside an SQLite database too,
moved on after each commit: a crash leaves it a few entries behind, never ahead.
It does not know what deeds there are, nor how the chain is walked (`audit` does).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import func, insert, select
from sqlalchemy.engine import Connection

from luthier import artifacts
from luthier.schema.keys import AUDIT
from luthier.store_engine import now

HEAD = "audit.head"
START = "0" * 64
_LOCK = 0x61756474  # "audt": one writer at a time on PostgreSQL; SQLite's writers take turns anyway


@dataclass(frozen=True, slots=True)
class Deed:
    """Who did what to what. `actor`: a key's id, `cli:USER` or `pipeline:RUN`. `facts` hold no secret and no
    text."""

    action: str
    target: str
    actor: str
    tenant: str
    facts: Mapping[str, Any] = field(default_factory=dict)


def append(connection: Connection, deed: Deed) -> tuple[int, str]:
    """The last statement of a transaction: its number and hash. PostgreSQL's writers wait for each other here
    alone, so nobody who waits holds what the one before needs."""
    said = {
        "at": now(), "actor": deed.actor, "tenant": deed.tenant, "action": deed.action,
        "target": deed.target, "facts": json.loads(artifacts.canonical(dict(deed.facts))),
    }  # fmt: skip
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(_LOCK)))
    last = connection.execute(select(AUDIT.c.seq, AUDIT.c.hash).order_by(AUDIT.c.seq.desc()).limit(1)).first()
    seq, previous = (last.seq + 1, last.hash) if last else (1, START)
    row = {"seq": seq, **said, "previous": previous}
    row["hash"] = hashed(row)
    connection.execute(insert(AUDIT), row | {"facts": artifacts.canonical(said["facts"]).decode()})
    return seq, str(row["hash"])


def hashed(row: Mapping[str, Any]) -> str:
    said = {name: row[name] for name in ("seq", "at", "actor", "tenant", "action", "target", "facts")}
    return hashlib.sha256(str(row["previous"]).encode() + artifacts.canonical(said)).hexdigest()


def head_file(where: str) -> Path | None:
    """Beside an SQLite file; a database server has no folder of ours."""
    place = Path(where)
    return place.parent / HEAD if place.suffix == ".db" and place.is_file() else None


def head(where: str) -> dict[str, Any] | None:
    place = head_file(where)
    if place is None or not place.exists():
        return None
    found: dict[str, Any] = artifacts.read_json(place)
    return found


def remember(where: str, held: Callable[[int], str | None], entry: tuple[int, str]) -> None:
    """Move the head on; one that the log no longer holds stays, as the proof that something is gone.

    held: the hash that the log holds under a number.
    """
    place, (seq, entry_hash) = head_file(where), entry
    if place is None:
        return
    with open(place.with_suffix(".lock"), "a") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        known = head(where)
        if known is not None and (known["seq"] >= seq or held(known["seq"]) != known["hash"]):
            return
        artifacts.write_json(place, {"seq": seq, "hash": entry_hash})
