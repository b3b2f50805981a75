"""An empty database for one test: a home folder for SQLite, or a database of its own in a real PostgreSQL."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url

KINDS = ("sqlite", pytest.param("postgresql", marks=pytest.mark.postgres))


@contextmanager
def fresh(kind: str, folder: Path) -> Iterator[Path | str]:
    """What `Store.open` takes; PostgreSQL's is skipped unless LUTHIER_TEST_POSTGRES names a server."""
    if kind == "sqlite":
        yield folder / "home"
        return
    server = os.environ.get("LUTHIER_TEST_POSTGRES")
    if not server:
        pytest.skip("LUTHIER_TEST_POSTGRES is unset; `python -m tests.postgres -- pytest` sets it")
    name = f"luthier_{secrets.token_hex(6)}"
    admin = create_engine(server, isolation_level="AUTOCOMMIT")
    try:
        with admin.connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {name}")
        yield make_url(server).set(database=name).render_as_string(hide_password=False)
        with admin.connect() as connection:
            connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        admin.dispose()


def shell(place: Path | str, statement: str) -> None:
    """Run SQL past the store, as a curious person with a database shell would."""
    url = f"sqlite:///{place / 'luthier.db'}" if isinstance(place, Path) else place
    engine = create_engine(url)
    try:
        with engine.begin() as connection:
            connection.exec_driver_sql(statement)
    finally:
        engine.dispose()
