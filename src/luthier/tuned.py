"""Tuned models by the name that clients use, `ft:<base>:<org>:<suffix>:<id>[:ckpt-step-N]`; and whose.

A job that succeeds enters its model and its checkpoints here, in the transaction that ends the job. Deleting
keeps the row: a name is never given twice. It does not know how an adapter is loaded, nor what a job is.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from sqlalchemy import insert, select, update
from sqlalchemy.engine import Connection, RowMapping

from luthier.errors import NotFound
from luthier.schema.jobs import TUNED
from luthier.store import Store

PREFIX = "ft:"


@dataclass(frozen=True, slots=True)
class Tuned:
    """One name. `release` of `name` is what the store knows; a checkpoint has its `artefact` and `step`."""

    id: str
    tenant: str
    job: str
    base: str
    name: str
    release: str
    artefact: str | None = None
    step: int | None = None
    created_at: int = 0
    deleted_at: int | None = None


def add(connection: Connection, models: Iterable[Tuned]) -> None:
    """Enter models inside the caller's transaction."""
    connection.execute(insert(TUNED), [asdict(model) for model in models])


def find(store: Store, model: str, tenant: str | None) -> Tuned:
    """The model of that name that `tenant` may see (None: anyone's). Deleted ones are not found."""
    query = select(TUNED).where(TUNED.c.id == model, TUNED.c.deleted_at.is_(None))
    rows = store.rows(query if tenant is None else query.where(TUNED.c.tenant == tenant))
    if not rows:
        raise NotFound(f"the model {model!r} does not exist", hint="list those you have with GET /v1/models")
    return _tuned(rows[0])


def listed(store: Store, tenant: str | None) -> list[Tuned]:
    """The tenant's models (None: all), oldest first."""
    query = select(TUNED).where(TUNED.c.deleted_at.is_(None)).order_by(TUNED.c.seq)
    return [
        _tuned(row) for row in store.rows(query if tenant is None else query.where(TUNED.c.tenant == tenant))
    ]


def has(store: Store, job: str) -> bool:
    """Whether a model of this job's still has its name."""
    query = select(TUNED.c.id).where(TUNED.c.job == job, TUNED.c.step.is_(None), TUNED.c.deleted_at.is_(None))
    return bool(store.rows(query))


def delete(store: Store, model: str, tenant: str | None) -> Tuned:
    """The name is gone for good, and those of its checkpoints with it. Sealed folders stay."""
    found = find(store, model, tenant)
    which = TUNED.c.id == model if found.step is not None else TUNED.c.job == found.job
    with store.writing() as connection:
        gone = update(TUNED).where(which, TUNED.c.deleted_at.is_(None))
        connection.execute(gone.values(deleted_at=int(time.time())))
    return found


def _tuned(row: RowMapping) -> Tuned:
    return Tuned(**{name: row[name] for name in Tuned.__dataclass_fields__})
