"""Jobs as functions of plain values, for a home without a server: what `api` and the command line offer.

The same queue, checks and objects as over HTTP, for the tenant of this machine's owner. A file on disk is
uploaded first, as a client would. It does not know terminals.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from luthier import audit
from luthier.chain import Deed
from luthier.engine import memory
from luthier.errors import DataError
from luthier.home import Home
from luthier.jobs import ask, quote
from luthier.jobs.asked import Create, parse
from luthier.jobs.queue import Queue
from luthier.jobs.records import ENDED, Job
from luthier.jobs.spec import Terms
from luthier.store import Store
from luthier.uploads import Label, Uploads

OWNER = "local"  # the tenant of whoever sits at this machine
BEAT_S = 0.5
FILES = ("training_file", "validation_file")
MEMORY_SHARE = 0.85  # of the machine's, for one job
SETTINGS = {
    "memory_gb": "LUTHIER_JOB_MEMORY_GB",
    "threads": "LUTHIER_JOB_THREADS",
    "price_per_hour": "LUTHIER_PRICE_PER_HOUR",
}

Homeish = str | Path | None


class Jobs:
    """The jobs of one home."""

    def __init__(self, home: Homeish = None, actor: str = OWNER) -> None:
        self.actor = actor
        self.home = Home.at(home)
        self.store = Store.open(self.home.database)
        self.uploads = Uploads(self.store, self.home)
        self.queue = Queue(self.store)

    def create(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """A new job from OpenAI's fields; `training_file` and `validation_file` may be paths on disk."""
        asked = self._asked(request)
        job = ask.create(asked, OWNER, self.store, self.uploads, most=None)
        self._note("create", job)
        return ask.job_object(job)

    def quote(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """What that job would take; nothing is queued."""
        place = self.store, self.uploads, self.home
        return quote.quote(self._asked(request), OWNER, place, terms())

    def _asked(self, request: Mapping[str, Any]) -> Create:
        fields = dict(request)
        for name in FILES:
            if name in fields and not str(fields[name]).startswith("file-"):
                fields[name] = self._put(Path(str(fields[name])).expanduser())
        return parse(json.dumps(fields).encode())

    def _put(self, path: Path) -> str:
        try:
            with path.open("rb") as stream:
                return self.uploads.put(OWNER, Label(path.name, "fine-tune"), stream).id
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}", where=str(path)) from error

    def list(self, limit: int = 50) -> list[dict[str, Any]]:
        """All tenants' jobs, newest first."""
        return [ask.job_object(job) for job in self.queue.page(None, None, limit)[0]]

    def show(self, job_id: str) -> dict[str, Any]:
        job = self.queue.get(None, job_id)
        events, _ = self.queue.events(job_id, None, 20, newest=True)
        checkpoints, _ = self.queue.checkpoints(job_id, None, 100)
        return ask.job_object(job) | {
            "events": [ask.event_object(one) for one in reversed(events)],
            "checkpoints": [ask.checkpoint_object(one) for one in checkpoints],
        }

    def move(self, job_id: str, verb: str) -> dict[str, Any]:
        """Cancel, pause or resume a job; the audit log tells of it by the same commit."""
        moves: dict[str, Callable[[None, str, Deed], Job]] = {
            "cancel": self.queue.cancel, "pause": self.queue.pause, "resume": self.queue.resume,
        }  # fmt: skip
        job = self.queue.get(None, job_id)
        deed = Deed(f"jobs {verb}", job.id, self.actor, job.tenant)
        return ask.job_object(moves[verb](None, job.id, deed))

    def _note(self, verb: str, job: Job) -> None:
        audit.note(self.store, f"jobs {verb}", job.id, actor=self.actor, tenant=job.tenant)

    def follow(self, job_id: str) -> Iterator[dict[str, Any]]:
        """Every event from the first on, as they come, until the job has ended."""
        after = None
        while True:
            ended = self.queue.get(None, job_id).status in ENDED
            events, more = self.queue.events(job_id, after, 100, newest=False)
            for event in events:
                after = event.id
                yield ask.event_object(event)
            if ended and not more:
                return
            if not more:
                time.sleep(BEAT_S)


def terms() -> Terms:
    """What the owner of this machine set in the environment for every job; else all the memory."""
    given = {name: os.environ.get(variable) for name, variable in SETTINGS.items()}
    try:
        memory_gb = float(given["memory_gb"] or 0) or round(MEMORY_SHARE * memory.machine()[0] / 1e9, 2)
        threads = int(given["threads"]) if given["threads"] else None
        price = float(given["price_per_hour"]) if given["price_per_hour"] else None
    except ValueError as error:
        raise DataError(f"not a number: {error}", where=", ".join(SETTINGS.values())) from None
    return Terms(memory_gb, threads, price)


def import_openai(
    jobs: Path, files: Path, out: Path, base: str | None, home: Homeish
) -> list[dict[str, Any]]:
    """Old OpenAI jobs as recipes below `out`, on one of this home's bases (default: the demo's)."""
    from luthier import admit, bases
    from luthier.jobs import imported

    if base is None:
        section: Mapping[str, Any] = admit.DEMO_SECTION
    else:
        section = bases.find(Store.open(Home.at(home).database), base).section
    out.mkdir(parents=True, exist_ok=True)
    return [imported.carry(old, files, out, section) for old in imported.read(jobs)]
