"""Tables of splits (canaries and shadows) and of what shadows answered beside their champions.

A split begins with a row and ends with another: nothing is changed, and the database refuses to try. `turn`
counts the rows of one name and kind from 1, and its UNIQUE constraint lets just one of two racers write.
This module does not know what a split means.
"""

from __future__ import annotations

from sqlalchemy import Boolean, Column, Double, Integer, String, Table

from luthier.schema.core import METADATA, Migration, Serial

MIGRATION = Migration(
    number=5,
    title="splits of traffic, and what shadows answered",
    common=(
        """CREATE TABLE splits (
            seq {serial}, id TEXT NOT NULL, name TEXT NOT NULL,
            kind TEXT NOT NULL CHECK (kind IN ('canary', 'shadow')), turn INTEGER NOT NULL,
            action TEXT NOT NULL CHECK (action IN ('begin', 'stop', 'finish', 'abort')),
            digest TEXT NOT NULL, champion TEXT NOT NULL,
            percent DOUBLE PRECISION NOT NULL CHECK (percent > 0 AND percent <= 100),
            actor TEXT NOT NULL, reason TEXT NOT NULL, facts TEXT NOT NULL, at TEXT NOT NULL,
            UNIQUE (name, kind, turn), FOREIGN KEY (name, digest) REFERENCES releases (name, digest),
            FOREIGN KEY (name, champion) REFERENCES releases (name, digest))""",
        """CREATE TABLE comparisons (
            seq {serial}, at TEXT NOT NULL, split TEXT NOT NULL, champion TEXT NOT NULL,
            challenger TEXT NOT NULL, same BOOLEAN NOT NULL, similarity DOUBLE PRECISION,
            champion_tokens INTEGER NOT NULL, challenger_tokens INTEGER NOT NULL,
            champion_s DOUBLE PRECISION NOT NULL, challenger_s DOUBLE PRECISION NOT NULL, error TEXT)""",
        "CREATE INDEX comparisons_by_split ON comparisons (split, seq)",
    ),
    sqlite=tuple(
        f"CREATE TRIGGER splits_no_{verb} BEFORE {verb} ON splits "
        "BEGIN SELECT RAISE(ABORT, 'splits are append-only'); END"
        for verb in ("update", "delete")
    ),
    postgresql=(
        """CREATE TRIGGER splits_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON splits
            FOR EACH STATEMENT EXECUTE FUNCTION luthier_append_only()""",
    ),
)

SPLITS = Table(
    "splits", METADATA,
    Column("seq", Serial, primary_key=True), Column("id", String), Column("name", String),
    Column("kind", String), Column("turn", Integer), Column("action", String), Column("digest", String),
    Column("champion", String), Column("percent", Double), Column("actor", String),
    Column("reason", String), Column("facts", String), Column("at", String),
)  # fmt: skip

COMPARISONS = Table(
    "comparisons", METADATA,
    Column("seq", Serial, primary_key=True), Column("at", String), Column("split", String),
    Column("champion", String), Column("challenger", String), Column("same", Boolean),
    Column("similarity", Double), Column("champion_tokens", Integer), Column("challenger_tokens", Integer),
    Column("champion_s", Double), Column("challenger_s", Double), Column("error", String),
)  # fmt: skip
