"""A job's files before it waits for a worker: every line is read, and written again as luthier's rows.

OpenAI's lines become rows that a recipe reads, line for line, so that a place in an error is still the line
of the upload. What cannot be carried over (tool calls, a weight of 0, pictures) is refused by its name and
line. The copy lies at `home/jobs/rows/`, named by the upload's SHA-256: what a job learns cannot change or go
while it runs, and the same upload gives the same dataset. It does not know tokens or bases.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier import artifacts, bases, metrics, training_file
from luthier.errors import DataError, LuthierError, StoreError
from luthier.home import Home
from luthier.jobs import spec
from luthier.jobs.asked import Create
from luthier.jobs.queue import Queue
from luthier.jobs.records import ENDED, Job, Note
from luthier.plugins import Part
from luthier.sources import _records
from luthier.store import Store
from luthier.training_file import Bounds, Example, Kind
from luthier.uploads import Uploads

KINDS = {"supervised": Kind.CHAT, "dpo": Kind.PREFERENCE, "reinforcement": Kind.REINFORCEMENT}
LEAST = 10  # examples that OpenAI wants of a training file
UNCARRIED = ("tools", "functions", "function_call", "tool_calls", "tool_call_id", "name", "refusal")
ROLES = {"developer": "system", "system": "system", "user": "user", "assistant": "assistant"}
LINE = re.compile(r":(\d+)(?:,|\s|$)")


class Wrong(Exception):
    """A file that cannot be learnt from, in the words of a job's `error`."""

    def __init__(self, code: str, message: str, param: str) -> None:
        super().__init__(message)
        self.code, self.message, self.param = code, message, param

    def as_dict(self) -> dict[str, str]:
        return {"code": self.code, "message": self.message, "param": self.param}


def examine(job: Job, queue: Queue, place: tuple[Store, Uploads, Home]) -> None:
    """Read both files; then the job is queued with its settings settled, or failed with the line."""
    try:
        settled = settle(job, place)
    except Wrong as wrong:
        queue.turned_down(job.id, wrong.as_dict())
        return
    except StoreError:
        raise  # the disk or the database, and no fault of this job's
    except LuthierError as error:
        queue.turned_down(job.id, {"code": "base_model_unusable", "message": error.what, "param": "model"})
        return
    counts = {name: settled[name] for name in ("rows", "validation_rows")}
    said = f"Files validated ({counts['rows']:,} examples); the job is queued"
    queue.examined(job.id, settled, Note(said, "validated", data=counts))


def settle(job: Job, place: tuple[Store, Uploads, Home]) -> dict[str, Any]:
    """Write the rows of both files and settle what depends on their number, or raise `Wrong`."""
    store, uploads, home = place
    counts = {file[0]: carry(job, uploads, home, file) for file in files(job)}
    rows = counts["training_file"]
    if rows < LEAST:
        said = f"Training file has {rows} example(s), but must have at least {LEAST} examples"
        raise Wrong("invalid_n_examples", said, "training_file")
    settled = spec.settled(Create.model_validate(job.asked), rows, counts.get("validation_file", 0))
    return settled | {"max_length": spec.longest(bases.find(store, job.base))}


def files(job: Job) -> Iterator[tuple[str, str, str]]:
    """Each file of a job: the field that names it, its id and its SHA-256."""
    yield "training_file", job.training_file, job.training_sha256
    if job.validation_file is not None and job.validation_sha256 is not None:
        yield "validation_file", job.validation_file, job.validation_sha256


def rows_path(home: Home, job: Job, sha256: str) -> Path:
    """Where the rows of an upload lie for jobs of this kind."""
    return home.path / relative(job, sha256)


def relative(job: Job, sha256: str) -> str:
    return f"jobs/rows/{sha256}-{KINDS[Create.model_validate(job.asked).how.type].value}.jsonl"


def _graded(job: Job) -> Part | None:
    """The grader that must find its fields in every row."""
    method = Create.model_validate(job.asked).how.reinforcement
    return None if method is None else metrics.read(method.grader)


