"""kill -9 of workers at any moment: jobs go on from what was saved, and nothing is told or made twice."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from luthier import tuned
from luthier.jobs.records import ENDED, Job
from tests.jobs.place import World, chats, make_world, start, wait, working

pytestmark = pytest.mark.timeout(1200)  # many processes begin here, on a machine that may be busy
LONG = {"n_epochs": 15, "batch_size": 3}  # of 12 rows: 60 steps


def ask_for(world: World, seed: int) -> Job:
    return world.create(training_file=world.upload(chats(12)), hyperparameters=LONG, seed=seed)


def adapter(world: World, job: Job) -> str:
    release = world.queue.get(None, job.id).release
    assert release is not None
    return str(world.store.release(job.id, release).facts["train"])


def steps(world: World, job: Job) -> list[int]:
    return [event.data["step"] for event in world.events(job) if "train_loss" in event.data]


def holder(world: World, job: Job) -> int | None:
    """The process that carries the job out."""
    if not world.home.is_locked(f"job-{job.id}"):
        return None
    text = (world.home.locks / f"job-{job.id}.lock").read_text().strip()
    return int(text) if text.isdigit() else None


def kill(world: World, job: Job) -> None:
    pid = holder(world, job)
    if pid is not None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def whole(world: World, job: Job) -> None:
    """All is there, once, in order."""
    done = world.queue.get(None, job.id)
    assert done.status == "succeeded", done.error
    told = world.events(job)
    assert [event.number for event in told] == list(range(1, len(told) + 1))
    assert steps(world, job) == list(range(1, 61))
    assert told[-1].message == "The job has successfully completed"
    models = [one for one in tuned.listed(world.store, None) if one.job == job.id and one.step is None]
    assert [one.id for one in models] == [done.model]
    results, _ = world.uploads.list(done.tenant, purpose="fine-tune-results")
    assert [one.id for one in results if job.id in one.filename] == [done.result_file]
    assert done.lease is None and done.trained_tokens == (done.planned or {})["tokens"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The adapter of the same job where nothing happens to it."""
    world = make_world(tmp_path_factory.mktemp("undisturbed"))
    job = ask_for(world, 11)
    with working(world):
        world.until(job)
    return adapter(world, job)


def test_killed_paused_and_left_alone_it_ends_with_the_same_adapter(undisturbed: str, tmp_path: Path) -> None:
    world = make_world(tmp_path)
    job = ask_for(world, 11)
    with working(world) as worker:
        wait(lambda: len(steps(world, job)) >= 12)
        kill(world, job)  # its worker goes on with it
        wait(lambda: world.queue.get(None, job.id).attempts == 2)
        wait(lambda: len(steps(world, job)) >= 24)
        world.queue.pause(None, job.id)
        wait(lambda: world.queue.get(None, job.id).lease is None)
        seen = len(steps(world, job))
        assert world.queue.get(None, job.id).status == "paused"
        world.queue.resume(None, job.id)
        wait(lambda: len(steps(world, job)) > seen)
        worker.kill()  # and what it started stops by itself, saving
        worker.wait()
        wait(lambda: holder(world, job) is None)
        assert world.queue.get(None, job.id).status in ("queued", "succeeded")
    with working(world):
        world.until(job)
    whole(world, job)
    assert adapter(world, job) == undisturbed
    assert any("Resumed from step" in event.message for event in world.events(job))


VERBS = (("serve", "--port", "0", "--json"), ("work",))  # a server brings a worker of its own


def disturbed(world: World, jobs: list[Job], kills: int, seed: int) -> None:
    """A server with its worker, and a worker beside; now one of them, now what they started, dies."""
    draw = random.Random(seed)
    crew: list[subprocess.Popen[bytes]] = [start(world, *verb) for verb in VERBS]
    try:
        for _ in range(kills):
            time.sleep(draw.uniform(0.5, 6.0))
            if draw.random() < 0.4:
                one = draw.randrange(2)
                crew[one].kill()
                crew[one].wait()
                crew[one] = start(world, *VERBS[one])
            else:
                kill(world, draw.choice(jobs))
        wait(lambda: all(world.queue.get(None, job.id).status in ENDED for job in jobs), 600)
    finally:
        for process in crew:
            process.terminate()
        for process in crew:
            process.wait(60)


def test_a_server_two_workers_and_kills_at_random_moments_lose_nothing(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    jobs = [ask_for(world, seed) for seed in (1, 2)]
    disturbed(world, jobs, kills=4, seed=3)
    for job in jobs:
        whole(world, job)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_four_jobs_and_twenty_kills_lose_nothing(undisturbed: str, tmp_path: Path) -> None:
    world = make_world(tmp_path)
    jobs = [ask_for(world, seed) for seed in (11, 12, 13, 14)]
    disturbed(world, jobs, kills=20, seed=4)
    for job in jobs:
        whole(world, job)
    assert adapter(world, jobs[0]) == undisturbed
