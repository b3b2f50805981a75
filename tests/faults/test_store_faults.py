"""The store under kill -9, a full disk, and many processes at once: what was acknowledged is never lost."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from luthier import audit
from luthier.errors import StoreError
from luthier.store import ReleaseRecord, Store
from tests import databases
from tests.faults import small_disk

SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture(params=databases.KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path | str]:
    with databases.fresh(request.param, tmp_path) as where:
        yield where


WRITER = """
import json, sys
from pathlib import Path
from luthier.store import ReleaseRecord, RequestRecord, StageRecord, Store, now
place, life = json.loads(sys.argv[1])
store = Store.open(place)
current = store.resolve("guard", "production")
for n in range(100_000):
    run_id = store.begin_run("guard", {"n": n}, {})
    print("run", run_id, flush=True)
    store.record_stage(run_id, StageRecord("data", f"{life}-{n}", "d", False, 0.1, {"text": "x" * 2000}))
    print("stage", f"{life}-{n}", flush=True)
    digest = f"{life * 1_000_000 + n:064x}"
    store.add_release(ReleaseRecord(digest, "guard", run_id, True, {}))
    store.move_ref("guard", "production", digest, expected=current, actor="child", reason="test")
    current = digest
    print("ref", digest, flush=True)
    store.log_request(RequestRecord(now(), digest, f"{life}-{n}", 200))
    print("request", f"{life}-{n}", flush=True)
"""


def test_kill_nine_at_random_moments_loses_no_acknowledged_row(place: Path | str) -> None:
    acknowledged: list[tuple[str, str]] = []
    moment = random.Random(17)
    for life in range(5):
        argument = json.dumps([str(place), life])
        child = subprocess.Popen([sys.executable, "-c", WRITER, argument], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        first = child.stdout.readline()  # it is open and at work
        time.sleep(moment.uniform(0.0, 0.6))
        child.send_signal(signal.SIGKILL)
        lines = (first + child.stdout.read()).splitlines(keepends=True)
        child.wait()
        acknowledged += [tuple(line.split()) for line in lines if line.endswith("\n")]  # type: ignore[misc]
        _all_are_there(place, acknowledged)
    assert len(acknowledged) > 20


def _all_are_there(place: Path | str, acknowledged: list[tuple[str, str]]) -> None:
    store = Store.open(place)
    there = {("run", run.id) for run in store.runs(limit=10**6)}
    there |= {("stage", stage.key) for run in store.runs(limit=10**6) for stage in store.stages_of(run.id)}
    there |= {("request", request.model) for request in store.requests()}
    moves = store.history("guard", "production")
    there |= {("ref", move.digest) for move in moves}
    told = [entry.facts["to"] for entry in audit.entries(store)]
    assert told == [move.digest for move in reversed(moves)], "a move and its entry are one"
    assert audit.verify(store)["entries"] == len(moves)
    store.close()
    assert set(acknowledged) <= there
    assert [move.previous for move in moves] == [*(move.digest for move in moves[1:]), None], (
        "the chain is whole"
    )


OPENER = """
import sys
from pathlib import Path
from luthier.store import Store
for n in range(100_000):
    Store.open(Path(sys.argv[1]) / str(n)).close()
    print(n, flush=True)
"""


def test_kill_nine_while_a_home_is_being_made_leaves_a_home_that_opens(tmp_path: Path) -> None:
    moment = random.Random(17)
    for life in range(6):
        folder = tmp_path / str(life)
        child = subprocess.Popen(
            [sys.executable, "-c", OPENER, str(folder)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(moment.uniform(0.0, 0.1))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        for home in folder.iterdir():
            store = Store.open(home)
            store.begin_run("guard", {}, {})
            store.close()


def _open_all(places: list[Path | str], gate: object, answers: object) -> None:
    for place in places:
        gate.wait()  # type: ignore[attr-defined]
        try:
            store = Store.open(place)
            answers.put(store.begin_run("guard", {}, {}))  # type: ignore[attr-defined]
            store.close()
        except Exception as error:
            answers.put(error)  # type: ignore[attr-defined]


def test_four_processes_open_a_fresh_home_at_once_and_all_succeed(place: Path | str) -> None:
    places = [place / str(n) for n in range(20)] if isinstance(place, Path) else [place]
    gate, answers = SPAWN.Barrier(4), SPAWN.Queue()
    children = [SPAWN.Process(target=_open_all, args=(places, gate, answers)) for _ in range(4)]
    for child in children:
        child.start()
    given = [answers.get(timeout=60) for _ in children for _ in places]
    for child in children:
        child.join()
    assert all(isinstance(answer, str) for answer in given), given
    for home in places:
        store = Store.open(home)
        assert {run.id for run in store.runs()} <= set(given) and len(store.runs()) == 4
        store.close()


def _contend(place: Path | str, racer: int, gate: object, answers: object) -> None:
    store = Store.open(place)
    expected: str | None = None
    for turn in range(10):
        digest = f"{turn * 8 + racer:064x}"
        gate.wait()  # type: ignore[attr-defined]
        try:
            store.move_ref("guard", "production", digest, expected=expected, actor=str(racer), reason="race")
            answers.put((turn, racer, "won"))  # type: ignore[attr-defined]
        except StoreError as error:
            answers.put((turn, racer, "lost" if "was not moved" in str(error) else str(error)))  # type: ignore[attr-defined]
        gate.wait()  # type: ignore[attr-defined]
        expected = store.resolve("guard", "production")


def test_of_eight_racing_processes_exactly_one_moves_the_ref(place: Path | str) -> None:
    store = Store.open(place)
    for n in range(80):
        store.add_release(ReleaseRecord(f"{n:064x}", "guard", None, True, {}))
    gate, answers = SPAWN.Barrier(8), SPAWN.Queue()
    children = [SPAWN.Process(target=_contend, args=(place, racer, gate, answers)) for racer in range(8)]
    for child in children:
        child.start()
    given = [answers.get(timeout=120) for _ in range(80)]
    for child in children:
        child.join()
    won = {turn: racer for turn, racer, outcome in given if outcome == "won"}
    assert sorted(outcome for _, _, outcome in given) == ["lost"] * 70 + ["won"] * 10, given
    moves = store.history("guard", "production")[::-1]
    assert [move.actor for move in moves] == [str(won[turn]) for turn in range(10)]
    store.close()


def test_a_full_disk_is_named_and_costs_no_row(tmp_path: Path) -> None:
    with small_disk.mounted(tmp_path / "disk", size_kb=1024) as disk:
        store = Store.open(disk / "home")
        run_id = store.begin_run("guard", {}, {})
        kept = 0
        with pytest.raises(StoreError, match=r"disk is full[\s\S]*free some space"):
            for kept in range(10_000):
                store.record_event("fill", {"n": kept, "text": "x" * 4000}, run_id)
        assert kept > 10
        assert [event.facts["n"] for event in store.events()] == list(range(kept))
        store.close()
        subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
        again = Store.open(disk / "home")
        again.record_event("fill", {"n": kept}, run_id)
        assert [event.facts["n"] for event in again.events()] == list(range(kept + 1))
        again.close()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_home_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="cannot make the home folder"):
        Store.open(tmp_path / "home")


def test_a_home_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("not a folder")
    with pytest.raises(StoreError, match="cannot make the home folder"):
        Store.open(tmp_path / "home")
