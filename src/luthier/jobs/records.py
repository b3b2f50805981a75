"""What the queue keeps, as plain values: jobs, what was told of them, checkpoints, claims; and rows read so.

It does not know the database beyond the names of its columns.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy.engine import RowMapping

from luthier.tuned import Tuned

ACTIVE = ("validating_files", "queued", "running")
ENDED = ("succeeded", "failed", "cancelled")
FACTS = ("asked", "section", "settled", "recipe", "planned", "error")  # columns that hold JSON


@dataclass(frozen=True, slots=True)
class Job:
    """One row. `settled`, `recipe` and `planned` are None until that much is known."""

    id: str
    tenant: str
    base: str
    model: str
    status: str
    asked: Mapping[str, Any]
    section: Mapping[str, Any]
    seed: int
    training_file: str
    training_sha256: str
    validation_file: str | None
    validation_sha256: str | None
    created_at: int
    started_at: int | None = None
    finished_at: int | None = None
    estimated_finish: int | None = None
    settled: Mapping[str, Any] | None = None
    recipe: Mapping[str, Any] | None = None
    planned: Mapping[str, Any] | None = None
    error: Mapping[str, Any] | None = None
    run_id: str | None = None
    release: str | None = None
    trained_tokens: int | None = None
    result_file: str | None = None
    lease: str | None = None
    host: str | None = None
    lease_until: float | None = None
    peak_bytes: int | None = None
    held_bytes: int | None = None
    deaths: int = 0
    attempts: int = 0
    events: int = 0


@dataclass(frozen=True, slots=True)
class Note:
    """Something to tell. With a `key` it is told once."""

    message: str
    key: str | None = None
    level: str = "info"
    type: str = "message"
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Told:
    """An event as it was told."""

    id: str
    number: int
    created_at: int
    level: str
    type: str
    message: str
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    id: str
    job: str
    step: int
    model: str
    metrics: Mapping[str, Any]
    created_at: int


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to work on a job: the token, the machine, and how long it holds without being renewed."""

    job: str
    token: str
    host: str
    lease_s: float


@dataclass(frozen=True, slots=True)
class Won:
    """What a job came to: all that is written in the transaction that ends it well."""

    models: Sequence[Tuned]
    checkpoints: Sequence[Checkpoint]
    release: str
    trained_tokens: int
    result_file: str


def as_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return clean(json.dumps(value, sort_keys=True, ensure_ascii=True))


def clean(text: str) -> str:
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode("utf-8")


def as_job(row: RowMapping) -> Job:
    values = {name: row[name] for name in Job.__dataclass_fields__}
    return Job(**values | {name: values[name] and json.loads(values[name]) for name in FACTS})


def as_told(row: RowMapping) -> Told:
    names = ("id", "number", "created_at", "level", "type", "message")
    return Told(**{name: row[name] for name in names}, data=json.loads(row["data"]))


def as_checkpoint(row: RowMapping) -> Checkpoint:
    values = {name: row[name] for name in Checkpoint.__dataclass_fields__}
    return Checkpoint(**values | {"metrics": json.loads(values["metrics"])})
