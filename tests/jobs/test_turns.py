"""Whose job is next, how many a tenant may have, and how much of the disk their rows may take."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from luthier.jobs import examine
from luthier.jobs.queue import Queue
from luthier.jobs.records import Claim, Job
from luthier.jobs.turns import UNFINISHED, TooManyJobs
from luthier.store import Store
from luthier.uploads import Limits, Uploads
from tests import databases
from tests.jobs.place import TENANT, World, chats, jsonl, make_world
from tests.jobs.test_simulation import job


@pytest.fixture(params=databases.KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    with databases.fresh(request.param, tmp_path) as place:
        opened = Store.open(place)
        yield opened
        opened.close()


def of(tenant: str, name: str, status: str = "queued") -> Job:
    return replace(job(name), tenant=tenant, status=status)


def next_of(queue: Queue, host: str) -> Job:
    """What a free worker of this machine takes."""
    for one in queue.free(host):
        if queue.claim(Claim(one.id, f"token {one.id}", host, 60.0)):
            return one
    raise AssertionError("nothing is free")


def end(queue: Queue, one: Job, host: str) -> None:
    queue.fail(Claim(one.id, f"token {one.id}", host, 60.0), {"code": "x", "message": "x", "param": None})


def test_a_tenant_that_queues_many_does_not_keep_the_others_waiting(store: Store) -> None:
    clock = [1000.0]
    queue = Queue(store, lambda: clock[0])
    for n in range(6):
        queue.add(of("many", f"many-{n}"))
    queue.add(of("one", "one-0"))
    for n in range(2):
        queue.add(of("two", f"two-{n}"))
    taken = []
    for n in range(9):  # one worker, one job at a time
        clock[0] += 10
        got = next_of(queue, f"host{n}")
        taken.append(got.id)
        clock[0] += 10
        end(queue, got, f"host{n}")
    assert taken == ["many-0", "one-0", "two-0", "many-1", "two-1", "many-2", "many-3", "many-4", "many-5"]


def test_of_several_places_each_tenant_gets_one_before_any_gets_two(store: Store) -> None:
    queue = Queue(store)
    for n in range(4):
        queue.add(of("many", f"many-{n}"))
    running = [next_of(queue, f"host{n}").id for n in range(2)]
    assert running == ["many-0", "many-1"]  # nobody else wants the places
    queue.add(of("late", "late-0"))
    queue.add(of("late", "late-1"))
    order = [one.id for one in queue.free("elsewhere")]
    assert order == ["late-0", "late-1", "many-2", "many-3"]
    order = [one.id for one in queue.free("host0")]  # what this machine holds may turn out to be free
    assert order == ["late-0", "late-1", "many-0", "many-2", "many-3"]


def test_of_jobs_nobody_has_looked_at_each_tenants_oldest_is_looked_at_first(store: Store) -> None:
    queue = Queue(store)
    for name in ("many-0", "many-1", "one-0"):
        queue.add(of(name.split("-")[0], name, "validating_files"))
    assert [one.id for one in queue.unexamined()] == ["many-0", "one-0"]


def test_a_tenants_unfinished_jobs_are_counted_even_when_they_come_at_once(store: Store) -> None:
    queue = Queue(store)

    def add(n: int) -> bool:
        try:
            queue.add(of("many", f"many-{n}"), most=5)
        except TooManyJobs as refused:
            assert (refused.http_code, refused.code) == (429, "rate_limit_exceeded")
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(add, range(16))) == 5
    queue.add(of("other", "other-0"), most=5)
    queue.cancel("many", queue.page("many", None, 1)[0][0].id)
    assert add(99) and not add(100)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("turns"))


def test_a_job_too_many_is_refused_as_it_is_asked_for(world: World) -> None:
    file = world.upload(chats(), "busy")
    made = [world.create("busy", training_file=file) for _ in range(UNFINISHED)]
    with pytest.raises(TooManyJobs, match="32 fine-tuning jobs are unfinished"):
        world.create("busy", training_file=file)
    world.queue.cancel("busy", made[0].id)
    assert world.create("busy", training_file=file).status == "validating_files"


def test_the_rows_of_a_tenants_jobs_fit_into_its_room(world: World) -> None:
    data = [jsonl(chats(400, f"{n} é")) for n in range(3)]
    room = Uploads(
        world.store, world.home, Limits(tenant_bytes=sum(map(len, data)) + int(1.5 * len(data[0])))
    )
    here = World(world.home, world.store, room, world.queue)
    jobs = [here.create(training_file=here.upload(one)) for one in data]
    for one in jobs:
        examine.examine(one, here.queue, (here.store, here.uploads, here.home))
    states = [here.queue.get(None, one.id) for one in jobs]
    assert [one.status for one in states] == ["queued", "failed", "failed"]
    assert states[1].error and states[1].error["code"] == "storage_quota_exceeded"
    held = sum(path.stat().st_size for path in (world.home.path / "jobs" / "rows").iterdir())
    assert held <= int(1.5 * len(data[0]))
    rows = examine.rows_path(here.home, jobs[0], jobs[0].training_sha256)
    rows.unlink()
    full = Uploads(world.store, world.home, Limits(tenant_bytes=1))
    examine.restore(jobs[0], full, here.home)  # another machine's worker: it was let in once
    assert rows.exists()
    same = here.create(training_file=jobs[0].training_file)  # the same rows are no more rows
    examine.examine(same, here.queue, (here.store, here.uploads, here.home))
    assert here.queue.get(TENANT, same.id).status == "queued"
    for one in (jobs[0], same):
        here.queue.cancel(TENANT, one.id)
        examine.forget(here.queue.get(None, one.id), here.queue, here.home)
    assert not os.listdir(world.home.path / "jobs" / "rows")
