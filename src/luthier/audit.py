"""The audit log: who did what to whom, in a chain that shows any change.

Source: hash-chained logs (Schneier & Kelsey 1999, "Secure audit logs to support computer forensics"). Each
entry's hash is over the hash before it and itself (`chain`), so an entry that is changed, removed, inserted
or moved breaks the chain from there on. What a chain alone cannot show is a tail that was
cut off: the last hash and its number stand in `audit.head` beside an SQLite database too, written after each
entry; a copy of that file elsewhere shows even a chain that was made anew as a whole. For PostgreSQL keep the
`head` that `verify` prints.

The database refuses to change or delete entries; whoever can write to its file can, and is found out by
`verify`. This module does not know who may do what.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import select

from luthier import chain
from luthier.chain import HEAD, START, Deed, hashed
from luthier.errors import StoreError
from luthier.schema.keys import AUDIT
from luthier.store import Store


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
) -> None:
    """Append an entry for what is no row of the database; when this returns it is on disk. A deed that is a
    row takes `store.writing(Deed(...))`: then both are one commit."""
    with store.writing(Deed(action, target, actor, tenant, dict(facts or {}))):
        pass


def entries(store: Store, after: int = 0) -> Iterator[Entry]:
    """The log from an entry on, oldest first."""
    for row in store.rows(select(AUDIT).where(AUDIT.c.seq > after).order_by(AUDIT.c.seq)):
        yield Entry(**{**row, "facts": json.loads(row["facts"])})


def verify(store: Store) -> dict[str, Any]:
    """Walk the whole chain; raise `StoreError` naming the first entry that does not fit."""
    seq, previous = 0, START
    head = chain.head(store.where)
    for entry in entries(store):
        seq += 1
        if entry.seq != seq:
            raise _broken(store, seq, f"entry {seq} is missing; {entry.seq} follows {seq - 1}")
        if entry.previous != previous:
            raise _broken(store, seq, "it does not follow the entry before it")
        if entry.hash != hashed(asdict(entry)):
            raise _broken(store, seq, "it was changed after it was written")
        previous = entry.hash
        if head is not None and head["seq"] == seq and head["hash"] != previous:
            raise _broken(store, seq, f"{HEAD} knows another entry {seq}: what stood here was cut off")
    if head is not None and head["seq"] > seq:
        raise _broken(store, head["seq"], f"{HEAD} knows entry {head['seq']}, the log ends at {seq}")
    if head is None and seq and chain.head_file(store.where) is not None:
        raise _broken(store, seq, f"{HEAD} is gone, so a cut tail could not be seen")
    return {"entries": seq, "head": previous}


def _broken(store: Store, seq: int, what: str) -> StoreError:
    return StoreError(
        f"the audit log is broken at entry {seq}: {what}", where=store.where,
        hint="keep the files as they are and compare with a copy; nothing after this entry can be trusted",
    )  # fmt: skip
