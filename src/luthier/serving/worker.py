"""The one thread that owns the models: it lets every answer grow by a token, step by step, until they end.

What grows together in a step is `inference.decoder`'s work. A request keeps the release it began with; a
cancelled one gives up its place and its blocks before the next step; a failing one takes no other with it,
unless the step itself fails: then all that grew from that base end, and it is loaded afresh for the next.
Bases and adapters are loaded when first asked for and the longest unused one makes room.

It does not know HTTP, aliases or chat templates. Loading a base holds up the other answers for that long.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar

from luthier import template
from luthier.errors import LuthierError, ServeError
from luthier.inference.decoder import Decoder
from luthier.inference.grammar import Grammar, constraint, vocabulary
from luthier.inference.growing import Ended, Growing, Grown, Room
from luthier.inference.sampling import Chooser, Chosen, Sampling
from luthier.serving.limits import Counts, Limits, busy
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

    text: ClassVar[str] = ""


@dataclass(frozen=True, slots=True)
class Pooled:
    """The mean of the prompt's last hidden states, where that was asked for."""

    values: tuple[float, ...]
    text: ClassVar[str] = ""


@dataclass(frozen=True, slots=True)
class End:
    """The answer is complete; `text` is what had been held back."""

    reason: Reason
    text: str


@dataclass(frozen=True, slots=True)
class Failed:
    """There will be no more of this answer."""

    error: LuthierError


Heard = Said | Read | Pooled | End
Event = Heard | Failed
Sink = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class Ask:
    """One answer to give, as plain data. `embed` asks for a vector and for no word; what is read under one
    `salt` is not found again under another."""

    target: Target
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    stop_ids: frozenset[int]
    stops: tuple[str, ...] = ()
    grammar: Grammar | None = None
    score_prompt: bool = False
    embed: bool = False
    salt: str | None = None


@dataclass(slots=True, eq=False)
class _Line:
    """A request under way: its events go to `sink`, on the worker's thread."""

    ask: Ask
    sink: Sink
    cancelled: bool = False
    decoder: Decoder | None = None
    row: Growing | None = None
    text: Unfolding | None = None
    began_s: float = field(default_factory=time.monotonic)


