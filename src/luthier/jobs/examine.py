"""A job's files before it waits for a worker: every line is read, and written again as luthier's rows.

OpenAI's lines become rows that a recipe reads, line for line, so that a place in an error is still the line
of the upload. What cannot be carried over (pictures, names of speakers, the old form of tools) is refused by
its name and line. The copy lies at `home/jobs/rows/`, named by the upload's SHA-256: what a job learns cannot
change or go while it runs, and the same upload gives the same dataset. The copies that a tenant's unfinished
jobs read must fit into the room that its files leave. It does not know tokens or bases.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier import artifacts, bases, metrics, rows, training_file
from luthier.errors import DataError, LuthierError, StoreError
from luthier.home import Home
from luthier.jobs import spec
from luthier.jobs.asked import Create
from luthier.jobs.queue import Queue
from luthier.jobs.records import ENDED, Job, Note
from luthier.plugins import Part
from luthier.sources import _records
from luthier.store import Store
from luthier.training_file import Bounds, Kind
from luthier.uploads import Uploads

KINDS = {"supervised": Kind.CHAT, "dpo": Kind.PREFERENCE, "reinforcement": Kind.REINFORCEMENT}
LEAST = 10  # examples that OpenAI wants of a training file
UNCARRIED = ("functions", "function_call")  # the old form of tools
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
    except Exception as error:  # noqa: BLE001 - a bug that one job meets must not stop everybody's
        said = f"the job cannot be examined ({type(error).__name__})"
        queue.turned_down(job.id, {"code": "internal_error", "message": said, "param": None})
        return
    counts = {name: settled[name] for name in ("rows", "validation_rows")}
    said = f"Files validated ({counts['rows']:,} examples); the job is queued"
    queue.examined(job.id, settled, Note(said, "validated", data=counts))


def settle(job: Job, place: tuple[Store, Uploads, Home]) -> dict[str, Any]:
    """Write the rows of both files and settle what depends on their number, or raise `Wrong`."""
    store, uploads, home = place
    others = [one for one in Queue(store).unfinished() if one.tenant == job.tenant]
    counts = {file[0]: carry(job, uploads, home, file, others) for file in files(job)}
    count = counts["training_file"]
    if count < LEAST:
        said = f"Training file has {count} example(s), but must have at least {LEAST} examples"
        raise Wrong("invalid_n_examples", said, "training_file")
    settled = spec.settled(Create.model_validate(job.asked), count, counts.get("validation_file", 0))
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


def carry(
    job: Job, uploads: Uploads, home: Home, file: tuple[str, str, str], others: Sequence[Job] | None = None
) -> int:
    """Check an upload and write its rows; returns how many there are, or raises `Wrong`. With `others`, the
    tenant's jobs, there must be room for them; rows that had room once are written again without it."""
    param, upload_id, sha256 = file
    kind = KINDS[Create.model_validate(job.asked).how.type]
    target = rows_path(home, job, sha256)
    most = None
    if others is not None:
        most = uploads.room(job.tenant) - _copied((job, *others), home, target)
    try:
        source = uploads.path(uploads.get(job.tenant, upload_id))
        return write(source, target, Carried(kind, param, _graded(job), most))
    except LookupError as error:
        raise Wrong(f"invalid_{param}", "the file is gone", param) from error


def _copied(jobs: Sequence[Job], home: Home, but: Path) -> int:
    """How many bytes the rows of these jobs hold, each file of rows counted once."""
    paths = {rows_path(home, job, sha256) for job in jobs for _, _, sha256 in files(job)} - {but}
    return sum(path.stat().st_size for path in paths if path.exists())


@dataclass(frozen=True)
class Carried:
    """What a file is to be: the kind of its lines, the field that names it, the grader that reads them, and
    how many bytes its rows may be."""

    kind: Kind
    param: str
    grader: Part | None = None
    most: int | None = None


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
                count = sum(out.write(line) > 1 for line in _fitting(_lines(source, carried), carried))
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
            training_file.read(record, number, carried.kind)
            row = as_row(record, carried.kind, f"line {number}")
            if carried.grader is not None:
                metrics.check(carried.grader, row, f"line {number}")
        except DataError as error:
            place = error.where if (error.where or "").startswith("line ") else f"line {number}"
            raise Wrong(f"invalid_{carried.param}", f"{place}: {error.what}", carried.param) from error
        yield artifacts.canonical(row).decode("utf-8") + "\n"
        written = number


def _fitting(lines: Iterator[str], carried: Carried) -> Iterator[str]:
    """The lines, as long as there is room for them."""
    size = 0
    for line in lines:
        size += len(line.encode("utf-8"))
        if carried.most is not None and size > carried.most:
            said = (
                f"the rows of this file need more than the {max(0, carried.most)} bytes that are left to you"
            )
            raise Wrong("storage_quota_exceeded", f"{said}; delete files or wait for a job", carried.param)
        yield line


def as_row(record: Mapping[str, Any], kind: Kind, where: str) -> dict[str, Any]:
    """One of OpenAI's examples in the form that the data stage reads; `DataError` names what is not."""
    asked = record["input"] if kind is Kind.PREFERENCE else record
    for key in UNCARRIED:
        if asked.get(key):
            raise DataError(f"`{key}` is not supported; write `tools`", where=where)
    for message in (*asked["messages"], *record.get("preferred_output", ())):
        if message.get("name") is not None:
            raise DataError("`name` in a message is not supported: no template here shows it", where=where)
    tools = asked.get("tools")
    if kind is Kind.PREFERENCE:
        sides = record["preferred_output"], record["non_preferred_output"]
        row = rows.pair(asked["messages"], *sides, where, tools).as_record()
    elif kind is Kind.REINFORCEMENT:
        item = {key: value for key, value in record.items() if key not in training_file.CHAT_KEYS}
        if tools:
            raise DataError("`tools` is not supported: a grader reads text", where=where)
        row = {"messages": rows.dicts(rows.prompt(asked["messages"], item, where).prompt), **item}
    else:
        row = rows.chat(asked["messages"], where, tools).as_record()
    return {key: value for key, value in row.items() if key not in ("id", "where")}


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
