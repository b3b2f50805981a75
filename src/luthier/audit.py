"""The audit log: who did what to whom, in a chain that shows any change.

Source: hash-chained logs (Schneier & Kelsey 1999, "Secure audit logs to support computer forensics"). Each
entry's hash is SHA-256 over the hash before it and its own canonical JSON, so an entry that is changed,
removed, inserted or moved breaks the chain from there on. What a chain alone cannot show is a tail that was
cut off: the last hash and its number stand in `audit.head` beside an SQLite database too, written after each
entry; a copy of that file elsewhere shows even a chain that was made anew as a whole. For PostgreSQL keep the
`head` that `verify` prints.

The database refuses to change or delete entries; whoever can write to its file can, and is found out by
`verify`. This module does not know who may do what.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import func, insert, select

from luthier import artifacts
from luthier.errors import StoreError
from luthier.schema.keys import AUDIT
from luthier.store import Store
from luthier.store_engine import now

HEAD = "audit.head"
START = "0" * 64
_LOCK = 0x61756474  # "audt": one writer at a time on PostgreSQL; SQLite's writers take turns anyway


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the log. `target` is what it was done to; `facts` never hold a secret or a text."""

    seq: int
    at: str
    actor: str
    tenant: str
    action: str
    target: str
    facts: Mapping[str, Any]
    previous: str
    hash: str


def note(
    store: Store, action: str, target: str, *, actor: str, tenant: str, facts: Mapping[str, Any] | None = None
) -> Entry:
    """Append one entry; when this returns it is on disk."""
    said = {
        "at": now(), "actor": actor, "tenant": tenant, "action": action, "target": target,
        "facts": json.loads(artifacts.canonical(dict(facts or {}))),
    }  # fmt: skip
    with store.writing() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(select(func.pg_advisory_xact_lock(_LOCK)))
        last = connection.execute(
            select(AUDIT.c.seq, AUDIT.c.hash).order_by(AUDIT.c.seq.desc()).limit(1)
        ).first()
        seq, previous = (last.seq + 1, last.hash) if last else (1, START)
        row = {"seq": seq, **said, "previous": previous}
        row["hash"] = _hash(row)
        connection.execute(insert(AUDIT), row | {"facts": artifacts.canonical(said["facts"]).decode()})
    _remember(store, seq, str(row["hash"]))
    return Entry(**row)


def entries(store: Store, after: int = 0) -> Iterator[Entry]:
    """The log from an entry on, oldest first."""
    for row in store.rows(select(AUDIT).where(AUDIT.c.seq > after).order_by(AUDIT.c.seq)):
        yield Entry(**{**row, "facts": json.loads(row["facts"])})


def verify(store: Store) -> dict[str, Any]:
    """Walk the whole chain; raise `StoreError` naming the first entry that does not fit."""
    seq, previous = 0, START
    head = _head(store)
    for entry in entries(store):
        seq += 1
        if entry.seq != seq:
            raise _broken(store, seq, f"entry {seq} is missing; {entry.seq} follows {seq - 1}")
        if entry.previous != previous:
            raise _broken(store, seq, "it does not follow the entry before it")
        if entry.hash != _hash(asdict(entry)):
            raise _broken(store, seq, "it was changed after it was written")
        previous = entry.hash
        if head is not None and head["seq"] == seq and head["hash"] != previous:
            raise _broken(store, seq, f"{HEAD} knows another entry {seq}: what stood here was cut off")
    if head is not None and head["seq"] > seq:
        raise _broken(store, head["seq"], f"{HEAD} knows entry {head['seq']}, the log ends at {seq}")
    if head is None and seq and _place(store) is not None:
        raise _broken(store, seq, f"{HEAD} is gone, so a cut tail could not be seen")
    return {"entries": seq, "head": previous}


def _hash(row: Mapping[str, Any]) -> str:
    said = {name: row[name] for name in ("seq", "at", "actor", "tenant", "action", "target", "facts")}
    return hashlib.sha256(str(row["previous"]).encode() + artifacts.canonical(said)).hexdigest()


def _place(store: Store) -> Path | None:
    """Beside an SQLite file; a database server has no folder of ours."""
    place = Path(store.where)
    return place.parent / HEAD if place.suffix == ".db" and place.is_file() else None


def _remember(store: Store, seq: int, entry_hash: str) -> None:
    """Move the head on; one that the log no longer holds stays, as the proof that something is gone."""
    place = _place(store)
    if place is None:
        return
    with open(place.with_suffix(".lock"), "a") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        known = _head(store)
        if known is not None:
            held = store.rows(select(AUDIT.c.hash).where(AUDIT.c.seq == known["seq"]))
            if known["seq"] >= seq or not held or held[0]["hash"] != known["hash"]:
                return
        artifacts.write_json(place, {"seq": seq, "hash": entry_hash})


def _head(store: Store) -> dict[str, Any] | None:
    place = _place(store)
    if place is None or not place.exists():
        return None
    found: dict[str, Any] = artifacts.read_json(place)
    return found


def _broken(store: Store, seq: int, what: str) -> StoreError:
    return StoreError(
        f"the audit log is broken at entry {seq}: {what}", where=store.where,
        hint="keep the files as they are and compare with a copy; nothing after this entry can be trusted",
    )  # fmt: skip
