"""Keys and what they may spend, the audit log, and whose a request was: the tables of migration 2.

The audit log is append-only in the database itself. Of a key only its SHA-256 is kept.
This module does not know what a scope allows, how the chain of the audit log is made, or who reads it.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Double, Integer, String, Table

from luthier.schema.core import METADATA, Migration, Serial

MIGRATION = Migration(
    number=2,
    title="keys, allowances, the audit log; whose a request was",
    common=(
        """CREATE TABLE keys (
            seq {serial}, id TEXT NOT NULL UNIQUE, tenant TEXT NOT NULL, name TEXT NOT NULL,
            prefix TEXT NOT NULL, sha256 TEXT NOT NULL UNIQUE, scopes TEXT NOT NULL,
            requests_per_minute INTEGER CHECK (requests_per_minute > 0),
            tokens_per_day BIGINT CHECK (tokens_per_day > 0),
            created_at TEXT NOT NULL, expires_at TEXT, revoked_at TEXT)""",
        # `empty_at_s` is the theoretical arrival time of the generic cell rate algorithm
        """CREATE TABLE allowances (
            key_id TEXT PRIMARY KEY REFERENCES keys (id), empty_at_s DOUBLE PRECISION NOT NULL)""",
        """CREATE TABLE spent (
            key_id TEXT NOT NULL REFERENCES keys (id), day TEXT NOT NULL, tokens BIGINT NOT NULL,
            PRIMARY KEY (key_id, day))""",
        """CREATE TABLE audit (
            seq BIGINT PRIMARY KEY, at TEXT NOT NULL, actor TEXT NOT NULL, tenant TEXT NOT NULL,
            action TEXT NOT NULL, target TEXT NOT NULL, facts TEXT NOT NULL,
            previous TEXT NOT NULL, hash TEXT NOT NULL UNIQUE)""",
        "ALTER TABLE requests ADD COLUMN key_id TEXT",
        "ALTER TABLE requests ADD COLUMN tenant TEXT",
    ),
    sqlite=tuple(
        f"CREATE TRIGGER audit_no_{verb} BEFORE {verb} ON audit "
        "BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END"
        for verb in ("update", "delete")
    ),
    postgresql=(
        """CREATE FUNCTION luthier_audit_append_only() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN RAISE EXCEPTION 'the audit log is append-only'; END $$""",
        """CREATE TRIGGER audit_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit
            FOR EACH STATEMENT EXECUTE FUNCTION luthier_audit_append_only()""",
    ),
)

KEYS = Table(
    "keys", METADATA,
    Column("seq", Serial, primary_key=True), Column("id", String), Column("tenant", String),
    Column("name", String), Column("prefix", String), Column("sha256", String), Column("scopes", String),
    Column("requests_per_minute", Integer), Column("tokens_per_day", BigInteger),
    Column("created_at", String), Column("expires_at", String), Column("revoked_at", String),
    Column("tokens_per_month", BigInteger), Column("concurrent_requests", Integer),  # `schema.quotas`
)  # fmt: skip

ALLOWANCES = Table(
    "allowances", METADATA, Column("key_id", String, primary_key=True), Column("empty_at_s", Double),
)  # fmt: skip

SPENT = Table(
    "spent", METADATA,
    Column("key_id", String, primary_key=True), Column("day", String, primary_key=True),
    Column("tokens", BigInteger),
)  # fmt: skip

# `seq` counts from 1 without a gap and is worked out by the writer: one chain, and a hole in it shows.
AUDIT = Table(
    "audit", METADATA,
    Column("seq", BigInteger, primary_key=True, autoincrement=False), Column("at", String),
    Column("actor", String), Column("tenant", String), Column("action", String), Column("target", String),
    Column("facts", String), Column("previous", String), Column("hash", String),
)  # fmt: skip
