"""The queue before the engine: bounded, fair to every tenant, and shadows last.

Whose turn it is: the tenant that was served least (virtual token counter; Sheng et al., OSDI 2024,
https://arxiv.org/abs/2401.00588): a prompt token counts one, a written token two, and who comes back from
idleness starts where the least served of the busy ones stands. When the queue is full, a newcomer takes the
place of the latest request of the tenant that waits most often (longest queue drop; Suter et al., INFOCOM
1998), so one tenant's flood is answered with 429 and no other tenant is. A `low` request starts only where
no other waits, and is dropped for the first that comes.

A queue that fills up in a burst and drains again does no harm; one that stands makes everybody late. So when
half the queue is full, until `RUSH_S` after the last refusal or until nothing is left to do, waiting is
bounded by time ("Fail at Scale", Maurer, ACM Queue 2015). The bound is `Limits.first_s`, or `PATIENCE` times
what reading a prompt alone takes, whichever is more: who has waited so long without a place is refused after
all, and a newcomer is let in only if its first token can be expected (`serving.pace`) in half of it. A tenant
with less than its share of the places may even then have one request wait for its next place, however long
that is.

Prompts are handed over in the order of their turns, so many at a time as can be read in `READING_S`.

It stands in front of any engine: a thread or a process. It does not know HTTP, keys or releases.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from luthier.errors import LuthierError, ServeError
from luthier.serving.limits import Counts, Limits, busy
from luthier.serving.pace import Pace, Running
from luthier.serving.router import Target
from luthier.serving.worker import Ask, End, Event, Failed, Said, Sink

WRITTEN = 2.0  # what a written token costs beside a read one
QUEUE = 4096  # the desk bounds the queue; the engine's own behind it only has to be no narrower
RUSH_S = 2.0
PATIENCE = 4.0  # of a prompt's own reading time: a slow model may let wait longer
SURE = 0.5  # of what is bearable: what is foreseen comes about only so often
READING_S = 0.3
LOOK_S = 0.05  # between two looks for requests that have waited too long
TENANTS = 10_000  # counters kept; the least served of the idle are forgotten beyond


@dataclass(frozen=True, slots=True)
class Turn:
    """Whose request it is. A `low` one waits for idle room and gives way to any other. `more`: one of many
    answers of a request for all of which room was found, so that they come in together."""

    tenant: str = "local"
    low: bool = False
    more: bool = False


class Dropped(ServeError):
    """A low-priority request gave way; nobody was waiting for its answer."""


class Engine(Protocol):
    """What answers: `worker.Worker` in this process, or `engine_process.EngineProcess` beside it."""

    def start(self) -> None: ...
    def submit(self, ask: Ask, sink: Sink) -> Callable[[], None]: ...
    def require_room(self) -> None: ...
    def warm(self, target: Target) -> None: ...
    def counts(self) -> Counts: ...
    @property
    def alive(self) -> bool: ...
    def close(self, grace_s: float) -> None: ...


@dataclass(slots=True, eq=False)
class _Line:
    ask: Ask
    sink: Sink
    turn: Turn
    cancelled: bool = False
    stop: Callable[[], None] | None = None  # cancels it in the engine, once it is there
    until_s: float = math.inf  # when it has waited too long
    handed_s: float = 0.0
    heard_s: float = 0.0  # when it was last heard of; 0: its prompt is being read
    before: int = 0  # prompt tokens to be read until its first word, when it was handed over
    said: int = 0


class Desk:
    """The engine's own interface, with turns: submit, require_room, warm, counts, alive, close."""

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self.engine = engine
        self._limits = limits
        self._changed = threading.Condition()
        self._waiting: dict[str, deque[_Line]] = {}
        self._low: deque[_Line] = deque()
        self._running: list[_Line] = []
        self._served: dict[str, float] = {}
        self._closing = False
        self._pace = Pace()
        self._look_s = self._rush_until_s = 0.0

    def start(self) -> None:
        self.engine.start()

    def submit(self, ask: Ask, sink: Sink, turn: Turn | None = None) -> Callable[[], None]:
        """Queue an answer; returns what cancels it. Raises `Busy`, or a `ServeError`."""
        turn = turn or Turn()
        line = _Line(replace(ask, salt=turn.tenant), sink, turn)  # no tenant can time another's prompts
        self.engine.require_room()
        with self._changed:
            out, why = self._admit(line), self._full()
        if out is not None:
            out.sink(Failed(why))
        self._fill()
        return partial(self._cancel, line)

    def require_room(self, turn: Turn | None = None, answers: int = 1) -> None:
        """Raise what `submit` would raise now to the last of so many, before work is spent on a request."""
        self.engine.require_room()
        with self._changed:
            self._require_room(turn or Turn(), answers)

    def roomy(self) -> bool:
        """Whether one more that can wait may come: half the queue is free for others even then."""
        with self._changed:
            idle = max(0, self._limits.active - len(self._places()))
            free = self._limits.waiting + idle - self._length()
            return free > self._limits.waiting // 2

    def warm(self, target: Target) -> None:
        self.engine.warm(target)

    def counts(self) -> Counts:
        """What the engine tells, with the queue that stands before it."""
        with self._changed:
            running, waiting = len(self._running), self._length() + len(self._low)
        return replace(self.engine.counts(), active=running, waiting=waiting)

    @property
    def alive(self) -> bool:
        return self.engine.alive

    def close(self, grace_s: float) -> None:
        """Refuse new requests, let others finish for up to `grace_s`, fail what is left, end the engine."""
        until_s = time.monotonic() + grace_s
        with self._changed:
            self._closing = True
            lows = [*self._low]
            self._low.clear()
        for line in lows:
            line.sink(Failed(Dropped("the server is shutting down")))
        with self._changed:
            while (self._running or self._length()) and (left_s := until_s - time.monotonic()) > 0:
                self._changed.wait(left_s)
            late = [line for lines in self._waiting.values() for line in lines]
            self._waiting.clear()
        self.engine.close(max(0.0, until_s - time.monotonic()))
        for line in late:
            line.sink(Failed(_closing()))

    # ---- who may come in, under the lock ---------------------------------------------------------------

    def _length(self) -> int:
        return sum(map(len, self._waiting.values()))

    def _places(self) -> list[_Line]:
        return [line for line in self._running if not line.turn.low]

    def _running_now(self) -> list[Running]:
        return [_seen(line) for line in self._places()]

    def _late_s(self) -> float:
        """How much too late a newcomer's first token is to be expected; 0 or less: it is not too late."""
        running = self._running_now()
        ahead = [len(line.ask.prompt_ids) for lines in self._waiting.values() for line in lines]
        if not ahead and len(running) < self._limits.active and not any(one.unread for one in running):
            return 0.0  # whatever was measured: it will be measured anew
        return self._pace.first_s(running, ahead, self._limits.active) - SURE * self._bearable_s()

    def _bearable_s(self) -> float:
        return max(self._limits.first_s, PATIENCE * self._pace.own_s())

    def _full(self) -> ServeError:
        """The refusal, with the time until it would not be given: to a late one, or for a full queue."""
        next_s = self._pace.place_s(self._running_now(), 0, self._limits.active)
        wait_s = late_s if (late_s := self._late_s()) > 0 else next_s
        return busy(self._length(), min(60, max(1, math.ceil(wait_s))))

    def _owed(self, tenant: str) -> bool:
        """Whether other tenants hold places that are this one's share, and it waits for none yet."""
        running = [line.turn.tenant for line in self._places()]
        others = {name for name, lines in self._waiting.items() if lines} | set(running) | {tenant}
        return len(others) > 1 and not self._waiting.get(tenant) and (
            running.count(tenant) < self._limits.active / len(others)
        )  # fmt: skip

    def _free(self) -> int:
        """How many more may come before the queue is full; a rush begins when it is more than half full."""
        idle = max(0, self._limits.active - len(self._places()))
        free = self._limits.waiting + idle - self._length()
        if free < self._limits.waiting // 2:
            self._rush_until_s = time.monotonic() + RUSH_S
        return max(0, free)

    def _too_late(self, tenant: str) -> bool:
        """Whether a newcomer of this tenant could not be answered in time, and that matters now."""
        rush = time.monotonic() < self._rush_until_s
        return rush and self._late_s() > 0 and not self._owed(tenant)

    def _require_room(self, turn: Turn, answers: int = 1) -> None:
        """A tenant is refused when the room is full and nobody waits more often than it does."""
        if self._closing:
            raise _closing()
        if turn.low:
            if self._length() or len(self._low) >= self._limits.active:
                raise Dropped("no room for a low-priority request")
            return
        free = self._free()
        places = 0 if self._too_late(turn.tenant) else free
        waits = Counter({tenant: len(lines) for tenant, lines in self._waiting.items()})
        waits[turn.tenant] += min(places, answers)
        for _ in range(places, answers):
            longest = max(waits, key=lambda tenant: waits[tenant])
            if waits[turn.tenant] + 1 >= waits[longest]:
                self._rush_until_s = time.monotonic() + RUSH_S
                raise self._full()
            waits[longest] -= 1
            waits[turn.tenant] += 1

    def _admit(self, line: _Line) -> _Line | None:
        """Queue it; returns the request whose place it took, if it took one."""
        tenant, more = line.turn.tenant, line.turn.more
        if self._closing or not more:
            self._require_room(line.turn)
        if line.turn.low:
            self._low.append(line)
            return None
        pushed = None
        if not self._free() or (not more and self._too_late(tenant)):
            pushed = self._push(tenant)
        if not (more or self._owed(tenant)):
            line.until_s = time.monotonic() + self._bearable_s()
        if tenant not in self._waiting and not any(other.turn.tenant == tenant for other in self._running):
            self._catch_up(tenant)
        self._waiting.setdefault(tenant, deque()).append(line)
        return pushed

    def _push(self, tenant: str) -> _Line | None:
        """Take out the latest of whoever waits most often, if that is not this tenant itself."""
        longest = max(self._waiting, key=lambda name: len(self._waiting[name]), default=tenant)
        if longest == tenant or not self._waiting[longest]:
            return None
        pushed = self._waiting[longest].pop()
        pushed.cancelled = True
        return pushed

    def _overdue(self, now_s: float) -> list[_Line]:
        """Take out those who have waited too long, a few times a second."""
        if now_s < self._look_s or now_s > self._rush_until_s:
            return []
        self._look_s = now_s + LOOK_S
        late = [line for lines in self._waiting.values() for line in lines if line.until_s <= now_s]
        for line in late:
            line.cancelled = True
            self._waiting[line.turn.tenant].remove(line)
        return late

    def _catch_up(self, tenant: str) -> None:
        """Idleness is not saved up: a tenant that comes back stands beside the least served busy one."""
        busy_now = {*self._waiting, *(line.turn.tenant for line in self._running)}
        floor = min((self._served.get(name, 0.0) for name in busy_now), default=0.0)
        self._served[tenant] = max(self._served.get(tenant, 0.0), floor)
        if len(self._served) > TENANTS:
            for name in sorted(
                self._served.keys() - busy_now - {tenant}, key=lambda name: self._served[name]
            ):
                del self._served[name]
                break

    # ---- whose turn it is ------------------------------------------------------------------------------

    def _fill(self) -> None:
        """Hand lines to the engine while it has places; never under the lock, for it may call back."""
        while True:
            with self._changed:
                line, gives_way = self._next()
            if gives_way is not None:
                if gives_way.stop is not None:
                    gives_way.stop()
                gives_way.sink(Failed(Dropped("gave way to a request that someone waits for")))
            if line is None:
                return
            try:
                stop = self.engine.submit(line.ask, partial(self._heard, line))
            except LuthierError as error:
                self._heard(line, Failed(error))
                continue
            with self._changed:
                line.stop = stop
            if line.cancelled:  # while it was being handed over
                stop()

    def _next(self) -> tuple[_Line | None, _Line | None]:
        """The line to start now, and the low one that must go for it."""
        self._waiting = {tenant: lines for tenant, lines in self._waiting.items() if lines}
        gives_way = None
        unread = sum(len(line.ask.prompt_ids) for line in self._running if not line.heard_s)
        if unread and self._pace.reading_s(unread) >= READING_S:
            return None, None
        if len(self._running) >= self._limits.active:
            lows = [line for line in self._running if line.turn.low]
            if not lows or not self._waiting:
                return None, None
            gives_way = lows[-1]
            gives_way.cancelled = True
            self._running.remove(gives_way)
        if self._waiting:
            tenant = min(self._waiting, key=lambda name: self._served.get(name, 0.0))
            line = self._waiting[tenant].popleft()
        elif self._low:
            line = self._low.popleft()
        else:
            return None, None
        self._running.append(line)
        line.handed_s = time.monotonic()
        line.before = sum(len(one.ask.prompt_ids) for one in self._running if not one.heard_s)
        self._charge(line, float(len(line.ask.prompt_ids)))
        return line, gives_way

    def _charge(self, line: _Line, cost: float) -> None:
        if not line.turn.low:
            tenant = line.turn.tenant
            self._served[tenant] = self._served.get(tenant, 0.0) + cost

    def _heard(self, line: _Line, event: Event) -> None:
        """The place is free before the last event is told, so whoever hears it can ask again."""
        ended = isinstance(event, End | Failed)
        with self._changed:
            if line.cancelled:
                return
            now_s = time.monotonic()
            room = ended or not line.heard_s  # a place, or one prompt less to read
            self._learn(line, event, now_s)
            if isinstance(event, Said):
                self._charge(line, WRITTEN)
            if ended:
                self._leave(line)
            late = self._overdue(now_s)
            why = self._full() if late else None
        for one in late:
            assert why is not None
            one.sink(Failed(why))
        line.sink(event)
        if room:
            self._fill()

    def _learn(self, line: _Line, event: Event, now_s: float) -> None:
        prompt, most = len(line.ask.prompt_ids), line.ask.sampling.max_new_tokens
        if not line.heard_s and not isinstance(event, Failed):
            self._pace.read(now_s - line.handed_s, line.before, prompt)
        elif isinstance(event, Said):
            self._pace.wrote(now_s - line.heard_s)
        line.heard_s = now_s
        line.said += isinstance(event, Said)
        if isinstance(event, End):
            self._pace.ended(line.said, most)

    def _leave(self, line: _Line) -> None:
        if line in self._running:
            self._running.remove(line)
        if not self._running and not self._length():
            self._rush_until_s = 0.0
        self._changed.notify_all()

    def _cancel(self, line: _Line) -> None:
        with self._changed:
            if line.cancelled:
                return
            line.cancelled = True
            queue = self._low if line.turn.low else self._waiting.get(line.turn.tenant, deque())
            if line in queue:
                queue.remove(line)
            self._leave(line)
            stop = line.stop
        if stop is not None:
            stop()
        self._fill()


def _closing() -> ServeError:
    return ServeError("the server is shutting down", hint="ask again when it is back")


def _seen(line: _Line) -> Running:
    unread = 0 if line.heard_s else len(line.ask.prompt_ids)
    return Running(line.said, line.ask.sampling.max_new_tokens, unread)
