"""Tables of uploaded files, of uploads that come in parts, of base models by name, and of shared names.

Times are whole seconds since 1970, as OpenAI's API tells them. A deleted file keeps its row: jobs of the past
still say what they learnt from. This module does not know where the bytes lie.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, String, Table

from luthier.schema.core import METADATA, Migration, Serial

MIGRATION = Migration(
    number=3,
    title="uploads, uploads in parts, base models, shared names",
    common=(
        """CREATE TABLE uploads (
            seq {serial}, id TEXT NOT NULL UNIQUE, tenant TEXT NOT NULL, filename TEXT NOT NULL,
            purpose TEXT NOT NULL, bytes BIGINT NOT NULL, sha256 TEXT NOT NULL, created_at BIGINT NOT NULL,
            expires_at BIGINT, deleted_at BIGINT)""",
        "CREATE INDEX uploads_by_tenant ON uploads (tenant, seq)",
        "CREATE INDEX uploads_by_expiry ON uploads (expires_at)",
        """CREATE TABLE assemblies (
            seq {serial}, id TEXT NOT NULL UNIQUE, tenant TEXT NOT NULL, filename TEXT NOT NULL,
            purpose TEXT NOT NULL, bytes BIGINT NOT NULL, keep_s BIGINT, created_at BIGINT NOT NULL,
            expires_at BIGINT NOT NULL, status TEXT NOT NULL
                CHECK (status IN ('pending', 'completed', 'cancelled')),
            file_id TEXT REFERENCES uploads (id))""",
        "CREATE INDEX assemblies_by_tenant ON assemblies (tenant, status)",
        """CREATE TABLE assembly_parts (
            seq {serial}, id TEXT NOT NULL UNIQUE, assembly TEXT NOT NULL REFERENCES assemblies (id),
            bytes BIGINT NOT NULL, created_at BIGINT NOT NULL)""",
        "CREATE INDEX assembly_parts_by_assembly ON assembly_parts (assembly)",
        """CREATE TABLE bases (
            seq {serial}, name TEXT NOT NULL UNIQUE, section TEXT NOT NULL, model TEXT NOT NULL,
            base TEXT NOT NULL, facts TEXT NOT NULL, created_at BIGINT NOT NULL)""",
        "CREATE TABLE shared (name TEXT PRIMARY KEY, actor TEXT NOT NULL, at TEXT NOT NULL)",
    ),
)

UPLOADS = Table(
    "uploads", METADATA,
    Column("seq", Serial, primary_key=True), Column("id", String), Column("tenant", String),
    Column("filename", String), Column("purpose", String), Column("bytes", BigInteger),
    Column("sha256", String), Column("created_at", BigInteger), Column("expires_at", BigInteger),
    Column("deleted_at", BigInteger),
)  # fmt: skip

# An upload that comes in parts; `keep_s` is how long its file will be kept, `expires_at` when it is given up.
ASSEMBLIES = Table(
    "assemblies", METADATA,
    Column("seq", Serial, primary_key=True), Column("id", String), Column("tenant", String),
    Column("filename", String), Column("purpose", String), Column("bytes", BigInteger),
    Column("keep_s", BigInteger), Column("created_at", BigInteger), Column("expires_at", BigInteger),
    Column("status", String), Column("file_id", String),
)  # fmt: skip

ASSEMBLY_PARTS = Table(
    "assembly_parts", METADATA,
    Column("seq", Serial, primary_key=True), Column("id", String), Column("assembly", String),
    Column("bytes", BigInteger), Column("created_at", BigInteger),
)  # fmt: skip

# `model` is the digest of the model stage's artefact, `base` that of the weights and tokenizer in it.
BASES = Table(
    "bases", METADATA,
    Column("seq", Serial, primary_key=True), Column("name", String), Column("section", String),
    Column("model", String), Column("base", String), Column("facts", String),
    Column("created_at", BigInteger),
)  # fmt: skip

# Names of releases that every tenant may ask for.
SHARED = Table(
    "shared", METADATA,
    Column("name", String, primary_key=True), Column("actor", String), Column("at", String),
)  # fmt: skip
