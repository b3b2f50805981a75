"""What a tenant may do with jobs: create one, look at it, pause it, cancel it; in the shapes of OpenAI's API.

Source: `openai.types.fine_tuning.FineTuningJob`, `FineTuningJobEvent`, `FineTuningJobCheckpoint`. Fields that
OpenAI's objects do not have stand under `luthier`. It does not know HTTP or processes.
"""

from __future__ import annotations

import re
import secrets
import string
import time
from typing import Any

from luthier import bases
from luthier.errors import NotFound
from luthier.jobs import spec
from luthier.jobs.asked import Create, Refused
from luthier.jobs.queue import Queue
from luthier.jobs.records import Checkpoint, Job, Note, Told
from luthier.jobs.turns import UNFINISHED
from luthier.store import Store
from luthier.uploads import Upload, Uploads

LETTERS = string.ascii_letters + string.digits
PURPOSE = "fine-tune"


def create(asked: Create, tenant: str, store: Store, uploads: Uploads, most: int | None = UNFINISHED) -> Job:
    """A new job in the queue, once its base and files are known to be there; `most`: of the tenant's jobs."""
    job = drafted(asked, tenant, store, uploads)
    notes = [Note(f"Created fine-tuning job: {job.id}", "created")]
    notes += [
        Note(f"Validating {what} file: {upload}", f"validating:{what}")
        for what, upload in (("training", job.training_file), ("validation", job.validation_file))
        if upload is not None
    ]
    if asked.integrations:
        said = "Integrations are recorded with the job; this server mirrors no metrics to them"
        notes.append(Note(said, "integrations", "warn"))
    if asked.how.type == "reinforcement" and asked.how.settings.model_fields_set & {"reasoning_effort"}:
        notes.append(
            Note("`reasoning_effort` is recorded; no base here has such a setting", "effort", "warn")
        )
    return Queue(store).add(job, *notes, most=most)


def drafted(asked: Create, tenant: str, store: Store, uploads: Uploads) -> Job:
    """The job that would be created; nothing is written."""
    try:
        base = bases.find(store, asked.model)
    except NotFound as error:
        raise Refused(
            f"The model '{asked.model[:80]}' is not available for fine-tuning or does not exist. "
            f"({error.hint})",
            param="model",
            code="model_not_available",
        ) from None
    spec.available(asked)
    training = _upload(asked.training_file, "training_file", tenant, uploads)
    held_out = None
    if asked.validation_file is not None:
        held_out = _upload(asked.validation_file, "validation_file", tenant, uploads)
        if held_out.sha256 == training.sha256:
            raise Refused(
                "the validation file holds the same bytes as the training file", param="validation_file"
            )
    sha256 = None if held_out is None else held_out.sha256
    short = "".join(secrets.choice(LETTERS) for _ in range(8))
    return Job(
        id=f"ftjob-{secrets.token_hex(12)}",
        tenant=tenant,
        base=base.name,
        model=f"ft:{base.name}:{organisation(tenant)}:{asked.suffix or ''}:{short}",
        status="validating_files",
        asked=asked.model_dump(mode="json"),
        section=dict(base.section),
        seed=spec.drawn(asked, training.sha256, sha256),
        training_file=training.id,
        training_sha256=training.sha256,
        validation_file=None if held_out is None else held_out.id,
        validation_sha256=sha256,
        created_at=int(time.time()),
    )


def organisation(tenant: str) -> str:
    """A tenant's name as it stands in a model's name, where a colon would end it."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", tenant) or "org"


def _upload(upload_id: str, param: str, tenant: str, uploads: Uploads) -> Upload:
    try:
        found = uploads.get(tenant, upload_id)
    except NotFound:
        raise Refused(
            f"invalid {param}: {upload_id} (no such file)", param=param, code="file_not_found"
        ) from None
    if found.purpose != PURPOSE:
        raise Refused(
            f"invalid {param}: {upload_id} has purpose {found.purpose!r}, expected {PURPOSE!r}",
            param=param,
            code="invalid_file_purpose",
        )
    return found


# ---- OpenAI's objects ------------------------------------------------------------------------------------


def job_object(job: Job) -> dict[str, Any]:
    asked = Create.model_validate(job.asked)
    values = dict(job.settled or {})
    done = job.status == "succeeded"
    return {
        "object": "fine_tuning.job",
        "id": job.id,
        "model": job.base,
        "created_at": job.created_at,
        "finished_at": job.finished_at,
        "fine_tuned_model": job.model if done else None,
        "organization_id": job.tenant,
        "result_files": [job.result_file] if job.result_file and done else [],
        "status": job.status,
        "validation_file": job.validation_file,
        "training_file": job.training_file,
        "hyperparameters": _said(asked.how.settings.model_dump(), values, _BASIC),
        "trained_tokens": job.trained_tokens,
        "error": dict(job.error) if job.error else None,
        "user_provided_suffix": asked.suffix,
        "seed": job.seed,
        "estimated_finish": job.estimated_finish,
        "integrations": [
            one.model_dump(exclude_none=True) for one in asked.integrations or ()
        ],
        "metadata": asked.metadata,
        "method": _method(asked, values),
        "luthier": {
            "planned": dict(job.planned) if job.planned else None,
            "rows": values.get("rows"),
            "validation_rows": values.get("validation_rows"),
            "release": job.release,
            "attempts": job.attempts,
        },
    }  # fmt: skip


_BASIC = ("n_epochs", "batch_size", "learning_rate_multiplier")


def _method(asked: Create, values: dict[str, Any]) -> dict[str, Any]:
    how = asked.how
    given = how.settings.model_dump()
    block: dict[str, Any] = {"hyperparameters": _said(given, values, tuple(given))}
    if how.reinforcement is not None:
        block["grader"] = how.reinforcement.grader
    return {"type": how.type, how.type: block}


def _said(given: dict[str, Any], values: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """What was asked for, "auto" as the number that it became once that is known."""
    return {name: values.get(name, given[name]) for name in names}


def event_object(told: Told) -> dict[str, Any]:
    return {
        "object": "fine_tuning.job.event",
        "id": told.id,
        "created_at": told.created_at,
        "level": told.level,
        "message": told.message,
        "type": told.type,
        "data": dict(told.data),
    }


def checkpoint_object(made: Checkpoint) -> dict[str, Any]:
    return {
        "object": "fine_tuning.job.checkpoint",
        "id": made.id,
        "created_at": made.created_at,
        "fine_tuned_model_checkpoint": made.model,
        "fine_tuning_job_id": made.job,
        "metrics": dict(made.metrics),
        "step_number": made.step,
    }


def page(objects: list[dict[str, Any]], more: bool) -> dict[str, Any]:
    ends = {"first_id": objects[0]["id"], "last_id": objects[-1]["id"]} if objects else {}
    return {"object": "list", "data": objects, "first_id": None, "last_id": None, **ends, "has_more": more}
