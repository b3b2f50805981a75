"""Keys, budgets and the audit log, straight on the store."""

from __future__ import annotations

import json
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from luthier import audit, budgets, keys
from luthier.cli import app
from luthier.errors import NotFound, RecipeError, StoreError
from luthier.http import quota
from luthier.keys import Budget, Caller, Scope
from luthier.store import Store

NOON_S = 1_800_000_000.0


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path)


def test_a_key_is_recognised_by_its_secret_alone_and_the_store_holds_none(
    store: Store, tmp_path: Path
) -> None:
    key, secret = keys.create(store, "acme", [Scope.INFER, Scope.READ], origin=keys.Origin("ci"))
    found = keys.recognise(store, secret.encode())
    assert found == key and key.caller == Caller(key.id, "acme", frozenset({Scope.INFER, Scope.READ}))
    assert keys.recognise(store, secret[:-1].encode()) is None
    store.close()
    assert all(secret.encode() not in path.read_bytes() for path in tmp_path.iterdir() if path.is_file())


def test_a_revoked_or_expired_key_says_so(store: Store) -> None:
    key, secret = keys.create(store, "acme", [Scope.INFER])
    assert key.state == "active" and keys.revoke(store, key.id).state == "revoked"
    late, _ = keys.create(store, "acme", [Scope.INFER], lives=timedelta(seconds=-1))
    assert late.state == "expired"
    found = keys.recognise(store, secret.encode())
    assert found is not None and found.state == "revoked"
    with pytest.raises(NotFound):
        keys.revoke(store, "key-none")


def test_admin_implies_every_scope_and_only_the_servers_own_admin_is_its_operator() -> None:
    admin = Caller("k", "acme", frozenset({Scope.ADMIN}))
    assert all(admin.may([scope]) for scope in Scope) and not admin.operator
    assert Caller("k", keys.LOCAL, frozenset({Scope.ADMIN})).operator
    assert not Caller("k", "acme", frozenset({Scope.READ})).may([Scope.TRAIN])


@pytest.mark.parametrize("tenant", ["", "Acme", "../up", "a b", "x" * 60])
def test_what_cannot_be_a_tenant_is_refused(tenant: str, store: Store) -> None:
    with pytest.raises(RecipeError):
        keys.create(store, tenant, [Scope.READ])


@given(st.integers(1, 50), st.lists(st.floats(0, 30), min_size=1, max_size=80))
@settings(max_examples=25, deadline=None)
def test_no_minute_holds_more_requests_than_the_budget_and_a_half_open_one_fits(
    limit: int, pauses: list[float]
) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        store = Store.open(Path(folder))
        key, _ = keys.create(store, "acme", [Scope.INFER], budget=Budget(requests_per_minute=limit))
        moment, taken = NOON_S, []
        for pause in pauses:
            moment += pause
            found = budgets.take(store, key, moment)
            if not found.retry_after_s:
                taken.append(moment)
            else:
                again = budgets.take(store, key, moment + found.retry_after_s)
                assert not again.retry_after_s  # what it said to wait is enough
                moment += found.retry_after_s
                taken.append(moment)
        for start in taken:  # a minute's worth at once, and what flowed in meanwhile
            assert sum(start <= at < start + 60 for at in taken) <= 2 * limit
        store.close()


def test_a_minutes_worth_may_come_at_once_and_not_one_more(store: Store) -> None:
    key, _ = keys.create(store, "acme", [Scope.INFER], budget=Budget(requests_per_minute=5))
    found = [budgets.take(store, key, NOON_S) for _ in range(6)]
    assert [one.left_requests for one in found] == [4, 3, 2, 1, 0, 0]
    assert [bool(one.retry_after_s) for one in found] == [False] * 5 + [True]
    assert found[-1].retry_after_s == 12 and found[-1].of == "requests per minute"


def test_racing_requests_do_not_share_one_place(store: Store) -> None:
    key, _ = keys.create(store, "acme", [Scope.INFER], budget=Budget(requests_per_minute=20))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: budgets.take(store, key, NOON_S), range(60)))
    assert sum(not one.retry_after_s for one in found) == 20


def test_a_days_tokens_are_counted_by_all_servers_and_end_with_the_day(store: Store, tmp_path: Path) -> None:
    key, _ = keys.create(store, "acme", [Scope.INFER], budget=Budget(tokens_per_day=100))
    other = Store.open(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: budgets.spend((store, other)[n % 2], key.id, 5, NOON_S), range(20)))
    found = budgets.take(other, key, NOON_S)
    assert found.left_tokens == 0 and found.of == "tokens per day"
    assert not budgets.take(store, key, NOON_S + found.retry_after_s).retry_after_s