def carry(job: Job, uploads: Uploads, home: Home, file: tuple[str, str, str]) -> int:
    """Check an upload and write its rows; returns how many there are, or raises `Wrong`."""
    param, upload_id, sha256 = file
    kind = KINDS[Create.model_validate(job.asked).how.type]
    try:
        source = uploads.path(uploads.get(job.tenant, upload_id))
        return write(source, rows_path(home, job, sha256), Carried(kind, param, _graded(job)))
    except LookupError as error:
        raise Wrong(f"invalid_{param}", "the file is gone", param) from error


@dataclass(frozen=True)
class Carried:
    """What a file is to be: the kind of its lines, the field that names it, the grader that reads them."""

    kind: Kind
    param: str
    grader: Part | None = None


def write(source: Path, target: Path, carried: Carried) -> int:
    """One of OpenAI's files as rows of luthier's; returns how many there are, or raises `Wrong`."""
    code, param = f"invalid_{carried.param}", carried.param
    try:
        found = training_file.check(source, Bounds(kind=carried.kind))
        if found.faults:
            raise Wrong(code, "\n".join(found.faults), param)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{secrets.token_hex(8)}")
        try:
            with temporary.open("w", encoding="utf-8") as out:
                count = sum(out.write(line) > 1 for line in _lines(source, carried))
                out.flush()
                os.fsync(out.fileno())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    except FileNotFoundError as error:
        raise Wrong(code, "the file is gone", param) from error
    except DataError as error:
        raise Wrong(code, error.what, param) from error
    return count


def _lines(source: Path, carried: Carried) -> Iterator[str]:
    """luthier's rows, each on the line that it had in the upload."""
    written = 0
    for number, record in _records.scan(source, source.name):
        yield from ("\n" for _ in range(number - written - 1))
        try:
            if isinstance(record, DataError):
                raise record
            row = as_row(training_file.read(record, number, carried.kind), record)
            if carried.grader is not None:
                metrics.check(carried.grader, row, f"line {number}")
        except DataError as error:
            raise Wrong(f"invalid_{carried.param}", f"line {number}: {error.what}", carried.param) from error
        yield artifacts.canonical(row).decode("utf-8") + "\n"
        written = number


def as_row(example: Example, record: Mapping[str, Any]) -> dict[str, Any]:
    """One of OpenAI's examples in the form that the data stage reads; `DataError` names what is not."""
    for where in (record, record.get("input", {})):
        for key in UNCARRIED:
            if where.get(key):
                raise DataError(
                    f"`{key}` is not supported: rows are text turns of system, user and assistant"
                )
    if example.kind is Kind.PREFERENCE:
        chosen, rejected = ([_turn(m) for m in side] for side in example.conversations)
        return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}
    turns = [_turn(message) for message in example.conversations[0]]
    if example.kind is Kind.REINFORCEMENT:
        return {"messages": turns, **{k: v for k, v in record.items() if k not in training_file.CHAT_KEYS}}
    return {"messages": turns}


def _turn(message: Mapping[str, Any]) -> dict[str, str]:
    role = ROLES.get(message["role"])
    if role is None:
        raise DataError(
            f"the role `{message['role']}` is not supported: no base here is taught to call tools"
        )
    for key in UNCARRIED:
        if message.get(key) is not None:
            raise DataError(f"`{key}` in a message is not supported")
    if message.get("weight") == 0:
        raise DataError("`weight: 0` is not supported: every turn of the assistant's is learnt")
    content = message["content"]
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    return {"role": role, "content": text}


def restore(job: Job, uploads: Uploads, home: Home) -> None:
    """Write rows again that are not there any more; raises `Wrong` where the upload is gone too."""
    for file in files(job):
        if not rows_path(home, job, file[2]).exists():
            carry(job, uploads, home, file)


def line_of(where: str | None) -> int | None:
    """The line that the place of an error names, if it names one."""
    found = LINE.search(where or "")
    return int(found[1]) if found else None


def forget(job: Job, queue: Queue, home: Home) -> None:
    """Remove the rows of a job that has ended, unless another that has not reads the same."""
    mine = {relative(job, sha256) for _, _, sha256 in files(job)}
    for other in queue.unfinished():
        mine -= {relative(other, sha256) for _, _, sha256 in files(other)}
    for name in mine if job.status in ENDED else ():
        (home.path / name).unlink(missing_ok=True)
