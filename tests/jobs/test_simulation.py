"""The queue on a clock of its own: workers that crash, stall and race, owners that change their minds.

Each seed is one history; a failure names it and it can be played again. What must hold after every step:
events have no holes, a step is told once and in order, an ended job never changes, a model is made once.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from luthier import tuned
from luthier.errors import DataError
from luthier.jobs.queue import Queue
from luthier.jobs.records import ENDED, Claim, Job, Note, Won
from luthier.store import Store
from luthier.tuned import Tuned

STEPS = 4
LEASE_S = 10.0
JOBS = 3
WORKERS = 3
ACTS = 60


@dataclass
class Worker:
    """One that may die or stand still anywhere between two of its acts."""

    name: str
    claim: Claim | None = None
    step: int = 0
    unsaved: int = 0
    turn: int = 0


@dataclass
class Play:
    """One history: the queue, its clock, and what the disk has of each job (`saved`: the last step)."""

    queue: Queue
    store: Store
    jobs: list[str]
    draw: random.Random
    clock: list[float]
    saved: dict[str, int]
    workers: list[Worker]
    ended: dict[str, tuple[str, int]] = field(default_factory=dict)
    holder: dict[str, str] = field(default_factory=dict)

    def act(self) -> None:
        worker, job = self.draw.choice(self.workers), self.draw.choice(self.jobs)
        acts = (self.work, self.work, self.work, self.work, self.crash, self.stall, self.owner)
        self.draw.choice(acts)(worker, job)
        self.look()

    def work(self, worker: Worker, job: str) -> None:
        if worker.claim is None:
            worker.turn += 1
            claim = Claim(job, f"{worker.name}-{worker.turn}", worker.name, LEASE_S)
            if self.queue.claim(claim):
                worker.claim, worker.step, worker.unsaved = claim, self.saved[job], 0
                self.holder[job] = claim.token
            return
        if worker.unsaved:  # told first, saved then: what is saved was told
            self.saved[worker.claim.job] = max(self.saved[worker.claim.job], worker.unsaved)
            worker.unsaved = 0
        elif worker.step < STEPS:
            self.train(worker, worker.claim)
        else:
            self.win(worker.claim)
            worker.claim = None

    def train(self, worker: Worker, claim: Claim) -> None:
        worker.step += 1
        mine = self.queue.note(claim, Note(f"step {worker.step}", f"step:{worker.step}"))
        assert not mine or self.holder[claim.job] == claim.token  # nobody claimed it since
        job = self.queue.get(None, claim.job)
        if mine:
            worker.unsaved = worker.step
        else:  # paused, cancelled or another's: what it still holds of it, it may save
            if job.lease == claim.token:
                self.saved[claim.job] = max(self.saved[claim.job], worker.step)
            self.queue.release(claim)
            worker.claim = None

    def win(self, claim: Claim) -> None:
        model = Tuned(f"ft:{claim.job}", "t", claim.job, "base", claim.job, "r")
        won = Won([model], [], "r", 1, "file")
        mine = self.queue.win(claim, won, Note("model", "model"), Note("done", "done"))
        assert not mine or self.holder[claim.job] == claim.token

    def crash(self, worker: Worker, job: str) -> None:
        worker.claim = None

    def stall(self, worker: Worker, job: str) -> None:
        self.clock[0] += self.draw.choice((0.1, 1.0, LEASE_S * 1.5))
        if worker.claim is not None and not self.queue.renew(worker.claim, 0):
            self.queue.release(worker.claim)
            worker.claim = None

    def owner(self, worker: Worker, job: str) -> None:
        moves = (self.queue.pause, self.queue.resume, self.queue.resume, self.queue.cancel)
        verb = self.draw.choices(moves, (4, 4, 4, 1))[0]
        try:
            verb(None, job)
        except DataError as refusal:
            assert "Cannot" in refusal.what

    def look(self) -> None:
        for name in self.jobs:
            job = self.queue.get(None, name)
            told, _ = self.queue.events(name, None, 1000, newest=False)
            assert [event.number for event in told] == list(range(1, job.events + 1))
            steps = [int(event.message[5:]) for event in told if event.message.startswith("step ")]
            assert steps == list(range(1, len(steps) + 1))
            if name in self.ended:
                assert self.ended[name] == (job.status, job.events)
            elif job.status in ENDED:
                self.ended[name] = (job.status, job.events)
            models = [one.id for one in tuned.listed(self.store, None) if one.job == name]
            assert models == ([f"ft:{name}"] if job.status == "succeeded" else [])

    def finish(self) -> None:
        """Somebody patient comes last: every job ends, and those that were not cancelled end well."""
        worker = Worker("patient")
        for name in self.jobs:
            if self.queue.get(None, name).status == "paused":
                self.queue.resume(None, name)
            self.clock[0] += 2 * LEASE_S
            for _ in range(3 * STEPS + 3):
                if self.queue.get(None, name).status not in ENDED:
                    self.work(worker, name)
                    self.look()
            worker.claim = None
            assert self.queue.get(None, name).status in ("succeeded", "cancelled")


def job(name: str) -> Job:
    return Job(
        id=name, tenant="t", base="base", model=f"ft:{name}", status="queued", asked={}, section={}, seed=0,
        training_file="file", training_sha256="0", validation_file=None, validation_sha256=None, created_at=0,
    )  # fmt: skip


def play(store: Store, seed: int) -> None:
    clock = [1000.0]
    queue = Queue(store, lambda: clock[0])
    names = [f"job-{seed}-{n}" for n in range(JOBS)]
    for name in names:
        queue.add(job(name))
    workers = [Worker(f"w{n}") for n in range(WORKERS)]
    history = Play(queue, store, names, random.Random(seed), clock, dict.fromkeys(names, 0), workers)
    for _ in range(ACTS):
        history.act()
    history.finish()


@pytest.mark.parametrize("first", [0, 20])
def test_no_history_of_crashes_stalls_and_changed_minds_breaks_the_queue(first: int, tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    for seed in range(first, first + 20):
        play(store, seed)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_two_thousand_histories_break_nothing(tmp_path: Path) -> None:
    for seed in range(2000):
        store = Store.open(tmp_path / str(seed // 100))
        play(store, seed)
        store.close()