class Worker:
    def __init__(self, limits: Limits, threads: int | None = None) -> None:
        self._limits = limits
        self._threads = threads
        self._wake = threading.Condition()
        self._waiting: deque[_Line] = deque()
        self._chores: deque[tuple[Target, Future[None]]] = deque()
        self._active: list[_Line] = []
        self._bases: OrderedDict[str, Decoder] = OrderedDict()  # the longest unused first
        self._adapters: dict[str, OrderedDict[str, None]] = {}  # per base, the longest unused first
        self._writers: dict[str, Any] = {}  # per base, a tokenizer that only this thread uses
        self._closing_at: float | None = None
        self._mean_s = 1.0
        self._turns = 0
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
            pools = [decoder.pool for decoder in tuple(self._bases.values())]
            blocks, held = sum(pool.blocks for pool in pools), sum(pool.held for pool in pools)
            found, filled = sum(pool.found for pool in pools), sum(pool.filled for pool in pools)
            return Counts(len(self._active), len(self._waiting), blocks, held, found, filled, self._turns)

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
                self._turns += 1
                while self._chores:
                    self._chore(*self._chores.popleft())
                for line in [line for line in self._active if line.row is None]:
                    self._begin(line)
                for digest, decoder in tuple(self._bases.items()):
                    if decoder.busy:
                        self._step(digest, decoder)
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
            _release(line)
            if not line.cancelled:
                self._tell(line, Failed(_closing()))
        return not over

    def _begin(self, line: _Line) -> None:
        """Load what it needs and give its prompt to the decoder. Whatever goes wrong stays its own.

        While others use every place for adapters, it waits for the next step.
        """
        ask = line.ask
        try:
            if not self._room_for(ask.target):
                return
            line.decoder = decoder = self._load(ask.target)
            writer = self._writers[ask.target.loaded]
            line.text = Unfolding(writer, ask.stops)
            chooser = Chooser(ask.sampling, None if ask.grammar is None else constraint(ask.grammar, writer))
            how = (chooser, ask.target.adapter_digest, ask.stop_ids, ask.score_prompt, ask.embed)
            line.row = decoder.begin(ask.prompt_ids, *how)
            line.row.salt = ask.salt
        except LuthierError as error:
            self._leave(line, Failed(error))
        except Exception as error:
            log.exception("release %s: an answer could not begin", ask.target.release_digest[:12])
            self._leave(line, Failed(_failed(error)))

    def _step(self, digest: str, decoder: Decoder) -> None:
        """A token for every answer of one base; a step that fails ends them all, and the base with them."""
        lines = {id(line.row): line for line in self._active if line.decoder is decoder}
        try:
            brought = decoder.step()
        except Exception as error:
            with self._wake:
                del self._bases[digest], self._adapters[digest], self._writers[digest]
            log.exception("base %s: a step failed; the base is loaded afresh", digest[:12])
            for line in lines.values():
                self._leave(line, Failed(_failed(error)))
            return
        for grown in brought:
            if id(grown.row) in lines:
                self._hear(lines[id(grown.row)], grown)

    def _hear(self, line: _Line, grown: Grown) -> None:
        """Tell what a step brought an answer, and its end if that was the last."""
        if grown.error is not None:
            self._leave(line, Failed(grown.error))
            return
        try:
            if grown.read is not None:
                self._tell(line, Read(grown.read.logps, grown.read.tops))
            if grown.row.pooled is not None:
                self._tell(line, Pooled(tuple((grown.row.pooled / grown.row.prompt).tolist())))
            ended = self._say(line, grown.chosen) if grown.chosen is not None else None
            if ended is None and grown.ended is not None:
                ended = Reason.STOP if grown.ended is Ended.STOP else Reason.LENGTH
            if ended is not None:
                self._leave(line, End(ended, line.text.close() if line.text is not None else ""))
        except Exception as error:
            log.exception("release %s: an answer failed", line.ask.target.release_digest[:12])
            self._leave(line, Failed(_failed(error)))

    def _say(self, line: _Line, chosen: Chosen) -> Reason | None:
        """Tell what a token says, and whether a stop string has been met."""
        if chosen.token in line.ask.stop_ids or line.text is None:
            self._tell(line, Said(chosen.token, "", chosen.logp, chosen.top))
            return None
        self._tell(line, Said(chosen.token, line.text.push(chosen.token), chosen.logp, chosen.top))
        return Reason.STOP if line.text.stopped else None

    def _leave(self, line: _Line, event: Event) -> None:
        """The place is free before the last event is told, so whoever hears it can ask again."""
        _release(line)
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

    def _load(self, target: Target) -> Decoder:
        """The decoder of the target's base, with its adapter in place and both marked as just used."""
        decoder = self._bases.get(target.loaded)
        if decoder is None:
            self._drop_unused_bases()
            limits = self._limits
            room = Room(limits.active, limits.chunk_tokens, limits.adapters, limits.cache_bytes)
            decoder = Decoder.load(target.base_dir, target.loaded, room, self._threads, target.int8)
            writer = template.load_tokenizer(target.base_dir)
            vocabulary(writer)  # takes a second for a large one: now, and not while others' answers grow
            with self._wake:
                self._bases[target.loaded] = decoder
            self._adapters[target.loaded] = OrderedDict()
            self._writers[target.loaded] = writer
        with self._wake:
            self._bases.move_to_end(target.loaded)
        if target.adapter_digest is None or target.adapter_dir is None:
            return decoder
        adapters = self._adapters[target.loaded]
        if target.adapter_digest not in adapters:
            self._drop_unused_adapters(decoder, adapters)
            decoder.add(target.adapter_digest, target.adapter_dir)
            adapters[target.adapter_digest] = None
        adapters.move_to_end(target.adapter_digest)
        return decoder

    def _room_for(self, target: Target) -> bool:
        """Whether the adapter is there, or a place for it is free or can be made free."""
        adapters = self._adapters.get(target.loaded)
        if adapters is None or target.adapter_digest is None or target.adapter_digest in adapters:
            return True
        return len(adapters) < self._limits.adapters or not self._used() >= set(adapters)

    def _used(self) -> set[str | None]:
        return {line.ask.target.adapter_digest for line in self._active if line.row is not None}

    def _drop_unused_bases(self) -> None:
        """Make room for one more; bases in use stay, even if that means one too many for a while."""
        used = {line.ask.target.loaded for line in self._active if line.row is not None}
        for digest in [digest for digest in self._bases if digest not in used]:
            if len(self._bases) < self._limits.bases:
                return
            with self._wake:
                del self._bases[digest], self._adapters[digest], self._writers[digest]

    def _drop_unused_adapters(self, decoder: Decoder, adapters: OrderedDict[str, None]) -> None:
        used = self._used()
        for digest in [digest for digest in adapters if digest not in used]:
            if len(adapters) < self._limits.adapters:
                return
            decoder.drop(digest)
            del adapters[digest]


def _release(line: _Line) -> None:
    """Its place in the decoder and its blocks are free."""
    if line.decoder is not None and line.row is not None:
        line.decoder.cancel(line.row)


def _failed(error: Exception) -> EngineFailed:
    return EngineFailed(f"the engine failed ({type(error).__name__})")


def _closing() -> ServeError:
    return ServeError("the server is shutting down", hint="ask again when it is back")
