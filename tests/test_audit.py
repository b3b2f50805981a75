"""Deeds and their entries in the audit log are one commit, whoever does them."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import String, insert

from luthier import audit, owners
from luthier.errors import NotFound, StoreError
from luthier.schema.jobs import JOBS
from luthier.serving import verbs
from luthier.serving.splits import Action, Kind
from luthier.store import ReleaseRecord, Store
from tests import databases

A, B = "a" * 64, "b" * 64


@pytest.fixture(params=databases.KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    with databases.fresh(request.param, tmp_path) as where:
        opened = Store.open(where)
        for digest in (A, B):
            opened.add_release(ReleaseRecord(digest, "guard", None, True, {}))
        yield opened
        opened.close()


def test_every_move_of_an_alias_is_told_with_who_from_and_to(store: Store) -> None:
    store.move_ref("guard", "production", A, expected=None, actor="pipeline:1", reason="all gates passed")
    verbs.begin(store, "guard", Kind.CANARY, B, 10, "cli:ada")
    verbs.end(store, "guard", Kind.CANARY, Action.FINISH, "cli:ada")
    found = list(audit.entries(store))
    assert [(entry.action, entry.target, entry.actor) for entry in found] == [
        ("move alias", "guard@production", "pipeline:1"),
        ("canary begin", "guard", "cli:ada"),
        ("move alias", "guard@production", "cli:ada"),
        ("canary finish", "guard", "cli:ada"),
    ]
    assert found[0].facts == {"from": None, "to": A, "reason": "all gates passed"}
    assert found[2].facts == {"from": A, "to": B, "reason": "canary finished"}
    assert audit.verify(store)["entries"] == 4


def test_a_move_of_a_jobs_alias_is_told_as_its_owners(store: Store) -> None:
    job = {column.name: 0 for column in JOBS.c if column.name != "seq"} | {
        column.name: column.name for column in JOBS.c if isinstance(column.type, String)
    }
    with store.writing() as connection:
        connection.execute(insert(JOBS), job | {"id": "ftjob-1", "tenant": "acme", "status": "succeeded"})
    for name in ("ftjob-1", "ftjob-2"):
        store.add_release(ReleaseRecord(A, name, None, True, {}))
        store.move_ref(name, "staging", A, expected=None, actor="worker", reason="")
    assert [(entry.target, entry.tenant) for entry in audit.entries(store)] == [
        ("ftjob-1@staging", "acme"),
        ("ftjob-2@staging", ""),
    ]


def test_a_move_that_did_not_happen_is_not_told(store: Store) -> None:
    store.move_ref("guard", "production", A, expected=None, actor="a", reason="")
    store.move_ref("guard", "production", A, expected=A, actor="a", reason="it stands there already")
    with pytest.raises(StoreError, match="was not moved"):
        store.move_ref("guard", "production", B, expected=None, actor="b", reason="")
    with pytest.raises(NotFound, match="no release"):
        store.move_ref("guard", "production", "c" * 64, expected=A, actor="b", reason="")
    assert audit.verify(store)["entries"] == 1


def test_what_cannot_be_told_is_not_done(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    store.add_release(ReleaseRecord(A, "guard", None, True, {}))
    database = sqlite3.connect(tmp_path / "luthier.db")
    database.execute(
        "CREATE TRIGGER full BEFORE INSERT ON audit BEGIN SELECT RAISE(ABORT, 'the log takes nothing'); END"
    )
    with pytest.raises(StoreError):
        store.move_ref("guard", "production", A, expected=None, actor="a", reason="")
    with pytest.raises(StoreError, match="takes nothing"):
        owners.share(store, "guard", actor="a")
    assert store.resolve("guard", "production") is None and not owners.shared(store)
    database.execute("DROP TRIGGER full")
    database.close()
    store.move_ref("guard", "production", A, expected=None, actor="a", reason="")
    assert audit.verify(store)["entries"] == 1
    store.close()


def test_sharing_shadows_and_their_end_are_told(store: Store) -> None:
    store.move_ref("guard", "production", A, expected=None, actor="a", reason="")
    owners.share(store, "guard", actor="cli:ada")
    owners.share(store, "guard", actor="cli:ada", on=False)
    verbs.begin(store, "guard", Kind.SHADOW, B, 20, "cli:ada")
    verbs.end(store, "guard", Kind.SHADOW, Action.STOP, "cli:ada")
    actions = [entry.action for entry in audit.entries(store, after=1)]
    assert actions == ["share", "share off", "shadow begin", "shadow stop"]
    assert audit.verify(store)["entries"] == 5
