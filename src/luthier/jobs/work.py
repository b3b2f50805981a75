"""`luthier work`: looks at new jobs' files and starts a process for each job that may begin.

It holds no lease itself, so it may be killed at any time: its children hold theirs and stop when it is gone,
saving what they trained. Several may work on one database, on one machine or many. It loads no tensors; a
child is `luthier.jobs.child`, niced below serving. What a child says goes to `home/jobs/logs/`.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from luthier.errors import StoreError
from luthier.home import Home
from luthier.jobs import examine
from luthier.jobs.queue import Queue
from luthier.jobs.records import Job
from luthier.jobs.spec import Terms
from luthier.store import Store
from luthier.uploads import Uploads

BEAT_S = 0.5
LEASE_S = 30.0
GRACE_S = 60.0
REST_S = 2.0  # before a worker that died is replaced


@dataclass(frozen=True)
class Crew:
    """How many jobs at a time, how long a lease holds, on what terms; `parent`: work only while it lives."""

    terms: Terms
    jobs: int = 1
    lease_s: float = LEASE_S
    parent: int | None = None
    stop: threading.Event = field(default_factory=threading.Event)


def work(store: Store, home: Home, crew: Crew, tell: Callable[[str], None]) -> None:
    """Work until asked to stop; then children save what they trained, and their jobs wait for others."""
    children: dict[str, subprocess.Popen[bytes]] = {}
    try:
        while not crew.stop.is_set() and crew.parent in (None, os.getppid()):
            try:
                _round(store, home, crew, children, tell)
            except StoreError as error:  # a full disk or a database in use may be well again in a while
                tell(f"trying again: {error}")
                crew.stop.wait(REST_S)
            crew.stop.wait(BEAT_S)
    finally:
        _dismiss(children)


def _round(
    store: Store,
    home: Home,
    crew: Crew,
    children: dict[str, subprocess.Popen[bytes]],
    tell: Callable[[str], None],
) -> None:
    """Look at new jobs' files, at children that ended, and for jobs that may begin."""
    queue, uploads = Queue(store), Uploads(store, home)
    for job in queue.unexamined():
        examine.examine(job, queue, (store, uploads, home))
        examine.forget(queue.get(None, job.id), queue, home)
    for name, child in list(children.items()):
        if child.poll() is not None:
            del children[name]
            tell(f"{name}: {queue.get(None, name).status}")
    for job in queue.free(socket.gethostname()):
        full = len(children) >= crew.jobs
        if not full and job.id not in children and not home.is_locked(f"job-{job.id}"):
            tell(f"{job.id}: begins")
            children[job.id] = _child(job, home, crew)


def _child(job: Job, home: Home, crew: Crew) -> subprocess.Popen[bytes]:
    folder = home.path / "jobs" / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    settings = json.dumps({"lease_s": crew.lease_s, "terms": asdict(crew.terms)})
    command = [sys.executable, "-m", "luthier.jobs.child", str(home.path), job.id, settings]
    with open(folder / f"{job.id}.log", "ab") as log:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_environment(), cwd=home.path
        )


def _environment() -> dict[str, str]:
    """Ours, with the place that this very luthier was imported from."""
    here = str(Path(__file__).parents[2])
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != here]
    return os.environ | {"PYTHONPATH": os.pathsep.join([here, *paths])}


def _dismiss(children: dict[str, subprocess.Popen[bytes]]) -> None:
    for child in children.values():
        child.terminate()
    for child in children.values():
        try:
            child.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


@contextmanager
def hired(home: Home, count: int) -> Iterator[None]:
    """So many workers beside this process while the block lasts; one that dies is followed by another."""
    crew = [_hire(home) for _ in range(count)]
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(BEAT_S):
            for at, worker in enumerate(crew):
                if worker.poll() is not None:
                    ended.wait(REST_S)
                    crew[at] = worker if ended.is_set() else _hire(home)

    watch = threading.Thread(target=look, name="workers", daemon=True)
    watch.start()
    try:
        yield
    finally:
        ended.set()
        watch.join()
        _dismiss({str(at): worker for at, worker in enumerate(crew)})


def _hire(home: Home) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "luthier.cli", "work", "--home", str(home.path)]
    command += ["--parent", str(os.getpid())]
    folder = home.path / "jobs" / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "worker.log", "ab") as log:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_environment(), cwd=home.path,
            start_new_session=True,
        )  # fmt: skip
