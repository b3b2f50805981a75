"""The queue: rows of jobs, who may work on one and until when, and what happened to each, in order.

A claim is one conditional UPDATE, so of racing workers just one gets a job; it holds a token and a time, and
every later write of that worker carries the token: a worker that lost its lease changes nothing any more.
An event is numbered by the job's own counter in the transaction of the change that it tells, so numbers have
no holes, the order is the order of what happened, and a named event (`key`) is told once however often the
work behind it is done again. Leases compare clocks of machines: they should agree to a few seconds.

It does not know how a job is carried out, nor who may see it: callers name the tenant.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import case, exists, func, insert, or_, select, update
from sqlalchemy.engine import Connection

from luthier import tuned
from luthier.chain import Deed
from luthier.errors import NotFound
from luthier.jobs.asked import Refused
from luthier.jobs.records import (
    ACTIVE,
    ENDED,
    FACTS,
    Checkpoint,
    Claim,
    Job,
    Note,
    Told,
    Won,
    as_checkpoint,
    as_job,
    as_text,
    as_told,
    clean,
)
from luthier.jobs.turns import TooManyJobs, fair
from luthier.schema.jobs import JOB_CHECKPOINTS, JOB_EVENTS, JOBS
from luthier.store import Store


class NoJob(NotFound):
    """No such job, or not this tenant's: the two are answered alike."""

    code = "fine_tune_not_found"
    param = "fine_tuning_job_id"


@dataclass(frozen=True, slots=True)
class Wish:
    """What its owner may do with a job: from which states to which, and how that is told."""

    verb: str
    frm: tuple[str, ...]
    to: str
    word: str


CANCEL = Wish("cancel", (*ACTIVE, "paused"), "cancelled", "cancelled")
PAUSE = Wish("pause", ("queued", "running"), "paused", "paused")
RESUME = Wish("resume", ("paused",), "queued", "resumed; waiting for a worker")


