"""The engine in a process of its own, and the supervisor that brings it back.

The event loop and the decode loop do not share an interpreter lock, and a crash of the engine (a signal, a
segfault, the kernel's out-of-memory killer) is not a crash of the server: an answer that had begun ends in
an error, never in a `finish_reason`; one that had not is asked once more of the next engine. Restarts wait
longer each time (exponential backoff); after `CRASHES` within `WINDOW_S` the circuit opens (Nygard, Release
It!): requests get 503 with Retry-After for `OPEN_S`, then one more start is tried.

An engine that hangs is killed, which is a crash like any other: one that gives no sign of life for `SILENT`
ticks, or that gets no step done for `STUCK` ticks while answers are under way. Ticks are counted, not read
from a clock, so a server that was itself stopped for an hour finds nothing amiss. `STUCK` allows for a base
that loads from a slow disk, `UNREADY` for the imports before an engine first says that it is ready.

The interface is the worker's own. It does not know queues, tenants, HTTP or tokens.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path

from luthier.errors import LuthierError, ServeError
from luthier.serving import wire
from luthier.serving.limits import Counts, Limits
from luthier.serving.link import Link, Message
from luthier.serving.router import Target
from luthier.serving.worker import Ask, End, EngineFailed, Event, Failed, Sink

CRASHES, WINDOW_S, OPEN_S = 5, 60.0, 30.0
BACKOFF_S = (0.0, 0.5, 1.0, 2.0, 4.0)
TICK_S, SILENT, STUCK, UNREADY = 1.0, 20, 300, 120
LAST_S = 5.0  # beyond the grace time, before an engine that does not end is killed

log = logging.getLogger("luthier.serving")


class State(StrEnum):
    STARTING = "starting"
    READY = "ok"
    RESTARTING = "restarting"
    FAILED = "failed"
    CLOSED = "closed"


class Unavailable(ServeError):
    """The engine keeps crashing; it will be tried again `retry_after_s` from now."""

    retry_after_s = 1


@dataclass(slots=True, eq=False)
class _Line:
    ask: Ask
    sink: Sink
    begun: bool = False
    tries: int = 0


@dataclass(slots=True, eq=False)
class _Chore:
    target: Target
    done: Future[None]
    tries: int = 0


class EngineProcess:
    def __init__(self, limits: Limits, threads: int | None = None) -> None:
        self._limits = limits
        self._threads = threads
        self._lock = threading.RLock()
        self._numbers = itertools.count(1)
        self._lines: dict[int, _Line] = {}
        self._chores: dict[int, _Chore] = {}
        self._warm: OrderedDict[str, Target] = OrderedDict()  # loaded again after a crash
        self._crashes: deque[float] = deque(maxlen=CRASHES)
        self._open_until_s = 0.0
        self._counts = wire.NOTHING
        self._process: subprocess.Popen[bytes] | None = None
        self._link: Link | None = None
        self._stop = threading.Event()
        self._heard = 0  # messages of all engines so far
        self._thread = threading.Thread(target=self._supervise, name="luthier-engine", daemon=True)
        self._watcher = threading.Thread(target=self._watch, name="luthier-watch", daemon=True)
        self.state = State.STARTING
        self.restarts = 0

    def start(self) -> None:
        self._thread.start()
        self._watcher.start()

    def submit(self, ask: Ask, sink: Sink) -> Callable[[], None]:
        """Ask the engine; returns what cancels it. While it restarts, the ask waits for the next one."""
        with self._lock:
            self.require_room()
            number = next(self._numbers)
            self._lines[number] = line = _Line(ask, sink)
            self._send(number, line)
        return partial(self._cancel, number)

    def require_room(self) -> None:
        if self._stop.is_set():
            raise _closing()
        left_s = self._open_until_s - time.monotonic()
        if left_s > 0:
            raise _unavailable(left_s)

    def warm(self, target: Target) -> None:
        """Load a release ahead of its first request; blocks until it is ready, raises what went wrong."""
        done: Future[None] = Future()
        with self._lock:
            self.require_room()
            number = next(self._numbers)
            self._chores[number] = chore = _Chore(target, done)
            self._send(number, chore)
        done.result()
        with self._lock:
            self._warm[target.release_digest] = target
            self._warm.move_to_end(target.release_digest)
            while len(self._warm) > self._limits.adapters:
                self._warm.popitem(last=False)

    def counts(self) -> Counts:
        return self._counts

    @property
    def alive(self) -> bool:
        return self.state in (State.STARTING, State.READY)

    @property
    def pid(self) -> int | None:
        """The engine's process, while there is one."""
        return self._process.pid if self._process is not None else None

    def close(self, grace_s: float) -> None:
        """Refuse new requests, let others finish for up to `grace_s`, fail what is left, end the process."""
        with self._lock:
            self._stop.set()
            link, process = self._link, self._process
            if link is not None:
                link.post({"do": "close", "grace_s": grace_s})
        if process is not None:
            try:
                process.wait(grace_s + LAST_S)
            except subprocess.TimeoutExpired:
                process.kill()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()
        self.state = State.CLOSED
        self._fail_all(_closing())

    def _cancel(self, number: int) -> None:
        with self._lock:
            if self._lines.pop(number, None) is not None and self._link is not None:
                self._link.post({"do": "cancel", "id": number})

    def _send(self, number: int, what: _Line | _Chore) -> None:
        """Post it, if there is an engine; whatever was not posted is when the next one is ready."""
        if self._link is None:
            return
        what.tries += 1
        if isinstance(what, _Line):
            self._link.post({"do": "submit", "id": number, "ask": wire.from_ask(what.ask)})
        else:
            self._link.post({"do": "warm", "id": number, "target": wire.from_target(what.target)})

    # ---- below: the supervisor's thread ----------------------------------------------------------------

    def _supervise(self) -> None:
        while not self._stop.is_set():
            try:
                self._live()
            except Exception:  # a bug here must not leave clients waiting: it counts as a crash
                log.exception("the engine's supervisor failed; the engine is started again")
            if self._stop.is_set():
                return
            self._mourn()
            self._rest()

    def _live(self) -> None:
        """One engine, from its start to its end."""
        mine, its = socket.socketpair()
        with its:
            process = self._spawn(its)
        link = Link(mine)
        link.post({"limits": asdict(self._limits), "threads": self._threads})
        with self._lock:
            self._process = process
            if self._stop.is_set():
                link.post({"do": "close", "grace_s": 0.0})
        try:
            for message in link.messages():
                self._hear(message, link)
        finally:
            with self._lock:
                self._link = None
            link.cut()
            process.kill()
            process.wait()

    def _watch(self) -> None:
        """Kill an engine that hangs; the supervisor sees it end and goes on from there."""
        watched: tuple[int, int] = (0, 0)
        silent = stuck = unready = 0
        last: subprocess.Popen[bytes] | None = None
        while not self._stop.wait(TICK_S):
            with self._lock:
                process, busy = self._process, bool(self._lines or self._chores)
                ready = self._link is not None
            before, watched = watched, (self._heard, self._counts.turns)
            silent = silent + 1 if ready and watched[0] == before[0] else 0
            stuck = stuck + 1 if ready and busy and watched[1] == before[1] else 0
            unready = unready + 1 if not ready and process is last else 0
            last = process
            why = _hangs(silent, stuck, unready)
            if process is not None and why is not None:
                log.error("the engine hangs (%s) and is killed", why)
                process.kill()
                silent = stuck = unready = 0

    def _spawn(self, its: socket.socket) -> subprocess.Popen[bytes]:
        package = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "luthier.serving.engine_child", str(its.fileno())],
            pass_fds=(its.fileno(),),
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=2,  # stdout belongs to whoever started the server
            start_new_session=True,  # Ctrl-C is for the server, which then says what to do
        )

    def _hear(self, message: Message, link: Link) -> None:
        self._heard += 1
        if "event" in message:
            self._tell(message["id"], wire.to_event(message["event"]))
        elif "counts" in message:
            self._counts = wire.to_counts(message["counts"])
        elif "warmed" in message:
            with self._lock:
                chore = self._chores.pop(message["warmed"], None)
            if chore is not None and message["problem"] is None:
                chore.done.set_result(None)
            elif chore is not None:
                chore.done.set_exception(wire.to_error(message["problem"]))
        elif "ready" in message:
            self._ready(link)

    def _ready(self, link: Link) -> None:
        with self._lock:
            self._link = link
            self.state = State.READY
            asked = {chore.target.release_digest for chore in self._chores.values()}
            for digest, target in self._warm.items():
                if digest not in asked:
                    link.post({"do": "warm", "id": 0, "target": wire.from_target(target)})
            for number, chore in self._chores.items():
                self._send(number, chore)
            for number, line in self._lines.items():
                self._send(number, line)

    def _tell(self, number: int, event: Event) -> None:
        with self._lock:
            line = self._lines.get(number)
            if line is None:
                return
            line.begun = True
            if isinstance(event, End | Failed):
                del self._lines[number]
        try:
            line.sink(event)
        except Exception:
            log.exception("a listener failed; its request is cancelled")
            self._cancel(number)

    def _mourn(self) -> None:
        """Tell the begun that there will be no more, and the rest too if it was their second engine."""
        code = self._process.returncode if self._process is not None else None
        log.error("the engine ended unasked (exit code %s); it is started again", code)
        with self._lock:
            self.restarts += 1
            self.state = State.RESTARTING
            self._counts = wire.NOTHING
            lost = [(number, line) for number, line in self._lines.items() if line.begun or line.tries > 1]
            for number, _ in lost:
                del self._lines[number]
            chores = [(number, chore) for number, chore in self._chores.items() if chore.tries > 1]
            for number, _ in chores:
                del self._chores[number]
        for _, line in lost:
            line.sink(Failed(_died()))
        for _, chore in chores:
            chore.done.set_exception(_died())

    def _rest(self) -> None:
        """Back off; or, after too many crashes, open the circuit for a while."""
        now = time.monotonic()
        self._crashes.append(now)
        recent = sum(now - at < WINDOW_S for at in self._crashes)
        if recent < CRASHES:
            self._stop.wait(BACKOFF_S[recent - 1])
            return
        with self._lock:
            self.state = State.FAILED
            self._open_until_s = now + OPEN_S
        log.error("%d crashes within %.0f s: no engine for %.0f s", recent, WINDOW_S, OPEN_S)
        self._fail_all(_unavailable(OPEN_S))
        self._stop.wait(OPEN_S)

    def _fail_all(self, error: LuthierError) -> None:
        with self._lock:
            lines, chores = [*self._lines.values()], [*self._chores.values()]
            self._lines.clear()
            self._chores.clear()
        for line in lines:
            line.sink(Failed(error))
        for chore in chores:
            chore.done.set_exception(error)


def _hangs(silent: int, stuck: int, unready: int) -> str | None:
    """What is wrong with an engine that has been so for so many ticks."""
    if silent >= SILENT:
        return "no sign of life"
    if stuck >= STUCK:
        return "no step"
    return "never ready" if unready >= UNREADY else None


def _died() -> EngineFailed:
    return EngineFailed("the engine stopped while answering", hint="ask again; it is being restarted")


def _closing() -> ServeError:
    return ServeError("the server is shutting down", hint="ask again when it is back")


def _unavailable(left_s: float) -> Unavailable:
    wait_s = max(1, math.ceil(left_s))
    error = Unavailable("the engine keeps failing", hint=f"try again in {wait_s} s")
    error.retry_after_s = wait_s
    return error
