"""A grader's judges: models of this server asked as the caller, or those elsewhere that the operator named.

Each question is a request like any other: it takes the tenant's turn, leaves a record and is charged to the
caller's key. What a judge elsewhere reads and writes is not told here; it is charged as a token for every
four bytes. All questions of one run end together, at a given moment.
It does not know graders' forms or HTTP.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from luthier.errors import GraderError, LuthierError, ServeError
from luthier.http import problems
from luthier.keys import Caller
from luthier.metrics import Ask, Question
from luthier.rows import Message, Role
from luthier.serving.desk import Turn
from luthier.serving.limits import Busy
from luthier.serving.service import Options, Service
from luthier.serving.worker import End, Event, Failed, Said
from luthier.store import RequestRecord

BYTES_A_TOKEN = 4
Note = Callable[[RequestRecord, str], None]


class NotAsked(GraderError):
    """The judge gave no answer at all."""

    flag = "model_grader_server_error"


class OutOfTime(ServeError):
    """The judges of one run have taken all the time that it has."""


@dataclass(slots=True)
class Count:
    """What one question has cost so far, and who answers it."""

    release: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_token_s: float | None = None


class Judges:
    """Whom one run of a grader may ask, until `until_s` on the monotonic clock."""

    def __init__(
        self, service: Service, elsewhere: Mapping[str, Ask], who: Caller, note: Note, until_s: float
    ) -> None:
        self._service, self._elsewhere, self._who = service, elsewhere, who
        self._note, self._until_s = note, until_s
        self.model: str | None = None
        self.usage: dict[str, dict[str, int]] = {}

    def __call__(self, question: Question) -> str:
        self.model = question.model
        at, began_s = datetime.now(UTC).isoformat(timespec="milliseconds"), time.monotonic()
        count, status, failed = Count(), 500, "unknown"
        try:
            text = self._answer(question, count)
            status, failed = 200, ""
        except LuthierError as error:
            status, failed = problems.status(error), type(error).__name__
            if isinstance(error, GraderError):
                raise
            raise NotAsked(error.what, hint=error.hint) from error
        finally:
            self._used(question.model, count)
            record = RequestRecord(
                at=at, release=count.release, model=question.model[:256], status=status,
                prompt_tokens=count.prompt_tokens, completion_tokens=count.completion_tokens,
                first_token_s=count.first_token_s, total_s=time.monotonic() - began_s,
                error=failed or None, key_id=self._who.key_id, tenant=self._who.tenant,
            )  # fmt: skip
            self._note(record, self._who.tenant)
        return text

    def _answer(self, question: Question, count: Count) -> str:
        left_s = self._left_s()
        if question.model not in self._elsewhere:
            return self._here(question, count)
        count.prompt_tokens = sum(map(_size, (text for _, text in question.turns)))
        text = self._elsewhere[question.model](replace(question, within_s=left_s))
        count.completion_tokens = _size(text)
        return text

    def _here(self, question: Question, count: Count) -> str:
        turns = [Message(Role(role), text) for role, text in question.turns]
        options = Options(
            max_tokens=question.max_new_tokens, temperature=question.temperature, top_p=question.top_p,
            seed=question.seed,
        )  # fmt: skip
        target = self._service.router.resolve(question.model, self._who.tenant)
        count.release = target.release_digest
        turn = Turn(self._who.tenant)
        ask = self._service.prepare(target, turns, options, turn)
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        began_s = time.monotonic()
        cancel = self._service.submit(ask, events.put, turn)
        count.prompt_tokens = len(ask.prompt_ids)
        said: list[str] = []
        try:
            while True:
                event = self._next(events)
                if isinstance(event, Failed):
                    if isinstance(event.error, Busy) and not said:  # its place in the queue was lost
                        count.prompt_tokens = 0
                    raise event.error
                said.append(event.text)
                if isinstance(event, End):
                    return "".join(said)
                if isinstance(event, Said):
                    count.completion_tokens += 1
                    count.first_token_s = count.first_token_s or time.monotonic() - began_s
        finally:
            cancel()

    def _next(self, events: queue.SimpleQueue[Event]) -> Event:
        try:
            return events.get(timeout=self._left_s())
        except queue.Empty:
            raise _late() from None

    def _left_s(self) -> float:
        left_s = self._until_s - time.monotonic()
        if left_s <= 0:
            raise _late()
        return left_s

    def _used(self, model: str, count: Count) -> None:
        used = self.usage.setdefault(model, {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0})
        used["prompt_tokens"] += count.prompt_tokens
        used["completion_tokens"] += count.completion_tokens
        used["total_tokens"] += count.prompt_tokens + count.completion_tokens


def _size(text: str) -> int:
    return -(-len(text.encode("utf-8", "replace")) // BYTES_A_TOKEN)


def _late() -> OutOfTime:
    return OutOfTime("the judges took longer than one run of a grader may", hint="ask fewer, or shorter ones")
