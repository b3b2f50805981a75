"""API keys: made, listed, revoked and recognised; what each may do, for which tenant, until when.

Source: RFC 6750 (bearer tokens). A key is 256 random bits and is shown once. The store keeps its SHA-256 and
no slow password hash: those make guessing dear, and 2^256 cannot be guessed at any price per guess; they
would only make every request dear. A tenant is a name; what belongs to whom, the rooms that keep it know.
This module does not know HTTP, routes or what a request costs.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import insert, select, update
from sqlalchemy.engine import RowMapping

from luthier.chain import Deed
from luthier.errors import NotFound, RecipeError
from luthier.schema.keys import ALLOWANCES, KEYS
from luthier.store import Store
from luthier.store_engine import now

LOCAL = "local"  # the tenant of whoever sits at this machine
SERVED = "served"  # the id of the one key that is not in the store: the one `luthier serve` was given
SHOWN = 9  # characters of a key that may be shown again: `lt-` and 36 of its 256 bits
_LIKE_A_KEY = re.compile(r"\b((?:lt|sk)(?:-|%2[dD]))[A-Za-z0-9_%-]{16,}")
_TENANT = re.compile(r"[a-z0-9][a-z0-9-]{0,47}")


class Scope(StrEnum):
    """What a key may do. `admin` implies the others; no other implies any."""

    ADMIN = "admin"
    TRAIN = "train"
    INFER = "infer"
    READ = "read"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is asking."""

    key_id: str
    tenant: str
    scopes: frozenset[Scope]

    def may(self, any_of: Iterable[Scope]) -> bool:
        return Scope.ADMIN in self.scopes or not self.scopes.isdisjoint(any_of)

    @property
    def operator(self) -> bool:
        """Whether this is an administrator of the server itself, not of one tenant on it."""
        return Scope.ADMIN in self.scopes and self.tenant == LOCAL


@dataclass(frozen=True, slots=True)
class Budget:
    """What one key may spend; None is no bound."""

    requests_per_minute: int | None = None
    tokens_per_day: int | None = None
    tokens_per_month: int | None = None
    concurrent_requests: int | None = None

    @property
    def bounds(self) -> bool:
        return self != Budget()


@dataclass(frozen=True, slots=True)
class Key:
    """A key as the store knows it: everything but the key."""

    id: str
    tenant: str
    name: str
    prefix: str
    scopes: frozenset[Scope]
    budget: Budget
    created_at: str
    expires_at: str | None
    revoked_at: str | None

    @property
    def caller(self) -> Caller:
        return Caller(self.id, self.tenant, self.scopes)

    @property
    def state(self) -> str:
        """`active`, `revoked` or `expired`, now."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and self.expires_at <= now() else "active"


@dataclass(frozen=True, slots=True)
class Origin:
    """What people call a new key, and who the audit log says made it."""

    name: str = ""
    actor: str = LOCAL


def new_secret() -> str:
    return f"lt-{secrets.token_urlsafe(32)}"


def hidden(text: str, served_sha256: str = "") -> str:
    """The text without what looks like a key: of ours, of OpenAI's, or the one that `serve` was given."""
    text = _LIKE_A_KEY.sub(lambda found: f"{found[1]}…", text)
    pieces = re.split(r"([/?&=;,\s]+)", text)
    return "".join("…" if fingerprint(p.encode("utf-8", "replace")) == served_sha256 else p for p in pieces)


def fingerprint(secret: bytes) -> str:
    return hashlib.sha256(secret).hexdigest()


def create(
    store: Store,
    tenant: str,
    scopes: Iterable[Scope],
    *,
    origin: Origin = Origin(),
    budget: Budget | None = None,
    lives: timedelta | None = None,
) -> tuple[Key, str]:
    """A new key and its secret, which nobody can ask for again."""
    if not _TENANT.fullmatch(tenant):
        raise RecipeError(f"{tenant[:60]!r} cannot be a tenant", hint="lower-case letters, digits and -")
    granted = frozenset(scopes)
    if not granted:
        raise RecipeError("a key without a scope opens nothing", hint="--scopes infer,read")
    limits, secret = budget or Budget(), new_secret()
    row = {
        "id": f"key-{secrets.token_hex(8)}",
        "tenant": tenant,
        "name": origin.name,
        "prefix": secret[:SHOWN],
        "scopes": ",".join(sorted(granted)),
        **asdict(limits),
        "created_at": now(),
        "expires_at": _later(lives),
        "revoked_at": None,
    }
    hidden = ("tenant", "revoked_at")
    told = {name: value for name, value in row.items() if name not in hidden and value is not None}
    with store.writing(Deed("keys create", str(row["id"]), origin.actor, tenant, told)) as connection:
        connection.execute(insert(KEYS), row | {"sha256": fingerprint(secret.encode())})
        connection.execute(insert(ALLOWANCES), {"key_id": row["id"], "empty_at_s": 0.0})
    return _key(row), secret


def listed(store: Store, tenant: str | None = None) -> list[Key]:
    """Keys, newest first; of one tenant, or all."""
    query = select(KEYS).order_by(KEYS.c.seq.desc())
    return [
        _key(row) for row in store.rows(query if tenant is None else query.where(KEYS.c.tenant == tenant))
    ]


def revoke(store: Store, key_id: str, actor: str = LOCAL) -> Key:
    """From the next request on this key opens nothing. Revoking twice changes nothing."""
    query = select(KEYS).where(KEYS.c.id == key_id)
    found = store.rows(query)
    if not found:
        raise NotFound(f"no key {key_id[:60]!r}", where=store.where, hint="`luthier keys list` lists them")
    with store.writing(Deed("keys revoke", key_id, actor, found[0]["tenant"])) as connection:
        standing = (KEYS.c.id == key_id, KEYS.c.revoked_at.is_(None))
        connection.execute(update(KEYS).where(*standing).values(revoked_at=now()))
    return _key(store.rows(query)[0])


def recognise(store: Store, secret: bytes) -> Key | None:
    """The key behind a secret, whatever its state; found by hash, so timing tells nothing of it."""
    return known(store, fingerprint(secret))


def known(store: Store, sha256: str) -> Key | None:
    """The key with this fingerprint, whatever its state."""
    found = store.rows(select(KEYS).where(KEYS.c.sha256 == sha256))
    return _key(found[0]) if found else None


def standing(store: Store, key_id: str) -> str:
    """The state of the key with this id; one that the store does not have stands as long as its server."""
    found = store.rows(select(KEYS).where(KEYS.c.id == key_id))
    return _key(found[0]).state if found else "active"


def _later(lives: timedelta | None) -> str | None:
    return None if lives is None else (datetime.now(UTC) + lives).isoformat(timespec="microseconds")


def _key(row: RowMapping | dict[str, Any]) -> Key:
    plain = ("id", "tenant", "name", "prefix", "created_at", "expires_at", "revoked_at")
    return Key(
        **{name: row[name] for name in plain},
        scopes=frozenset(Scope(scope) for scope in row["scopes"].split(",")),
        budget=Budget(**{one.name: row[one.name] for one in fields(Budget)}),
    )
