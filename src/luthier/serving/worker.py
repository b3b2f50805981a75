"""The one thread that owns the models: answers grow in turn, one token each, until they end.

Round-robin at the grain of a token is the simplest form of iteration-level scheduling (Orca, Yu et al.,
OSDI 2022). A request keeps the release it began with; a cancelled one gives up its place before the next
token; a failing one takes no other with it. Bases and adapters are loaded when first asked for and the
longest unused one makes room.

It does not know HTTP, aliases or chat templates. Loading a base or reading a long prompt holds up the other
answers for that long: there is one thread, and no chunked prefill.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from luthier import template
from luthier.engine.generate import Runtime
from luthier.engine.grammar import Grammar, constraint
from luthier.engine.sampling import Chooser, Chosen, Sampling
from luthier.errors import LuthierError, ServeError
from luthier.serving.limits import Limits, busy
from luthier.serving.router import Target
from luthier.serving.text import Unfolding

log = logging.getLogger("luthier.serving")


class Reason(StrEnum):
    STOP = "stop"
    LENGTH = "length"


class EngineFailed(ServeError):
    """A bug or a lack of memory while answering; the server's log has the details."""

    http_code = 500


@dataclass(frozen=True, slots=True)
class Said:
    """One token was chosen. `text` is what it made certain; the stop token says nothing."""

    token: int
    text: str
    logp: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Read:
    """What the model thinks of the prompt's own tokens, where asked: `logps` has None for the first.

    `tops` has, for each token, the likeliest ones in its place, as many as `sampling.logprobs` says.
    """

    logps: tuple[float | None, ...]
    tops: tuple[tuple[tuple[int, float], ...], ...] = ()

    @property
    def text(self) -> str:
        """Reading says nothing."""
        return ""


@dataclass(frozen=True, slots=True)
class End:
    """The answer is complete; `text` is what had been held back."""

    reason: Reason
    text: str


@dataclass(frozen=True, slots=True)
class Failed:
    """There will be no more of this answer."""

    error: LuthierError


Heard = Said | Read | End
Event = Heard | Failed
Sink = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class Ask:
    """One answer to give, as plain data."""

    target: Target
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    stop_ids: frozenset[int]
    stops: tuple[str, ...] = ()
    grammar: Grammar | None = None
    score_prompt: bool = False


@dataclass(frozen=True, slots=True)
class Counts:
    active: int
    waiting: int


@dataclass(slots=True, eq=False)
class _Line:
    """A request under way: its events go to `sink`, on the worker's thread."""

    ask: Ask
    sink: Sink
    cancelled: bool = False
    stream: Iterator[Chosen] | None = None
    text: Unfolding | None = None
    tokens: int = 0
    began_s: float = field(default_factory=time.monotonic)


