"""Tables of fine-tuning jobs: the jobs, what happened to each in order, their checkpoints, and tuned models.

A job's row holds its lease (who works on it, until when) and the number of its events, so that taking a job
or saying something about it is one conditional UPDATE. An event's `key` names what happened (`step:12`): work
that is done again after a crash cannot be told twice. Times of the API are whole seconds since 1970.

This module does not know states' meaning, workers or recipes.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Double, Integer, String, Table

from luthier.schema.core import METADATA, Migration, Serial

STATES = ("validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled")

MIGRATION = Migration(
    number=4,
    title="fine-tuning jobs, their events and checkpoints, tuned models",
    common=(
        f"""CREATE TABLE jobs (
            seq {{serial}}, id TEXT NOT NULL UNIQUE, tenant TEXT NOT NULL, base TEXT NOT NULL,
            model TEXT NOT NULL UNIQUE, status TEXT NOT NULL CHECK (status IN {STATES}),
            asked TEXT NOT NULL, section TEXT NOT NULL, seed BIGINT NOT NULL,
            training_file TEXT NOT NULL, training_sha256 TEXT NOT NULL,
            validation_file TEXT, validation_sha256 TEXT,
            created_at BIGINT NOT NULL, started_at BIGINT, finished_at BIGINT, estimated_finish BIGINT,
            settled TEXT, recipe TEXT, planned TEXT, error TEXT, run_id TEXT, release TEXT,
            trained_tokens BIGINT, result_file TEXT,
            lease TEXT, host TEXT, lease_until DOUBLE PRECISION, peak_bytes BIGINT, held_bytes BIGINT,
            deaths INTEGER NOT NULL, attempts INTEGER NOT NULL, events INTEGER NOT NULL)""",
        "CREATE INDEX jobs_by_tenant ON jobs (tenant, seq)",
        "CREATE INDEX jobs_by_status ON jobs (status, seq)",
        """CREATE TABLE job_events (
            seq {serial}, id TEXT NOT NULL UNIQUE, job TEXT NOT NULL REFERENCES jobs (id),
            number INTEGER NOT NULL, key TEXT, created_at BIGINT NOT NULL, level TEXT NOT NULL,
            type TEXT NOT NULL, message TEXT NOT NULL, data TEXT NOT NULL,
            UNIQUE (job, number), UNIQUE (job, key))""",
        """CREATE TABLE job_checkpoints (
            seq {serial}, id TEXT NOT NULL UNIQUE, job TEXT NOT NULL REFERENCES jobs (id),
            step INTEGER NOT NULL, model TEXT NOT NULL, metrics TEXT NOT NULL, created_at BIGINT NOT NULL,
            UNIQUE (job, step))""",
        """CREATE TABLE tuned (
            seq {serial}, id TEXT NOT NULL UNIQUE, tenant TEXT NOT NULL,
            job TEXT NOT NULL REFERENCES jobs (id), base TEXT NOT NULL, name TEXT NOT NULL,
            release TEXT NOT NULL, artefact TEXT, step INTEGER, created_at BIGINT NOT NULL,
            deleted_at BIGINT)""",
        "CREATE INDEX tuned_by_tenant ON tuned (tenant, seq)",
    ),
)

# `asked`: the request as it was understood. `section`: the base's `model:` section. `settled`: what "auto"
# became, and the rows there are. `planned`: tokens, minutes and money that were promised.
JOBS = Table(
    "jobs", METADATA,
    Column("seq", Serial, primary_key=True), Column("id", String), Column("tenant", String),
    Column("base", String), Column("model", String), Column("status", String), Column("asked", String),
    Column("section", String), Column("seed", BigInteger), Column("training_file", String),
    Column("training_sha256", String), Column("validation_file", String), Column("validation_sha256", String),
    Column("created_at", BigInteger), Column("started_at", BigInteger), Column("finished_at", BigInteger),
    Column("estimated_finish", BigInteger), Column("settled", String), Column("recipe", String),
    Column("planned", String), Column("error", String), Column("run_id", String), Column("release", String),
    Column("trained_tokens", BigInteger), Column("result_file", String), Column("lease", String),
    Column("host", String), Column("lease_until", Double), Column("peak_bytes", BigInteger),
    Column("held_bytes", BigInteger), Column("deaths", Integer), Column("attempts", Integer),
    Column("events", Integer),
)  # fmt: skip

JOB_EVENTS = Table(
    "job_events", METADATA,
    Column("seq", Serial, primary_key=True), Column("id", String), Column("job", String),
    Column("number", Integer), Column("key", String), Column("created_at", BigInteger),
    Column("level", String), Column("type", String), Column("message", String), Column("data", String),
)  # fmt: skip

JOB_CHECKPOINTS = Table(
    "job_checkpoints", METADATA,
    Column("seq", Serial, primary_key=True), Column("id", String), Column("job", String),
    Column("step", Integer), Column("model", String), Column("metrics", String),
    Column("created_at", BigInteger),
)  # fmt: skip

# `id` is the name it is asked for by; `name` and `release` are what the store knows it by. A checkpoint's
# adapter lies in `artefact` (the train stage's) below `checkpoints/step-N`.
TUNED = Table(
    "tuned", METADATA,
    Column("seq", Serial, primary_key=True), Column("id", String), Column("tenant", String),
    Column("job", String), Column("base", String), Column("name", String), Column("release", String),
    Column("artefact", String), Column("step", Integer), Column("created_at", BigInteger),
    Column("deleted_at", BigInteger),
)  # fmt: skip
