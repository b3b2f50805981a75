"""Tables of runs, their stages, releases, refs, events and requests, and the step that makes them.

Refs are append-only in the database itself (triggers), so no code path can rewrite who shipped what. Their
statements are frozen; what a table should become is another room's or a later step.
"""

from __future__ import annotations

from sqlalchemy import Boolean, Column, Double, Integer, String, Table

from luthier.schema.core import METADATA, Migration, Serial

MIGRATION = Migration(
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
)

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
    Column("error", String), Column("key_id", String), Column("tenant", String),
)  # fmt: skip
