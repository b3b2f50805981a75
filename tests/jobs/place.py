"""A home with a tiny base that may be tuned, files of a tenant, and workers in processes of their own."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier import admit
from luthier.home import Home
from luthier.jobs import ask
from luthier.jobs.asked import parse
from luthier.jobs.queue import Queue
from luthier.jobs.records import ENDED, Job, Told
from luthier.pipeline import Place
from luthier.store import Store
from luthier.uploads import Label, Uploads
from tests.tiny import make_tiny_base

BASE = "tiny"
TENANT = "acme"


@dataclass(frozen=True)
class World:
    home: Home
    store: Store
    uploads: Uploads
    queue: Queue

    def upload(self, lines: list[dict[str, Any]] | bytes, tenant: str = TENANT) -> str:
        data = lines if isinstance(lines, bytes) else jsonl(lines)
        return self.uploads.put(tenant, Label("rows.jsonl", "fine-tune"), io.BytesIO(data)).id

    def create(self, tenant: str = TENANT, **fields: Any) -> Job:
        asked = parse(json.dumps({"model": BASE, **fields}).encode())
        return ask.create(asked, tenant, self.store, self.uploads)

    def events(self, job: Job) -> list[Told]:
        told, more = self.queue.events(job.id, None, 10_000, newest=False)
        assert not more
        return told

    def until(self, job: Job, *states: str, seconds: float = 600) -> Job:
        return wait(lambda: _in(self.queue.get(None, job.id), states or ENDED), seconds)


def _in(job: Job, states: tuple[str, ...]) -> Job | None:
    return job if job.status in states else None


def wait(look: Callable[[], Any], seconds: float = 600) -> Any:
    """What `look` finds, once it finds something."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := look():
            return found
        time.sleep(0.1)
    raise AssertionError(f"it did not come in {seconds} s")


def jsonl(lines: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def chats(count: int = 10, salt: str = "") -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"{salt} number {n}"},
                {"role": "assistant", "content": "even" if n % 2 == 0 else "odd"},
            ]
        }
        for n in range(count)
    ]


def make_world(folder: Path, database: Path | str | None = None) -> World:
    make_tiny_base(folder / "base")
    home = Home.at(folder / "home")
    store = Store.open(database or home.database)
    section = {
        "from": {"name": "files", "files": {"model": str(folder / "base")}},
        "licence": "Apache-2.0", "dtype": "float32",
    }  # fmt: skip
    admit.base(BASE, section, Place(home, store, folder))
    return World(home, store, Uploads(store, home), Queue(store))


def start(world: World, *words: str) -> subprocess.Popen[bytes]:
    """`luthier work` (or another verb) on this home."""
    words = words or ("work",)
    command = [sys.executable, "-m", "luthier.cli", *words, "--home", str(world.home.path)]
    log = open(world.home.path / "work.log", "ab")  # noqa: SIM115 - the process has it
    return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})


@contextmanager
def working(world: World, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    process = start(world, *words)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(60)