def test_a_months_tokens_are_the_sum_of_its_days_and_end_with_the_month(store: Store) -> None:
    key, _ = keys.create(store, "acme", [Scope.INFER], budget=Budget(tokens_per_day=80, tokens_per_month=100))
    last = datetime(2027, 1, 31, 23, 0, tzinfo=UTC).timestamp()
    budgets.spend(store, key.id, 70, last - 20 * 86400)
    found = budgets.take(store, key, last)
    assert (found.limit_tokens, found.left_tokens, found.reset_tokens_s) == (100, 30, 3600.0)
    budgets.spend(store, key.id, 50, last - 86400)
    refused = budgets.take(store, key, last)
    assert (refused.of, refused.left_tokens, refused.retry_after_s) == ("tokens per month", 0, 3600)
    assert not budgets.take(store, key, last, spends=False).retry_after_s  # to look costs no tokens
    budgets.spend(store, key.id, 80, last - 86400)
    assert budgets.take(store, key, last - 86400).of == "tokens per month"  # the one that lasts longer
    found = budgets.take(store, key, last + 3600)
    assert (found.retry_after_s, found.limit_tokens, found.left_tokens) == (0, 80, 80)
    assert budgets.spent_this_month(store, key.id, last) == 200


def test_when_all_of_a_minute_is_there_again_is_told(store: Store) -> None:
    key, _ = keys.create(store, "acme", [Scope.INFER], budget=Budget(requests_per_minute=6))
    found = [budgets.take(store, key, NOON_S + 5) for _ in range(7)]
    assert [round(one.reset_requests_s or 0) for one in found] == [10, 20, 30, 40, 50, 60, 60]
    later = budgets.take(store, key, NOON_S + 5 + 60)
    assert later.left_requests == 5 and round(later.reset_requests_s or 0) == 10


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0s"),
        (0.02, "20ms"),
        (1, "1s"),
        (1.5, "1.5s"),
        (360, "6m0s"),
        (62703, "17h25m3s"),
        (7200, "2h0m0s"),
    ],
)
def test_times_are_told_as_openai_tells_them(seconds: float, said: str) -> None:
    assert quota.duration(seconds) == said


def test_a_whole_log_verifies_and_keeps_its_order(store: Store) -> None:
    with ThreadPoolExecutor(6) as pool:
        list(
            pool.map(
                lambda n: audit.note(store, "test", str(n), actor="a", tenant="t", facts={"n": n}), range(30)
            )
        )
    found = list(audit.entries(store))
    assert [entry.seq for entry in found] == list(range(1, 31))
    assert audit.verify(store) == {"entries": 30, "head": found[-1].hash}
    assert [entry.seq for entry in audit.entries(store, after=28)] == [29, 30]


def tampered(folder: Path, statement: str) -> Store:
    """Somebody with the file in their hands takes the triggers away first."""
    database = sqlite3.connect(folder / "luthier.db")
    for verb in ("update", "delete"):
        database.execute(f"DROP TRIGGER audit_no_{verb}")
    database.executescript(statement)
    database.commit()
    database.close()
    return Store.open(folder)


CHANGES = {
    "changed": "UPDATE audit SET facts = '{\"n\":99}' WHERE seq = 4",
    "actor changed": "UPDATE audit SET actor = 'b' WHERE seq = 4",
    "removed": "DELETE FROM audit WHERE seq = 4",
    "first removed": "DELETE FROM audit WHERE seq = 1",
    "tail cut off": "DELETE FROM audit WHERE seq > 6",
    "all removed": "DELETE FROM audit",
    "two exchanged": "UPDATE audit SET seq = 99 WHERE seq = 4; UPDATE audit SET seq = 4 WHERE seq = 5; "
    "UPDATE audit SET seq = 5 WHERE seq = 99",
    "inserted": "INSERT INTO audit SELECT 9, at, actor, tenant, action, target, facts, hash, 'f' || hash "
    "FROM audit WHERE seq = 8",
}


@pytest.mark.parametrize("statement", CHANGES.values(), ids=CHANGES.keys())
def test_every_way_to_touch_the_log_is_found_out(statement: str, store: Store, tmp_path: Path) -> None:
    for n in range(8):
        audit.note(store, "test", str(n), actor="a", tenant="t", facts={"n": n})
    store.close()
    with pytest.raises(StoreError, match="audit log is broken at entry"):
        audit.verify(tampered(tmp_path, statement))


def test_a_cut_tail_is_found_out_even_after_the_log_has_grown_past_it(store: Store, tmp_path: Path) -> None:
    for n in range(10):
        audit.note(store, "test", str(n), actor="a", tenant="t")
    store.close()
    cut = tampered(tmp_path, "DELETE FROM audit WHERE seq > 5")
    for n in range(8):
        audit.note(cut, "later", str(n), actor="a", tenant="t")
    with pytest.raises(StoreError, match="cut off"):
        audit.verify(cut)


@pytest.mark.parametrize("statement", ["UPDATE audit SET actor = 'b'", "DELETE FROM audit"])
def test_the_database_itself_refuses_to_change_the_log(statement: str, store: Store, tmp_path: Path) -> None:
    audit.note(store, "test", "x", actor="a", tenant="t")
    database: Any = sqlite3.connect(tmp_path / "luthier.db")
    with pytest.raises(sqlite3.Error, match="append-only"):
        database.execute(statement)
    database.close()


def test_a_misspelt_scope_is_answered_with_the_nearest_right_one(tmp_path: Path) -> None:
    asked = ["keys", "create", "--scopes", "trian", "--home", str(tmp_path), "--json"]
    found = CliRunner().invoke(app, asked)
    assert found.exit_code == RecipeError.exit_code
    assert "did you mean 'train'?" in json.loads(found.stdout)["error"]["what"], found.output