class Worker:
    def __init__(self, limits: Limits, threads: int | None = None) -> None:
        self._limits = limits
        self._threads = threads
        self._wake = threading.Condition()
        self._waiting: deque[_Line] = deque()
        self._chores: deque[tuple[Target, Future[None]]] = deque()
        self._active: list[_Line] = []
        self._bases: OrderedDict[str, Runtime] = OrderedDict()  # the longest unused first
        self._adapters: dict[str, OrderedDict[str, None]] = {}  # per base, the longest unused first
        self._writers: dict[str, Any] = {}  # per base, a tokenizer that only this thread uses
        self._closing_at: float | None = None
        self._mean_s = 1.0
        self._thread = threading.Thread(target=self._run, name="luthier-worker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, ask: Ask, sink: Sink) -> Callable[[], None]:
        """Queue an answer; returns what cancels it. Raises `Busy`, or `ServeError` when closing."""
        line = _Line(ask, sink)
        with self._wake:
            self._require_room()
            self._waiting.append(line)
            self._wake.notify()

        def cancel() -> None:
            with self._wake:
                line.cancelled = True
                self._wake.notify()

        return cancel

    def require_room(self) -> None:
        """Raise what `submit` would raise now, before work is spent on a request."""
        with self._wake:
            self._require_room()

    def warm(self, target: Target) -> None:
        """Load a release ahead of its first request; blocks until it is ready, raises what went wrong."""
        done: Future[None] = Future()
        with self._wake:
            if self._closing_at is not None:
                raise _closing()
            self._chores.append((target, done))
            self._wake.notify()
        done.result()

    def counts(self) -> Counts:
        with self._wake:
            return Counts(len(self._active), len(self._waiting))

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def close(self, grace_s: float) -> None:
        """Refuse new requests, let others finish for up to `grace_s`, fail what is left, end the thread."""
        with self._wake:
            self._closing_at = time.monotonic() + grace_s
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _require_room(self) -> None:
        if self._closing_at is not None:
            raise _closing()
        waiting = len(self._waiting)
        if len(self._active) + waiting >= self._limits.active + self._limits.waiting:
            turns = (waiting + 1) / self._limits.active
            raise busy(waiting, min(60, max(1, math.ceil(turns * self._mean_s))))

    # ---- below: the worker's own thread ----------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._tidy():
                while self._chores:
                    self._chore(*self._chores.popleft())
                for line in tuple(self._active):
                    self._step(line)
        finally:  # whatever ended the loop, nobody is left waiting for an answer that will not come
            with self._wake:
                self._closing_at = time.monotonic()
            self._tidy()
            for _, done in self._chores:
                done.set_exception(_closing())
            self._bases.clear()

    def _tidy(self) -> bool:
        """Sleep until there is work, drop the cancelled, take in the waiting; false when all is over."""
        with self._wake:
            while not (self._active or self._waiting or self._chores or self._closing_at is not None):
                self._wake.wait()
            late = self._closing_at is not None and time.monotonic() >= self._closing_at
            gone = [line for line in (*self._active, *self._waiting) if line.cancelled or late]
            self._active = [line for line in self._active if not (line.cancelled or late)]
            self._waiting = deque(line for line in self._waiting if not (line.cancelled or late))
            while self._waiting and len(self._active) < self._limits.active:
                self._active.append(self._waiting.popleft())
            over = self._closing_at is not None and not (self._active or self._chores)
        for line in gone:
            line.stream = None  # frees its cache
            if not line.cancelled:
                self._tell(line, Failed(_closing()))
        return not over

    def _step(self, line: _Line) -> None:
        """One token for one answer. Whatever goes wrong stays within this request."""
        last: Event | None = None
        try:
            stream = line.stream or self._begin(line)
            ended = self._say(line, next(stream, None))
            if ended is not None:
                last = End(ended, line.text.close() if line.text is not None else "")
        except LuthierError as error:
            last = Failed(error)
        except Exception as error:
            log.exception("release %s: the engine failed", line.ask.target.release_digest[:12])
            last = Failed(EngineFailed(f"the engine failed ({type(error).__name__})"))
        if last is not None:
            self._leave(line, last)

    def _say(self, line: _Line, chosen: Chosen | None) -> Reason | None:
        """Tell what a token says, and whether it was the last."""
        if chosen is None:
            return Reason.LENGTH
        line.tokens += 1
        if chosen.token in line.ask.stop_ids or line.text is None:
            self._tell(line, Said(chosen.token, "", chosen.logp, chosen.top))
            return Reason.STOP
        self._tell(line, Said(chosen.token, line.text.push(chosen.token), chosen.logp, chosen.top))
        if line.text.stopped:
            return Reason.STOP
        return Reason.LENGTH if line.tokens >= line.ask.sampling.max_new_tokens else None

    def _leave(self, line: _Line, event: Event) -> None:
        """The place is free before the last event is told, so whoever hears it can ask again."""
        line.stream = None
        with self._wake:
            self._active.remove(line)
            self._mean_s += 0.1 * (time.monotonic() - line.began_s - self._mean_s)
        self._tell(line, event)

    def _tell(self, line: _Line, event: Event) -> None:
        try:
            line.sink(event)
        except Exception:
            log.exception("a listener failed; its request is cancelled")
            line.cancelled = True

    def _chore(self, target: Target, done: Future[None]) -> None:
        try:
            self._load(target)
        except Exception as error:
            log.exception("release %s cannot be loaded ahead", target.release_digest[:12])
            done.set_exception(error)
        else:
            done.set_result(None)

    def _begin(self, line: _Line) -> Iterator[Chosen]:
        ask = line.ask
        runtime = self._load(ask.target)
        writer, adapter = self._writers[ask.target.base_digest], ask.target.adapter_digest
        line.text = Unfolding(writer, ask.stops)
        chooser = Chooser(ask.sampling, None if ask.grammar is None else constraint(ask.grammar, writer))
        if ask.score_prompt:
            found = runtime.prompt_logps(ask.prompt_ids, ask.sampling.logprobs or 0, adapter)
            self._tell(line, Read((None, *(one.logp for one in found)), ((), *(one.top for one in found))))
        line.stream = runtime.answer(ask.prompt_ids, chooser, adapter, ask.stop_ids)
        return line.stream

    def _load(self, target: Target) -> Runtime:
        """The runtime of the target's base, with its adapter in place and both marked as just used."""
        runtime = self._bases.get(target.base_digest)
        if runtime is None:
            self._drop_unused_bases()
            runtime = Runtime.load(target.base_dir, self._threads)
            self._bases[target.base_digest] = runtime
            self._adapters[target.base_digest] = OrderedDict()
            self._writers[target.base_digest] = template.load_tokenizer(target.base_dir)
        self._bases.move_to_end(target.base_digest)
        if target.adapter_digest is None or target.adapter_dir is None:
            return runtime
        adapters = self._adapters[target.base_digest]
        self._bases.move_to_end(target.base_digest)
        if target.adapter_digest is None or target.adapter_dir is None:
            return runtime
        if target.adapter_digest not in adapters:
            self._drop_unused_adapters(runtime, adapters)
            runtime.add(target.adapter_digest, target.adapter_dir)
            adapters[target.adapter_digest] = None
        adapters.move_to_end(target.adapter_digest)
        return runtime

    def _drop_unused_bases(self) -> None:
        """Make room for one more; bases in use stay, even if that means one too many for a while."""
        used = {line.ask.target.base_digest for line in self._active if line.stream is not None}
        for digest in [digest for digest in self._bases if digest not in used]:
            if len(self._bases) < self._limits.bases:
                return
            del self._bases[digest], self._adapters[digest], self._writers[digest]

    def _drop_unused_adapters(self, runtime: Runtime, adapters: OrderedDict[str, None]) -> None:
        used = {line.ask.target.adapter_digest for line in self._active if line.stream is not None}
        for digest in [digest for digest in adapters if digest not in used]:
            if len(adapters) < self._limits.adapters:
                return
            runtime.drop(digest)
            del adapters[digest]


def _closing() -> ServeError:
    return ServeError("the server is shutting down", hint="ask again when it is back")
