"""Opening a store: migrations once, old rows kept, and a clear word where there is no store to be had."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import inspect

from luthier.errors import StoreError
from luthier.schema import MIGRATIONS
from luthier.schema.core import METADATA, Migration
from luthier.store import ReleaseRecord, Store
from tests import databases


@pytest.fixture(params=databases.KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path | str]:
    with databases.fresh(request.param, tmp_path) as where:
        yield where


def test_rows_outlive_the_store_that_wrote_them(place: Path | str) -> None:
    first = Store.open(place)
    first.add_release(ReleaseRecord("a" * 64, "guard", None, True, {}))
    first.move_ref("guard", "production", "a" * 64, expected=None, actor="ada", reason="better")
    first.close()
    second = Store.open(place)
    assert second.resolve("guard", "production") == "a" * 64
    second.close()


def test_the_tables_that_queries_know_are_those_that_migrations_make(place: Path | str) -> None:
    store = Store.open(place)
    real = inspect(store._engine)
    assert set(real.get_table_names()) == set(METADATA.tables)
    for name, table in METADATA.tables.items():
        assert [column["name"] for column in real.get_columns(name)] == [
            column.name for column in table.columns
        ]


def test_migrations_stand_in_the_order_of_their_numbers() -> None:
    numbers = [step.number for step in MIGRATIONS]
    assert numbers == sorted(set(numbers)) and numbers[0] == 1


def test_a_step_that_came_late_is_taken_by_a_home_that_has_gone_further(
    place: Path | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = Migration(MIGRATIONS[-1].number + 1, "late", ("CREATE TABLE late (n INTEGER)",))
    last = Migration(late.number + 1, "last", ("CREATE TABLE last_one (n INTEGER)",))
    for steps in ((*MIGRATIONS, last), (*MIGRATIONS, late, last)):
        monkeypatch.setattr("luthier.store_engine.MIGRATIONS", steps)
        Store.open(place).close()
    store = Store.open(place)
    assert {"late", "last_one"} <= set(inspect(store._engine).get_table_names())
    store.close()


def test_a_newer_schema_is_refused_and_left_as_it_is(place: Path | str) -> None:
    Store.open(place).close()
    databases.shell(place, "INSERT INTO schema_versions VALUES (99, 'from the future', '2030-01-01')")
    for _ in range(2):
        with pytest.raises(StoreError, match=r"schema 99.*knows schemas up to \d+[\s\S]*upgrade luthier"):
            Store.open(place)


def test_a_file_that_is_no_database_is_named_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "luthier.db").write_text("dear diary, " * 100)
    with pytest.raises(StoreError, match=r"luthier\.db.*not a database[\s\S]*restore a copy"):
        Store.open(tmp_path)
    assert (tmp_path / "luthier.db").read_text().startswith("dear diary")


@pytest.mark.parametrize(
    "url", ["mysql://u:hunter2@h/d", "sqlite://", "sqlite:///:memory:", "://hunter2", "no such://hunter2"]
)
def test_a_url_that_cannot_be_a_store_is_refused_without_showing_its_password(url: str) -> None:
    with pytest.raises(StoreError) as caught:
        Store.open(url)
    assert "hunter2" not in str(caught.value)


def test_an_unreachable_server_is_a_clear_error_without_the_password() -> None:
    pytest.importorskip("pg8000")
    with pytest.raises(StoreError, match=r"is the database server running") as caught:
        Store.open("postgresql://luthier:hunter2@127.0.0.1:9/none")
    assert "hunter2" not in str(caught.value)


def test_sqlite_is_opened_so_that_a_commit_is_on_disk(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    with store._engine.connect() as connection:
        settings = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        }
    store.close()
    assert settings == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}
    assert sqlite3.connect(tmp_path / "luthier.db").execute("PRAGMA integrity_check").fetchone() == ("ok",)
