"""What a finished run leaves for its job: the result file, checkpoints to ask, and the model's name.

Source: OpenAI's result CSV (step, train_loss, train_accuracy, valid_loss, valid_mean_token_accuracy), a file
of purpose `fine-tune-results`, and its checkpoints: the ends of the last three epochs. All of it is read from
the sealed artefact of the train stage, so work done again after a crash gives the same.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier import artifacts
from luthier.home import Home
from luthier.jobs.records import Checkpoint, Job, Won
from luthier.pipeline import Outcome
from luthier.tuned import Tuned
from luthier.uploads import Label, Uploads

COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")
PURPOSE = "fine-tune-results"
STEP = re.compile(r"step-(\d+)")


def gather(job: Job, outcome: Outcome, home: Home, uploads: Uploads) -> Won:
    """All that the last transaction of a job writes; the result file is put first, once."""
    record = outcome.stage("train")
    folder = home.artifact(record.digest)
    trained = {row["step"]: row for row in curve(outcome, home)}
    looks = {row["step"]: row for row in _journal(folder / "validation.jsonl")}
    release = outcome.stage("release").digest
    now = int(time.time())
    model = Tuned(job.model, job.tenant, job.id, job.base, job.id, release, created_at=now)
    models, checkpoints = [model], []
    for step in _kept(folder):
        name = f"{job.model}:ckpt-step-{step}"
        checkpoints.append(
            Checkpoint(
                f"ftckpt_{hashlib.sha256(name.encode()).hexdigest()[:24]}", job.id, step, name,
                _metrics(step, trained, looks), now,
            )
        )  # fmt: skip
        models.append(
            Tuned(name, job.tenant, job.id, job.base, job.id, release, record.digest, step, created_at=now)
        )
    table = _table(trained, looks)
    return Won(models, checkpoints, release, record.facts["useful_tokens"], _put(job, uploads, table))


def curve(outcome: Outcome, home: Home) -> list[Any]:
    """Every step that was trained, in order."""
    return _journal(home.artifact(outcome.stage("train").digest) / "curve.jsonl")


def _journal(path: Path) -> list[Any]:
    return list(artifacts.read_jsonl(path)) if path.exists() else []


def _kept(folder: Path) -> list[int]:
    """Steps whose adapter the training kept, the last ones."""
    found = [STEP.fullmatch(path.name) for path in (folder / "checkpoints").glob("step-*")]
    return sorted(int(match[1]) for match in found if match)


def _metrics(step: int, steps: Mapping[int, Any], looks: Mapping[int, Any]) -> dict[str, Any]:
    trained, looked = steps.get(step, {}), looks.get(step, {})
    found = {
        "step": step,
        "train_loss": trained.get("loss"),
        "train_mean_token_accuracy": trained.get("accuracy"),
        "valid_loss": looked.get("loss"),
        "valid_mean_token_accuracy": looked.get("accuracy"),
    }
    return {name: value for name, value in found.items() if value is not None}


def _table(steps: Mapping[int, Any], looks: Mapping[int, Any]) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for step in sorted(steps.keys() | looks.keys()):
        row = [steps.get(step, {}).get("loss"), steps.get(step, {}).get("accuracy")]
        row += [looks.get(step, {}).get("loss"), looks.get(step, {}).get("accuracy")]
        writer.writerow([step, *("" if value is None else value for value in row)])
    return out.getvalue().encode()


def _put(job: Job, uploads: Uploads, table: bytes) -> str:
    """The result file's id: of the one that an earlier attempt put, if it came so far."""
    name = f"{job.id}-step_metrics.csv"
    known, _ = uploads.list(job.tenant, purpose=PURPOSE)
    for upload in known:
        if upload.filename == name:
            return upload.id
    return uploads.put(job.tenant, Label(name, PURPOSE), io.BytesIO(table)).id
