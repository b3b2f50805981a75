"""The store's tables, and the numbered migrations that make them, for SQLite ≥ 3.35 and PostgreSQL ≥ 12.

A migration is text and is never edited once released: a home of any age walks through the same steps.
`MIGRATIONS` is what builds a database; the `Table` objects below describe its newest shape for queries,
and a test holds the two together. To change the schema: append a `Migration`, then change the table.
Refs are append-only in the database itself (triggers), so no code path can rewrite who shipped what.

This module does not know who calls it, when to migrate, or how to lock.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import BigInteger, Boolean, Column, Double, Integer, MetaData, String, Table
from sqlalchemy.engine import Connection

ALIAS = r"^[a-z][a-z0-9-]{0,30}$"  # what an alias may be called
SERIAL = {
    "sqlite": "INTEGER PRIMARY KEY AUTOINCREMENT",
    "postgresql": "BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY",
}


@dataclass(frozen=True)
class Migration:
    """One step: `common` runs everywhere ({serial} differs), then what one dialect needs."""

    number: int
    title: str
    common: tuple[str, ...]
    sqlite: tuple[str, ...] = ()
    postgresql: tuple[str, ...] = ()

    def apply(self, connection: Connection) -> None:
        """Run inside the caller's transaction; both databases can roll back DDL."""
        dialect = connection.dialect.name
        for statement in (*self.common, *getattr(self, dialect)):
            connection.exec_driver_sql(statement.replace("{serial}", SERIAL[dialect]))


VERSIONS = """CREATE TABLE IF NOT EXISTS schema_versions (
    number INTEGER PRIMARY KEY, title TEXT NOT NULL, at TEXT NOT NULL)"""

MIGRATIONS: tuple[Migration, ...] = (
    Migration(
        number=1,
        title="runs, stages, releases, refs, events, requests",
        common=(
            """CREATE TABLE runs (
                seq {serial}, id TEXT NOT NULL UNIQUE, name TEXT NOT NULL,
                status TEXT NOT NULL
                    CHECK (status IN ('running', 'done', 'refused', 'failed', 'interrupted')),
                recipe TEXT NOT NULL, host TEXT NOT NULL, release TEXT, error TEXT,
                started_at TEXT NOT NULL, ended_at TEXT)""",
            """CREATE TABLE stages (
                seq {serial}, run_id TEXT NOT NULL REFERENCES runs (id), stage TEXT NOT NULL,
                key TEXT NOT NULL, digest TEXT NOT NULL, reused BOOLEAN NOT NULL,
                seconds DOUBLE PRECISION NOT NULL, facts TEXT NOT NULL, at TEXT NOT NULL,
                forgotten_at TEXT)""",
            "CREATE INDEX stages_by_key ON stages (key, seq)",
            "CREATE INDEX stages_by_run ON stages (run_id, seq)",
            """CREATE TABLE releases (
                seq {serial}, digest TEXT NOT NULL, name TEXT NOT NULL, run_id TEXT REFERENCES runs (id),
                accepted BOOLEAN NOT NULL, facts TEXT NOT NULL, at TEXT NOT NULL, UNIQUE (name, digest))""",
            """CREATE TABLE refs (
                id {serial}, name TEXT NOT NULL, alias TEXT NOT NULL, turn INTEGER NOT NULL,
                digest TEXT NOT NULL, previous TEXT, actor TEXT NOT NULL, reason TEXT NOT NULL,
                at TEXT NOT NULL, UNIQUE (name, alias, turn),
                FOREIGN KEY (name, digest) REFERENCES releases (name, digest))""",
            """CREATE TABLE events (
                id {serial}, at TEXT NOT NULL, kind TEXT NOT NULL, facts TEXT NOT NULL,
                run_id TEXT REFERENCES runs (id))""",
            "CREATE INDEX events_by_run ON events (run_id, id)",
            """CREATE TABLE requests (
                id {serial}, at TEXT NOT NULL, release TEXT, model TEXT NOT NULL, status INTEGER NOT NULL,
                prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL,
                first_token_s DOUBLE PRECISION, total_s DOUBLE PRECISION NOT NULL, error TEXT)""",
            "CREATE INDEX requests_by_release ON requests (release, at)",
        ),
        sqlite=tuple(
            f"CREATE TRIGGER refs_no_{verb} BEFORE {verb} ON refs "
            "BEGIN SELECT RAISE(ABORT, 'refs are append-only'); END"
            for verb in ("update", "delete")
        ),
        postgresql=(
            """CREATE FUNCTION luthier_append_only() RETURNS trigger LANGUAGE plpgsql AS
                $$ BEGIN RAISE EXCEPTION 'refs are append-only'; END $$""",
            """CREATE TRIGGER refs_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON refs
                FOR EACH STATEMENT EXECUTE FUNCTION luthier_append_only()""",
        ),
    ),
)

METADATA = MetaData()
Serial = BigInteger().with_variant(Integer, "sqlite")

VERSION_ROWS = Table(
    "schema_versions", METADATA,
    Column("number", Integer, primary_key=True), Column("title", String), Column("at", String),
)  # fmt: skip

RUNS = Table(
    "runs", METADATA,
    Column("seq", Serial, primary_key=True), Column("id", String), Column("name", String),
    Column("status", String), Column("recipe", String), Column("host", String), Column("release", String),
    Column("error", String), Column("started_at", String), Column("ended_at", String),
)  # fmt: skip

STAGES = Table(
    "stages", METADATA,
    Column("seq", Serial, primary_key=True), Column("run_id", String), Column("stage", String),
    Column("key", String), Column("digest", String), Column("reused", Boolean), Column("seconds", Double),
    Column("facts", String), Column("at", String), Column("forgotten_at", String),
)  # fmt: skip

RELEASES = Table(
    "releases", METADATA,
    Column("seq", Serial, primary_key=True), Column("digest", String), Column("name", String),
    Column("run_id", String), Column("accepted", Boolean), Column("facts", String), Column("at", String),
)  # fmt: skip

# `turn` counts the moves of one alias from 1; its UNIQUE constraint is what lets just one racer win.
REFS = Table(
    "refs", METADATA,
    Column("id", Serial, primary_key=True), Column("name", String), Column("alias", String),
    Column("turn", Integer), Column("digest", String), Column("previous", String), Column("actor", String),
    Column("reason", String), Column("at", String),
)  # fmt: skip

EVENTS = Table(
    "events", METADATA,
    Column("id", Serial, primary_key=True), Column("at", String), Column("kind", String),
    Column("facts", String), Column("run_id", String),
)  # fmt: skip

REQUESTS = Table(
    "requests", METADATA,
    Column("id", Serial, primary_key=True), Column("at", String), Column("release", String),
    Column("model", String), Column("status", Integer), Column("prompt_tokens", Integer),
    Column("completion_tokens", Integer), Column("first_token_s", Double), Column("total_s", Double),
    Column("error", String),
)  # fmt: skip
