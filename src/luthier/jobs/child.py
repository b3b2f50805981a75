"""The process that carries out one job: it holds the job's lock and lease, runs the recipe, and ends the job.

`python -m luthier.jobs.child HOME JOB TERMS` is started by `work`. The lock is the kernel's, the lease is the
database's: the first says at once that this process died, the second says it to other machines. Asked to stop
(a signal, a pause, a cancellation, its parent gone) it lets the run save and leaves; killed, whoever comes
next goes on from the last checkpoint. It does not know HTTP, nor which jobs there are.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
from typing import Any

from luthier.errors import (
    DataError,
    GateRefused,
    Interrupted,
    LuthierError,
    ModelError,
    PlanError,
    StoreError,
    TrainError,
)
from luthier.home import Home
from luthier.jobs import examine, spec
from luthier.jobs.queue import Queue
from luthier.jobs.records import Claim, Job, Note
from luthier.jobs.spec import Terms
from luthier.store import Store
from luthier.uploads import Uploads

NICE = 10  # answers come first
DEATHS = 12  # in a row, without one step between them: it is not the machine's fault
GRACE_S = 120.0  # from being asked to stop to stopping by force
BEATS = 5  # renewals in the time that a lease holds
CODES: tuple[tuple[type[LuthierError], str], ...] = (
    (GateRefused, "gate_refused"),
    (PlanError, "does_not_fit"),
    (TrainError, "training_failed"),
    (ModelError, "base_model_unusable"),
    (StoreError, "storage_failed"),
)


class Beat(threading.Thread):
    """Renews the lease, and hears that the job, the parent or the time is gone."""

    def __init__(self, queue: Queue, claim: Claim, stop: Any) -> None:
        super().__init__(name="lease", daemon=True)
        self.ended = threading.Event()
        self._queue, self._claim, self._stop = queue, claim, stop
        self._parent = os.getppid()

    def run(self) -> None:
        from luthier.engine import memory

        renewed, asked = time.monotonic(), None
        while not self.ended.wait(self._claim.lease_s / BEATS):
            try:
                held = self._queue.renew(self._claim, memory.rss_bytes())
                renewed = time.monotonic()
            except StoreError:
                held = time.monotonic() - renewed < self._claim.lease_s
            if not held or os.getppid() != self._parent:
                self._stop.requested = True
            if self._stop.requested:
                asked = asked or time.monotonic()
                if time.monotonic() - asked > GRACE_S:
                    os._exit(Interrupted.exit_code)


class Taken(Exception):
    """Another process has this job."""


def main(words: list[str]) -> int:
    folder, job_id, told = words
    settings = json.loads(told)
    os.nice(NICE)
    home = Home.at(folder)
    store = Store.open(home.database)

    def taken(pid: str) -> None:
        raise Taken(pid)

    try:
        with home.lock(f"job-{job_id}", taken):
            claim = Claim(job_id, secrets.token_hex(8), socket.gethostname(), settings["lease_s"])
            job = Queue(store).claim(claim)
            if job is not None:
                _hold(job, claim, (home, store), Terms(**settings["terms"]))
    except Taken:
        pass
    return 0


def _hold(job: Job, claim: Claim, place: tuple[Home, Store], terms: Terms) -> None:
    from luthier.pipeline import Stop

    home, store = place
    queue, stop = Queue(store), Stop()

    def asked(number: int, frame: object) -> None:
        if stop.requested and number == signal.SIGINT:
            os._exit(Interrupted.exit_code)
        stop.requested = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, asked)
    beat = Beat(queue, claim, stop)
    beat.start()
    try:
        if job.deaths >= DEATHS:
            said = f"{job.deaths} workers in a row died at it"
            queue.fail(claim, {"code": "worker_lost", "message": said, "param": None})
        else:
            _carry_out(job, claim, place, terms, stop)
    except Interrupted:
        queue.release(claim)
    except examine.Wrong as wrong:
        queue.fail(claim, wrong.as_dict())
    except LuthierError as error:
        traceback.print_exc()
        queue.fail(claim, problem(job, error))
    except Exception:  # noqa: BLE001 - the boundary of a job
        traceback.print_exc()
        said = "the server failed at this job; its log has the details"
        queue.fail(claim, {"code": "internal_error", "message": said, "param": None})
    finally:
        beat.ended.set()
    examine.forget(queue.get(None, job.id), queue, home)


def _carry_out(job: Job, claim: Claim, place: tuple[Home, Store], terms: Terms, stop: Any) -> None:
    from luthier import pipeline
    from luthier.jobs import results
    from luthier.jobs.telling import Telling
    from luthier.recipe import Recipe

    home, store = place
    queue, uploads = Queue(store), Uploads(store, home)
    examine.restore(job, uploads, home)
    if job.recipe is None:
        made = spec.recipe(job, terms, rows(job))
        queue.note(claim, Note("The recipe is settled", "recipe"), recipe=made.as_dict())
    else:
        made = Recipe.model_validate(job.recipe)
    telling = Telling(queue, claim, job, home, stop)
    about = {
        "tenant": job.tenant,
        "job": job.id,
        "files": {name: [i, s] for name, i, s in examine.files(job)},
    }
    outcome = pipeline.run(made, pipeline.Place(home, store, home.path, telling.tell, stop, about))
    telling.caught_up(results.curve(outcome, home), outcome.stage("train").facts["steps"])
    won = results.gather(job, outcome, home, uploads)
    notes = [
        Note(f"Checkpoint created at step {one.step}", f"checkpoint:{one.step}", data={"step": one.step})
        for one in won.checkpoints
    ]
    notes.append(Note(f"New fine-tuned model created: {job.model}", "model"))
    queue.win(claim, won, *notes, Note("The job has successfully completed", "succeeded"))


def rows(job: Job) -> dict[str, str]:
    """The paths of a job's rows by split, from the home folder."""
    found = {"train": examine.relative(job, job.training_sha256)}
    if job.validation_sha256 is not None:
        found["validation"] = examine.relative(job, job.validation_sha256)
    return found


def problem(job: Job, error: LuthierError) -> dict[str, Any]:
    """A job's `error`: a row's line and file where one is to blame, and never a path of this machine."""
    message = f"{error.what} ({error.hint})" if error.hint else error.what
    line = examine.line_of(error.where) if isinstance(error, DataError | ModelError | PlanError) else None
    if line is not None:
        held_out = job.validation_sha256 is not None and job.validation_sha256 in (error.where or "")
        param = "validation_file" if held_out else "training_file"
        return {"code": f"invalid_{param}", "message": f"line {line}: {error.what}", "param": param}
    code = next((code for kind, code in CODES if isinstance(error, kind)), "invalid_training_file")
    blamed = "training_file" if isinstance(error, DataError) else None
    return {"code": code, "message": message, "param": blamed}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