class Queue:
    def __init__(self, store: Store, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock

    # ---- for those who ask --------------------------------------------------------------------------

    def add(self, job: Job, *notes: Note, most: int | None = None) -> Job:
        """Queue it, unless its tenant has `most` unfinished ones already."""
        row = {name: getattr(job, name) for name in Job.__dataclass_fields__}
        row |= {name: as_text(row[name]) for name in FACTS}
        with self._store.writing() as connection:
            if most is not None and _unfinished_of(connection, job.tenant) >= most:
                raise TooManyJobs(most)
            connection.execute(insert(JOBS), row)
            for note in notes:
                _tell(connection, self._clock(), job.id, note)
        return self.get(job.tenant, job.id)

    def get(self, tenant: str | None, job_id: str) -> Job:
        rows = self._store.rows(select(JOBS).where(JOBS.c.id == job_id, *_of(tenant)))
        if not rows:
            raise NoJob(f"Could not find fine tune: {job_id[:64]}")
        return as_job(rows[0])

    def page(
        self, tenant: str | None, after: str | None, limit: int, metadata: Mapping[str, str] | None = None
    ) -> tuple[list[Job], bool]:
        """A page of jobs, newest first, and whether more follow. `metadata`: of those that have all of it."""
        query = select(JOBS).where(*_of(tenant)).order_by(JOBS.c.seq.desc()).limit(200)
        at = None if after is None else self._seq(tenant, after)
        found: list[Job] = []
        while len(found) <= limit:
            rows = self._store.rows(query if at is None else query.where(JOBS.c.seq < at))
            found += [job for job in map(as_job, rows) if _has(job.asked.get("metadata"), metadata)]
            if len(rows) < 200:
                break
            at = rows[-1]["seq"]
        return found[:limit], len(found) > limit

    def events(self, job_id: str, after: str | None, limit: int, *, newest: bool) -> tuple[list[Told], bool]:
        """A page of a job's events, from its newest back or from its oldest on, and whether more follow."""
        query = select(JOB_EVENTS).where(JOB_EVENTS.c.job == job_id)
        number = JOB_EVENTS.c.number
        if after is not None:
            at = self._store.rows(select(number).where(JOB_EVENTS.c.job == job_id, JOB_EVENTS.c.id == after))
            if not at:
                raise Refused(f"no event {after[:64]!r} of this job", param="after", code="invalid_value")
            query = query.where(number < at[0]["number"] if newest else number > at[0]["number"])
        rows = self._store.rows(query.order_by(number.desc() if newest else number).limit(limit + 1))
        return [as_told(row) for row in rows[:limit]], len(rows) > limit

    def keys(self, job_id: str) -> set[str]:
        """The names of all that was told once."""
        named = JOB_EVENTS.c.job == job_id, JOB_EVENTS.c.key.is_not(None)
        return {row["key"] for row in self._store.rows(select(JOB_EVENTS.c.key).where(*named))}

    def checkpoints(self, job_id: str, after: str | None, limit: int) -> tuple[list[Checkpoint], bool]:
        """A page of a job's checkpoints, newest first, and whether more follow."""
        query = select(JOB_CHECKPOINTS).where(JOB_CHECKPOINTS.c.job == job_id)
        if after is not None:
            here = JOB_CHECKPOINTS.c.job == job_id, JOB_CHECKPOINTS.c.id == after
            at = self._store.rows(select(JOB_CHECKPOINTS.c.step).where(*here))
            if not at:
                raise Refused(
                    f"no checkpoint {after[:64]!r} of this job", param="after", code="invalid_value"
                )
            query = query.where(JOB_CHECKPOINTS.c.step < at[0]["step"])
        rows = self._store.rows(query.order_by(JOB_CHECKPOINTS.c.step.desc()).limit(limit + 1))
        return [as_checkpoint(row) for row in rows[:limit]], len(rows) > limit

    def cancel(self, tenant: str | None, job_id: str, deed: Deed | None = None) -> Job:
        """No more is done for it from now on; a worker that has it stops at its next breath."""
        ended = {"finished_at": int(self._clock()), "estimated_finish": None}
        return self._ask(tenant, job_id, CANCEL, ended, deed)

    def pause(self, tenant: str | None, job_id: str, deed: Deed | None = None) -> Job:
        """A worker that has it saves and stops; what is trained is kept."""
        return self._ask(tenant, job_id, PAUSE, {"estimated_finish": None}, deed)

    def resume(self, tenant: str | None, job_id: str, deed: Deed | None = None) -> Job:
        return self._ask(tenant, job_id, RESUME, {}, deed)

    def _ask(
        self, tenant: str | None, job_id: str, wish: Wish, values: Mapping[str, Any], deed: Deed | None
    ) -> Job:
        """What the audit log says of it is written by the same commit, or nothing is done."""
        job = self.get(tenant, job_id)
        with self._store.writing(deed) as connection:
            if not _move(connection, job_id, wish.frm, {"status": wish.to, **values}):
                now = connection.execute(select(JOBS.c.status).where(JOBS.c.id == job_id)).scalar()
                raise Refused(
                    f"Cannot {wish.verb} a job that is {now}; it must be {' or '.join(wish.frm)}",
                    code="invalid_status",
                )
            _tell(connection, self._clock(), job_id, Note(f"The job has been {wish.word}"))
        return self.get(job.tenant, job_id)

    def _seq(self, tenant: str | None, job_id: str) -> int:
        rows = self._store.rows(select(JOBS.c.seq).where(JOBS.c.id == job_id, *_of(tenant)))
        if not rows:
            raise Refused(f"no job {job_id[:64]!r}", param="after", code="invalid_value")
        return int(rows[0]["seq"])

    # ---- for those who examine files ----------------------------------------------------------------

    def unexamined(self) -> list[Job]:
        """Of each tenant the oldest job whose files nobody has looked at: none waits for another's many."""
        new = JOBS.c.status == "validating_files"
        oldest = select(func.min(JOBS.c.seq)).where(new).group_by(JOBS.c.tenant)
        query = select(JOBS).where(new, JOBS.c.seq.in_(oldest)).order_by(JOBS.c.seq)
        return [as_job(row) for row in self._store.rows(query)]

    def unfinished(self) -> list[Job]:
        """Jobs that have not ended, oldest first."""
        query = select(JOBS).where(JOBS.c.status.not_in(ENDED)).order_by(JOBS.c.seq)
        return [as_job(row) for row in self._store.rows(query)]

    def examined(self, job_id: str, settled: Mapping[str, Any], note: Note) -> None:
        with self._store.writing() as connection:
            values = {"status": "queued", "settled": as_text(settled)}
            if _move(connection, job_id, ("validating_files",), values):
                _tell(connection, self._clock(), job_id, note)

    def turned_down(self, job_id: str, error: Mapping[str, Any]) -> None:
        with self._store.writing() as connection:
            if _move(connection, job_id, ("validating_files",), _failure(error, self._clock())):
                _tell(connection, self._clock(), job_id, _failed(error))

    # ---- for those who work -------------------------------------------------------------------------

    def free(self, host: str) -> list[Job]:
        """Jobs that may be claimed, in the order of turns: queued or running, with no lease that holds.

        One that a process of this very machine holds is among them: whether that process lives, the kernel
        knows (its lock), and who claims must have that lock.
        """
        query = select(JOBS).where(JOBS.c.status.in_(("queued", "running")), _unheld(host, self._clock()))
        free = [as_job(row) for row in self._store.rows(query.order_by(JOBS.c.seq))]
        if len({job.tenant for job in free}) < 2:
            return free
        held = JOBS.c.status == "running", JOBS.c.lease_until >= self._clock()
        running: dict[str, set[str]] = {}
        for row in self._store.rows(select(JOBS.c.tenant, JOBS.c.id).where(*held)):
            running.setdefault(row["tenant"], set()).add(row["id"])
        last = func.max(func.coalesce(JOBS.c.finished_at, JOBS.c.started_at))
        begun = select(JOBS.c.tenant, last.label("last")).where(JOBS.c.started_at.is_not(None))
        rows = self._store.rows(begun.group_by(JOBS.c.tenant))
        return fair(free, running, {row["tenant"]: int(row["last"]) for row in rows})

    def claim(self, claim: Claim) -> Job | None:
        """The job, if nobody holds it: from now on it is running and this worker's."""
        began = int(self._clock())
        values = {
            "status": "running", "lease": claim.token, "host": claim.host,
            "lease_until": self._clock() + claim.lease_s, "attempts": JOBS.c.attempts + 1,
            "peak_bytes": None, "held_bytes": None,
            # A lease that nobody gave back is a worker that died.
            "deaths": JOBS.c.deaths + case((JOBS.c.lease.is_not(None), 1), else_=0),
        }  # fmt: skip
        with self._store.writing() as connection:
            if not _move(
                connection, claim.job, ("queued", "running"), values, _unheld(claim.host, self._clock())
            ):
                return None
            first = update(JOBS).where(JOBS.c.id == claim.job, JOBS.c.started_at.is_(None))
            connection.execute(first.values(started_at=began))
            job = as_job(connection.execute(select(JOBS).where(JOBS.c.id == claim.job)).mappings().one())
            words = "Fine-tuning job started" if job.attempts == 1 else "Going on from what was saved"
            _tell(connection, self._clock(), claim.job, Note(words, f"attempt:{job.attempts}"))
        return job

    def renew(self, claim: Claim, held_bytes: int) -> bool:
        """Hold on to it; false when it is no longer this worker's, or no longer to be worked on."""
        values = {"lease_until": self._clock() + claim.lease_s, "held_bytes": held_bytes}
        with self._store.writing() as connection:
            return _move(connection, claim.job, ("running",), values, JOBS.c.lease == claim.token)

    def note(self, claim: Claim, note: Note | None, **values: Any) -> bool:
        """Tell something and keep `values` in the job's row; false when its holder should leave it alone.

        A job that was just paused is still told of: what its holder saves must have been told.
        """
        values |= {name: as_text(value) for name, value in values.items() if name in FACTS}
        with self._store.writing() as connection:
            kept = {"lease": claim.token, **values}
            held = _move(connection, claim.job, HELD, kept, JOBS.c.lease == claim.token)
            if held and note is not None:
                _tell(connection, self._clock(), claim.job, note)
            now = select(JOBS.c.status).where(JOBS.c.id == claim.job)
            return held and connection.execute(now).scalar() == "running"

    def running(self, host: str) -> list[Job]:
        """Jobs that processes of this machine hold."""
        here = JOBS.c.status == "running", JOBS.c.host == host, JOBS.c.lease.is_not(None)
        return [as_job(row) for row in self._store.rows(select(JOBS).where(*here))]

    def release(self, claim: Claim) -> None:
        """Give a job back: who is free goes on with it, if it is still to be worked on."""
        with self._store.writing() as connection:
            mine = JOBS.c.id == claim.job, JOBS.c.lease == claim.token
            connection.execute(update(JOBS).where(*mine).values(_FREE))
            waits = {"status": "queued"}
            if _move(connection, claim.job, ("running",), waits, JOBS.c.lease.is_(None)):
                _tell(
                    connection,
                    self._clock(),
                    claim.job,
                    Note("The worker was stopped; what is trained is saved"),
                )

    def fail(self, claim: Claim, error: Mapping[str, Any]) -> bool:
        with self._store.writing() as connection:
            moved = _move(
                connection,
                claim.job,
                ("running",),
                _failure(error, self._clock()) | _FREE,
                JOBS.c.lease == claim.token,
            )
            if moved:
                _tell(connection, self._clock(), claim.job, _failed(error))
        return moved

    def win(self, claim: Claim, won: Won, *notes: Note) -> bool:
        """End the job well: models, checkpoints, bill and last events in one transaction, or none of it."""
        values = {
            "status": "succeeded", "finished_at": int(self._clock()), "estimated_finish": None,
            "release": won.release, "trained_tokens": won.trained_tokens, "result_file": won.result_file,
        }  # fmt: skip
        with self._store.writing() as connection:
            if not _move(connection, claim.job, ("running",), values | _FREE, JOBS.c.lease == claim.token):
                return False
            tuned.add(connection, won.models)
            rows = [{n: getattr(c, n) for n in Checkpoint.__dataclass_fields__} for c in won.checkpoints]
            if rows:
                connection.execute(
                    insert(JOB_CHECKPOINTS), [row | {"metrics": as_text(row["metrics"])} for row in rows]
                )
            for note in notes:
                _tell(connection, self._clock(), claim.job, note)
        return True


HELD = ("running", "paused", "queued")  # states in which a worker may still have the job
_FREE = {
    "lease": None, "lease_until": None, "held_bytes": None, "peak_bytes": None, "estimated_finish": None,
}  # fmt: skip


def _move(
    connection: Connection, job_id: str, frm: Sequence[str], values: Mapping[str, Any], *also: Any
) -> bool:
    """Change a job's row if it is in one of these states and all else holds too."""
    which = JOBS.c.id == job_id, JOBS.c.status.in_(frm), *also
    return bool(connection.execute(update(JOBS).where(*which).values(dict(values))).rowcount)


def _tell(connection: Connection, now: float, job_id: str, note: Note) -> None:
    """One event, numbered by the job's counter; a key that was told before changes nothing."""
    count = update(JOBS).where(JOBS.c.id == job_id).values(events=JOBS.c.events + 1)
    if note.key is not None:
        count = count.where(~exists().where(JOB_EVENTS.c.job == job_id, JOB_EVENTS.c.key == note.key))
    number = connection.execute(count.returning(JOBS.c.events)).scalar()
    if number is None:
        return
    name = hashlib.sha256(f"{job_id}:{number}".encode()).hexdigest()[:24]
    row = {
        "id": f"ftevent-{name}", "job": job_id, "number": number, "key": note.key,
        "created_at": int(now), "level": note.level, "type": note.type,
        "message": clean(note.message), "data": as_text(note.data),
    }  # fmt: skip
    connection.execute(insert(JOB_EVENTS), row)


def _unfinished_of(connection: Connection, tenant: str) -> int:
    if connection.dialect.name == "postgresql":  # SQLite has one writer at a time; here tenants queue
        connection.execute(select(func.pg_advisory_xact_lock(func.hashtext(tenant))))
    mine = JOBS.c.tenant == tenant, JOBS.c.status.not_in(ENDED)
    return int(connection.execute(select(func.count()).select_from(JOBS).where(*mine)).scalar_one())


def _unheld(host: str, now: float) -> Any:
    return or_(JOBS.c.lease.is_(None), JOBS.c.lease_until < now, JOBS.c.host == host)


def _of(tenant: str | None) -> tuple[Any, ...]:
    return () if tenant is None else (JOBS.c.tenant == tenant,)


def _has(held: Any, wanted: Mapping[str, str] | None) -> bool:
    """Whether metadata holds all that is wanted; an empty wish is for jobs without any."""
    if wanted is None:
        return True
    return not held if not wanted else bool(held) and all(held.get(k) == v for k, v in wanted.items())


def _failure(error: Mapping[str, Any], now: float) -> dict[str, Any]:
    ended = {"finished_at": int(now), "estimated_finish": None}
    return {"status": "failed", "error": as_text(error), **ended}


def _failed(error: Mapping[str, Any]) -> Note:
    return Note(f"The job failed: {error['message']}", "failed", "error", data={"error": dict(error)})
