"""What tables and migrations are made of, for SQLite ≥ 3.35 and PostgreSQL ≥ 12.

A migration is text and is never edited once released: a home of any age walks through the same steps. The
migrations build a database; the `Table` objects beside them describe its newest shape for queries, and a
test holds the two together. To change the schema: a new `Migration`, then the table.

This module does not know any table but that of the steps taken.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import BigInteger, Column, Integer, MetaData, String, Table
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

METADATA = MetaData()
Serial = BigInteger().with_variant(Integer, "sqlite")

VERSION_ROWS = Table(
    "schema_versions", METADATA,
    Column("number", Integer, primary_key=True), Column("title", String), Column("at", String),
)  # fmt: skip
