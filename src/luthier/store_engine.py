"""How the store's database is reached: which one, opened how, migrated by whom, and what its refusals mean.

Sources: https://www.sqlite.org/wal.html and https://www.sqlite.org/pragma.html (WAL, `synchronous=FULL`,
`busy_timeout`, `foreign_keys`); PostgreSQL's advisory locks. A fresh or old database is migrated by one
process at a time (a file lock beside a SQLite file, an advisory lock in PostgreSQL); the others wait, then
find it done.
This module does not know what the tables mean.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, event, func, insert, inspect, select
from sqlalchemy.engine import URL, Connection, make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, SQLAlchemyError

from luthier.errors import StoreError
from luthier.schema import MIGRATIONS
from luthier.schema.core import VERSION_ROWS, VERSIONS

DATABASE = "luthier.db"
WRITES: dict[str, Any] = {"luthier_writes": True}  # marks the connections whose transactions write
_PATIENCE_MS = 30_000
_MIGRATION_LOCK = 0x6C757468  # "luth"

_HINTS = (
    ("disk is full", "the disk is full: free some space, then run the same command again"),
    ("no space left", "the database server's disk is full"),
    ("locked", "another process has held the database for long: look for a stuck luthier process"),
    ("not a database", "the file is damaged or is not luthier's: move it away and restore a copy"),
    ("malformed", "the file is damaged: move it away and restore a copy"),
    ("readonly", "this user may not write here: check the owner and mode of the home folder"),
    ("unable to open", "check that the home folder exists and that this user may write in it"),
    ("disk i/o", "the disk reports an error, or a size limit is reached (see `ulimit -f`)"),
    ("can't create a connection", "is the database server running, and is the URL right?"),
    ("password authentication", "check the user and password in the URL"),
)


class Refused(StoreError):
    """A constraint of the database said no to a row."""


def now() -> str:
    """UTC, ISO 8601 with microseconds: text that sorts as time does."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def reach(home_or_url: Path | str) -> tuple[Engine, str]:
    """The migrated database of a home folder or behind a URL, and its place in words (never a password)."""
    url = _url(home_or_url)
    sqlite = url.get_backend_name() == "sqlite"
    where = str(url.database) if sqlite else url.render_as_string(hide_password=True)
    engine = _sqlite(url) if sqlite else _postgresql(url)
    try:
        with guard(where), _alone(Path(str(url.database))) if sqlite else nullcontext():
            if sqlite:
                _write_ahead(engine, where)
            _migrate(engine, where)
    except BaseException:
        engine.dispose()
        raise
    return engine, where


@contextmanager
def guard(where: str) -> Iterator[None]:
    """Turn the database's refusal into an error with a place and a next step."""
    try:
        yield
    except SQLAlchemyError as error:
        cause = getattr(error, "orig", None) or error
        fields = cause.args[0] if cause.args and isinstance(cause.args[0], dict) else {}  # pg8000's way
        text = str(fields.get("M", cause)).strip()
        if isinstance(error, IntegrityError) or str(fields.get("C", "")).startswith("23"):
            hint = "it names a run or release that is not in this store, or breaks another rule of the table"
            raise Refused(f"the database refused this row: {text}", where=where, hint=hint) from error
        found = next((hint for sign, hint in _HINTS if sign in text.lower()), None)
        raise StoreError(f"the database failed: {text}", where=where, hint=found) from error
    except OSError as error:  # the lock file, or a socket of pg8000
        raise StoreError(f"the database failed: {error.strerror or error}", where=where) from error


def _url(home_or_url: Path | str) -> URL:
    if isinstance(home_or_url, Path) or "://" not in home_or_url:
        home = Path(home_or_url).expanduser().absolute()
        try:
            home.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            hint = "choose another folder with --home"
            raise StoreError(
                f"cannot make the home folder: {error.strerror}", where=str(home), hint=hint
            ) from error
        return URL.create("sqlite", database=str(home / DATABASE))
    hint = "write postgresql://user:password@host:port/database or sqlite:////folder/luthier.db"
    try:
        url = make_url(home_or_url)
    except (ArgumentError, ValueError):
        raise StoreError("this database URL cannot be read", hint=hint) from None  # it may hold a password
    if url.get_backend_name() == "postgresql":
        return url.set(drivername="postgresql+pg8000")
    if url.get_backend_name() == "sqlite" and url.database and url.database != ":memory:":
        return url
    raise StoreError(f"a store cannot live in {url.drivername!r}", hint=hint)


def _sqlite(url: URL) -> Engine:
    engine = create_engine(url, pool_size=8, max_overflow=64)

    @event.listens_for(engine, "connect")
    def _prepare(dbapi: Any, record: object) -> None:
        del record
        dbapi.isolation_level = None  # transactions begin where we say, not where the driver guesses
        for setting in (f"busy_timeout={_PATIENCE_MS}", "foreign_keys=ON", "synchronous=FULL"):
            dbapi.execute(f"PRAGMA {setting}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # A writer takes its turn at once: a lock asked for after a read could be refused without waiting.
        if connection.get_execution_options().get("luthier_writes"):
            connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def _postgresql(url: URL) -> Engine:
    if importlib.util.find_spec("pg8000") is None:
        raise StoreError("the PostgreSQL driver is not installed", hint="pip install 'luthier[postgres]'")
    return create_engine(url, pool_size=8, max_overflow=24, pool_pre_ping=True)


def _write_ahead(engine: Engine, where: str) -> None:
    """WAL is a property of the file: set once, kept ever after."""
    with engine.connect() as connection:
        mode = connection.exec_driver_sql("PRAGMA journal_mode").scalar()
        if mode != "wal":
            mode = connection.exec_driver_sql("PRAGMA journal_mode=WAL").scalar()
    if mode != "wal":
        hint = "put the home on a local disk; a network file system cannot keep it safe"
        raise StoreError(f"SQLite cannot use its write-ahead log here (mode {mode})", where=where, hint=hint)


@contextmanager
def _alone(database: Path) -> Iterator[None]:
    """One opener at a time; the lock dies with its process, so a kill leaves nothing behind."""
    handle = os.open(f"{database}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _migrate(engine: Engine, where: str) -> None:
    """Take every step not yet taken, in one transaction; refuse a schema from the future."""
    newest = MIGRATIONS[-1].number
    steps = {step.number for step in MIGRATIONS}
    with engine.connect() as connection:
        if _taken(connection) == steps:
            return
    with engine.execution_options(**WRITES).begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(select(func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
        taken = _taken(connection)
        if taken and max(taken) > newest:
            raise StoreError(
                f"this database is of schema {max(taken)}; this luthier knows schemas up to {newest}",
                where=where,
                hint="it was used by a newer luthier: upgrade luthier, or choose another home",
            )
        connection.exec_driver_sql(VERSIONS)
        for step in MIGRATIONS:
            if step.number not in taken:
                step.apply(connection)
                row = {"number": step.number, "title": step.title, "at": now()}
                connection.execute(insert(VERSION_ROWS), row)


def _taken(connection: Connection) -> set[int]:
    """The numbers of the steps that this database has gone."""
    if not inspect(connection).has_table(VERSION_ROWS.name):
        return set()
    return set(connection.execute(select(VERSION_ROWS.c.number)).scalars())
