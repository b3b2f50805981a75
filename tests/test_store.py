"""One suite for both databases: what the store is told it keeps, and a ref moves for exactly one mover."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy.exc import SQLAlchemyError

from luthier.errors import NotFound, StoreError
from luthier.store import ReleaseRecord, RequestRecord, StageRecord, Store
from tests import databases

A, B, C = "a" * 64, "b" * 64, "c" * 64


@pytest.fixture(params=databases.KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path | str]:
    with databases.fresh(request.param, tmp_path) as where:
        yield where


@pytest.fixture
def store(place: Path | str) -> Iterator[Store]:
    opened = Store.open(place)
    yield opened
    opened.close()


def with_releases(store: Store, *digests: str, name: str = "guard") -> str:
    run_id = store.begin_run(name, {}, {})
    for digest in digests:
        store.add_release(ReleaseRecord(digest, name, run_id, True, {}))
    return run_id


def move(store: Store, digest: str, expected: str | None, actor: str = "ada", reason: str = "better") -> None:
    store.move_ref("guard", "production", digest, expected=expected, actor=actor, reason=reason)


# ---- runs and stages ---------------------------------------------------------------------------------


def test_a_run_is_kept_with_its_recipe_host_and_outcome(store: Store) -> None:
    run_id = store.begin_run("guard", {"seed": 17, "data": {"x": [1, None, "é"]}}, {"cores": 2})
    begun = store.run(run_id)
    assert (begun.status, begun.ended_at, begun.release) == ("running", None, None)
    assert begun.recipe == {"seed": 17, "data": {"x": [1, None, "é"]}} and begun.host == {"cores": 2}
    store.end_run(run_id, "done", release=A)
    ended = store.run(run_id)
    assert (ended.status, ended.release, ended.error) == ("done", A, None)
    assert ended.ended_at is not None and ended.ended_at >= ended.started_at


def test_runs_come_newest_first_and_no_more_than_asked(store: Store) -> None:
    ids = [store.begin_run(f"run-{n}", {}, {}) for n in range(4)]
    assert [run.id for run in store.runs()] == ids[::-1]
    assert [run.id for run in store.runs(limit=2)] == ids[:1:-1]


def test_a_run_is_found_by_a_prefix_only_when_it_is_the_only_one(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = iter(["abc111111111", "abc222222222", "def333333333"])
    monkeypatch.setattr("secrets.token_hex", lambda size: next(names))
    for _ in range(3):
        store.begin_run("guard", {}, {})
    assert store.run("d").id == "def333333333"
    assert store.run("abc1").id == "abc111111111"
    with pytest.raises(NotFound, match=r"ambiguous.*abc222222222.*abc111111111"):
        store.run("abc")


@pytest.mark.parametrize("prefix", ["", "nope", "%", "_", "' OR 1=1 --"])
def test_an_unknown_prefix_finds_nothing(store: Store, prefix: str) -> None:
    with_releases(store, A)
    with pytest.raises(NotFound):
        store.run(prefix)
    with pytest.raises(NotFound):
        store.release(None, prefix)


def test_a_run_cannot_end_in_a_way_nobody_knows(store: Store) -> None:
    run_id = store.begin_run("guard", {}, {})
    with pytest.raises(StoreError):
        store.end_run(run_id, "splendid")
    assert store.run(run_id).status == "running"
    with pytest.raises(NotFound):
        store.end_run("000000000000", "done")


def test_stages_of_a_run_come_in_order_with_their_facts(store: Store) -> None:
    run_id, other = store.begin_run("guard", {}, {}), store.begin_run("guard", {}, {})
    records = [
        StageRecord(stage, f"key-{stage}", A, False, 1.5, {"rows": {"train": 3}})
        for stage in ("data", "model")
    ]
    for record in records:
        store.record_stage(run_id, record)
    store.record_stage(other, StageRecord("data", "key-data", A, True, 0.0, {}))
    assert [(s.stage, s.key, s.facts, s.run_id) for s in store.stages_of(run_id)] == [
        ("data", "key-data", {"rows": {"train": 3}}, run_id),
        ("model", "key-model", {"rows": {"train": 3}}, run_id),
    ]
    assert store.stages_of(run_id)[0].at == records[0].at and store.stages_of(run_id)[0].seconds == 1.5
    assert store.stages_of(other)[0].reused is True


def test_find_stage_gives_the_latest_that_was_worked_out_and_not_forgotten(store: Store) -> None:
    run_id = store.begin_run("guard", {}, {})
    assert store.find_stage("k") is None
    for digest, reused in ((A, False), (B, False), (C, True)):
        store.record_stage(run_id, StageRecord("data", "k", digest, reused, 0.1, {}))
    found = store.find_stage("k")
    assert found is not None and found.digest == B and found.run_id == run_id
    store.forget_stage("k")
    assert store.find_stage("k") is None
    assert len(store.stages_of(run_id)) == 3, "forgetting is not deleting"
    store.record_stage(run_id, StageRecord("data", "k", C, False, 0.1, {}))
    again = store.find_stage("k")
    assert again is not None and again.digest == C


def test_a_stage_of_an_unknown_run_is_refused(store: Store) -> None:
    with pytest.raises(StoreError, match="refused this row"):
        store.record_stage("nope", StageRecord("data", "k", A, False, 0.1, {}))
    assert store.find_stage("k") is None


def test_facts_that_are_not_json_are_refused_and_nothing_is_written(store: Store) -> None:
    for bad in (float("nan"), float("inf"), object()):
        with pytest.raises(StoreError, match="not JSON"):
            store.record_event("odd", {"loss": bad})
    assert store.events() == []


# ---- releases ------------------------------------------------------------------------------------------


def test_adding_a_release_twice_keeps_the_first_row(store: Store) -> None:
    run_id = with_releases(store, A)
    store.add_release(ReleaseRecord(A, "guard", run_id, False, {"second": True}))
    assert len(store.releases()) == 1 and store.release("guard", A).accepted is True


def test_a_release_is_found_by_prefix_within_its_name(store: Store) -> None:
    with_releases(store, A, B)
    with_releases(store, A, "a1" * 32, name="other")
    assert store.release("guard", "a").digest == A
    assert store.release(None, "b").name == "guard"
    assert store.release("other", A).name == "other"
    with pytest.raises(NotFound, match="ambiguous"):
        store.release("other", "a")
    with pytest.raises(NotFound, match="ambiguous"):
        store.release(None, A)  # two names have it
    with pytest.raises(NotFound):
        store.release("other", B)
    assert [r.digest for r in store.releases("guard")] == [B, A]
    assert store.names() == ["guard", "other"]


def test_a_release_of_an_unknown_run_is_refused_but_one_from_elsewhere_is_kept(store: Store) -> None:
    with pytest.raises(StoreError):
        store.add_release(ReleaseRecord(A, "guard", "nope", True, {}))
    store.add_release(ReleaseRecord(A, "guard", None, True, {}))
    assert store.release("guard", A).run_id is None


# ---- refs ----------------------------------------------------------------------------------------------


def test_promotion_and_rollback_are_one_row_each(store: Store) -> None:
    with_releases(store, A, B)
    assert store.resolve("guard", "production") is None
    for digest, expected in ((A, None), (B, A), (A, B)):
        move(store, digest, expected)
        assert store.resolve("guard", "production") == digest
    moves = store.history("guard", "production")
    assert [(m.digest, m.previous) for m in moves] == [(A, B), (B, A), (A, None)]
    assert moves[0].actor == "ada" and moves[0].reason == "better" and moves[0].at >= moves[1].at
    assert store.aliases("guard") == {"production": A}


def test_aliases_and_names_do_not_touch_each_other(store: Store) -> None:
    with_releases(store, A, B)
    with_releases(store, C, name="other")
    store.move_ref("guard", "staging", B, expected=None, actor="ada", reason="r")
    store.move_ref("guard", "production", A, expected=None, actor="ada", reason="r")
    store.move_ref("other", "production", C, expected=None, actor="ada", reason="r")
    assert store.aliases("guard") == {"production": A, "staging": B}
    assert store.aliases("other") == {"production": C} and store.aliases("nobody") == {}
    assert store.history("guard", "canary") == []


@pytest.mark.parametrize("expected", [None, B])
def test_a_move_from_the_wrong_place_is_refused_and_says_who_moved_it(
    store: Store, expected: str | None
) -> None:
    with_releases(store, A, B, C)
    move(store, A, None, actor="grace", reason="hot fix")
    with pytest.raises(StoreError, match=r"points at aaaaaaaaaaaa, not at .*; moved by grace at .*hot fix"):
        move(store, C, expected)
    assert store.resolve("guard", "production") == A and len(store.history("guard", "production")) == 1


def test_a_first_move_that_expects_something_is_refused(store: Store) -> None:
    with_releases(store, A, B)
    with pytest.raises(StoreError, match="points at nothing yet"):
        move(store, A, B)


def test_a_move_to_where_it_already_points_writes_no_row(store: Store) -> None:
    with_releases(store, A, B)
    move(store, A, None)
    again = store.move_ref("guard", "production", A, expected=A, actor="grace", reason="again")
    assert again.actor == "ada" and len(store.history("guard", "production")) == 1
    with pytest.raises(StoreError, match="not moved"):
        move(store, B, B)


def test_a_ref_cannot_point_at_a_release_that_is_not_there(store: Store) -> None:
    with_releases(store, A)
    with_releases(store, B, name="other")
    for digest in (C, B):
        with pytest.raises(NotFound, match="no release"):
            move(store, digest, None)
    assert store.history("guard", "production") == []


def test_refs_are_append_only_even_for_a_database_shell(place: Path | str, store: Store) -> None:
    with_releases(store, A, B)
    move(store, A, None)
    for statement in (f"UPDATE refs SET digest = '{B}'", "DELETE FROM refs"):
        with pytest.raises(SQLAlchemyError, match="append-only"):
            databases.shell(place, statement)
    assert store.resolve("guard", "production") == A


def test_of_eight_racing_threads_exactly_one_moves_the_ref(store: Store) -> None:
    expected: str | None = None
    for turn in range(1, 11):
        digests = [f"{turn * 8 + n:064x}" for n in range(8)]
        with_releases(store, *digests)
        won, lost = _race(store, digests, expected)
        assert len(won) == 1 and len(lost) == 7, (won, lost)
        assert all("was not moved" in str(error) for error in lost)
        assert store.resolve("guard", "production") == won[0]
        assert len(store.history("guard", "production")) == turn
        expected = won[0]


def _race(store: Store, digests: list[str], expected: str | None) -> tuple[list[str], list[StoreError]]:
    won: list[str] = []
    lost: list[StoreError] = []
    gate = threading.Barrier(8)

    def contend(digest: str) -> None:
        gate.wait()
        try:
            won.append(
                store.move_ref("guard", "production", digest, expected=expected, actor="t", reason="r").digest
            )
        except StoreError as error:
            lost.append(error)

    threads = [threading.Thread(target=contend, args=(digest,)) for digest in digests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return won, lost


def test_resolve_is_quick(store: Store) -> None:
    with_releases(store, A, B)
    last: str | None = None
    for digest in (A, B) * 20:
        move(store, digest, last)
        last = digest
    times = []
    for _ in range(200):
        begun = time.perf_counter()
        store.resolve("guard", "production")
        times.append(time.perf_counter() - begun)
    assert sorted(times)[100] < 0.01  # usually 0.25 ms on SQLite, 2 ms on PostgreSQL; the machine may be busy


# ---- events and requests -------------------------------------------------------------------------------


def test_events_come_oldest_first_and_by_run(store: Store) -> None:
    run_id = store.begin_run("guard", {}, {})
    store.record_event("served", {"port": 1})
    store.record_event("refused", {"gate": "floor"}, run_id)
    assert [event.kind for event in store.events()] == ["served", "refused"]
    assert [(event.facts, event.run_id) for event in store.events(run_id)] == [({"gate": "floor"}, run_id)]


def test_requests_are_kept_whole_and_found_by_release_and_time(store: Store) -> None:
    first = RequestRecord(
        "2026-01-01T00:00:00.000000+00:00", A, "guard@production", 200, 40, 2, 0.01, 0.02, None
    )
    second = RequestRecord(
        "2026-01-02T00:00:00.000000+00:00", B, "guard@production", 500, 9, 0, None, 0.5, "broke"
    )
    third = RequestRecord(
        "2026-01-03T00:00:00.000000+00:00", None, "nobody@production", 404, error="no such model"
    )
    for record in (first, second, third):
        store.log_request(record)
    assert store.requests() == [first, second, third]
    assert store.requests(release=B) == [second]
    assert store.requests(since=second.at) == [second, third]
    assert store.requests(release=A, since=second.at) == []


@pytest.mark.parametrize(
    "text", ["", "plain", 'it\'s "quoted"; DROP TABLE refs', "日本語 🎻", "line\nline\ttab", "\\u0000"]
)
def test_text_comes_back_as_it_went_in(store: Store, text: str) -> None:
    run_id = store.begin_run("guard", {text or "k": text}, {})
    store.end_run(run_id, "failed", error=text)
    assert store.run(run_id).error == text and store.run(run_id).recipe == {text or "k": text}


def test_text_that_no_database_can_hold_is_kept_readable(store: Store) -> None:
    run_id = store.begin_run("guard", {"odd": "\x00\ud800"}, {})
    store.end_run(run_id, "failed", error="bad byte \x00 and \ud800 here")
    assert store.run(run_id).error == "bad byte \ufffd and ? here"
    assert store.run(run_id).recipe == {"odd": "\x00\ud800"}


def test_eight_threads_write_at_once_and_every_row_is_there(store: Store) -> None:
    def write(writer: int) -> None:
        for n in range(20):
            store.record_event("tick", {"writer": writer, "n": n})

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen = {(event.facts["writer"], event.facts["n"]) for event in store.events()}
    assert len(store.events()) == 160 and len(seen) == 160
