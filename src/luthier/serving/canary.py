"""Canaries under watch: every answer of both arms goes to the split's trial; a lost trial ends the canary.

Ending it is one row (with the figures of the verdict), one event and one line in the log; the next request
of any server that shares the store is the champion's again. Figures are this process's own: a second server
over the same store watches its own traffic, and whichever is sure first aborts. A restarted server begins
its count anew. It does not know HTTP, tokens or who asks.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict, deque
from dataclasses import dataclass, field

from luthier import artifacts
from luthier.errors import LuthierError
from luthier.home import Home
from luthier.serving.splits import Action, Split, Splits
from luthier.serving.verdict import Answer, Baseline, Trial
from luthier.store import RequestRecord, Store

ACTOR = "luthier"
WATCHES = 64  # splits under watch at the same time; the oldest is forgotten beyond
LINE = 256  # answers that may wait for an earlier one to end; then that one counts as it stands

log = logging.getLogger("luthier.serving")


@dataclass(slots=True, eq=False)
class Ticket:
    """One answer of one arm, from the moment it began."""

    watch: _Watch
    canary: bool
    ended: bool = False
    answer: Answer | None = None

    def end(self, record: RequestRecord | None) -> None:
        """Call once, whatever became of it; without a record it says nothing about its release."""
        self.watch.end(self, answer_of(record) if record is not None else None)

    def fail(self) -> None:
        """The release could not even be asked."""
        self.watch.end(self, Answer(True))


class Canaries:
    def __init__(self, store: Store, home: Home, splits: Splits) -> None:
        self._store = store
        self._home = home
        self._splits = splits
        self._watches: OrderedDict[str, _Watch] = OrderedDict()
        self._lock = threading.Lock()

    def begin(self, split: Split, canary: bool) -> Ticket:
        """An answer begins. The baselines are read when a split is first met."""
        with self._lock:
            watch = self._watches.get(split.id)
            if watch is None:
                arms = (self.baseline(split.name, split.champion), self.baseline(split.name, split.digest))
                watch = _Watch(split, Trial(split.percent / 100, *arms), self)
                self._watches[split.id] = watch
                while len(self._watches) > WATCHES:
                    self._watches.popitem(last=False)
        return watch.begin(canary)

    def baseline(self, name: str, digest: str) -> Baseline:
        """What the release's own evaluation observed; nothing where it has none."""
        try:
            facts = self._store.release(name, digest).facts
            if "evaluate" not in facts:
                return Baseline()
            folder = self._home.artifact(str(facts["evaluate"]))
            seen = artifacts.read_json(folder / "observed" / "efficiency.json")
            return Baseline(seen["errors"] / max(1, seen["requests"]), seen["latency"]["p95"])
        except (LuthierError, OSError, KeyError, TypeError) as error:
            log.warning("release %s has no baseline to be held against: %s", digest[:12], error)
            return Baseline()

    def abort(self, split: Split, trial: Trial) -> None:
        """In a thread of its own: no answer waits for it."""
        threading.Thread(target=self._abort, args=(split, trial.figures()), daemon=True).start()

    def _abort(self, split: Split, figures: dict[str, object]) -> None:
        log.error("canary %s of %s is aborted: it %s", split.digest[:12], split.name, figures["verdict"])
        try:
            self._splits.end(split, Action.ABORT, ACTOR, str(figures["verdict"]), figures)
            self._store.record_event(
                "canary_aborted", {"name": split.name, "digest": split.digest, "split": split.id, **figures}
            )
        except LuthierError as error:
            log.warning("the canary of %s was ended by someone else: %s", split.name, error)


@dataclass(slots=True, eq=False)
class _Watch:
    """One split's trial. Answers are told to it in the order they began, not in that they ended."""

    split: Split
    trial: Trial
    canaries: Canaries
    line: deque[Ticket] = field(default_factory=deque)
    lock: threading.Lock = field(default_factory=threading.Lock)
    over: bool = False

    def begin(self, canary: bool) -> Ticket:
        ticket = Ticket(self, canary)
        with self.lock:
            self.line.append(ticket)
        return ticket

    def end(self, ticket: Ticket, answer: Answer | None) -> None:
        with self.lock:
            if ticket.ended:
                return
            ticket.ended, ticket.answer = True, answer
            while self.line and (self.line[0].ended or len(self.line) > LINE):
                self._tell(self.line.popleft())
            lost = self.trial.verdict is not None and not self.over
            self.over |= lost
        if lost:
            self.canaries.abort(self.split, self.trial)

    def _tell(self, ticket: Ticket) -> None:
        answer = ticket.answer
        if not ticket.ended:  # so long that hundreds ended after it began: slow, by any measure
            answer, ticket.ended = Answer(False, float("inf"), None, float("inf")), True
        if answer is not None:
            (self.trial.canary if ticket.canary else self.trial.champion)(answer)


def answer_of(record: RequestRecord) -> Answer | None:
    """What a request says about its release; None where it says nothing (the request's or the queue's fault).

    Someone who left had waited that long: a release that nobody waits for must not look quick.
    """
    if record.status == 499:
        return Answer(False, record.first_token_s or record.total_s)
    if record.status == 503 or 400 <= record.status < 500:
        return None
    if record.status >= 500:
        return Answer(True)
    first_s, tokens = record.first_token_s, record.completion_tokens
    token_s = (record.total_s - first_s) / (tokens - 1) if first_s is not None and tokens > 1 else None
    return Answer(False, first_s, token_s, record.total_s)
