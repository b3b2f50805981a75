"""The service behind every door: a model's name and a conversation in, an answer out.

It ties the router (which release), the base's voice (template, tokens, context) and the worker (who
computes) together. `prepare` is the only costly step before the queue and belongs in a caller's thread.
It does not know HTTP, keys or clocks.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from luthier import template
from luthier.engine.sampling import Sampling
from luthier.errors import DataError, LuthierError, ModelError
from luthier.home import Home
from luthier.rows import Message
from luthier.serving.desk import QUEUE, Desk, Turn
from luthier.serving.engine_process import EngineProcess
from luthier.serving.journal import Journal
from luthier.serving.limits import DEFAULTS, Limits
from luthier.serving.router import Router, Target
from luthier.serving.worker import Ask, End, Event, Failed, Said, Sink, Worker
from luthier.store import Store

log = logging.getLogger("luthier.serving")


@dataclass(frozen=True, slots=True)
class Options:
    """How to answer. Greedy unless a temperature is given; `max_tokens` None is the server's default."""

    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stops: tuple[str, ...] = ()


class TooLong(DataError):
    """The conversation leaves no room for an answer."""

    http_code = 400


@dataclass(frozen=True)
class Voice:
    """What a base brings along besides weights. Reading changes a tokenizer's state: `lock` guards it."""

    reader: Any
    stop_ids: frozenset[int]
    context: int
    widest: int
    lock: threading.Lock

    @classmethod
    def load(cls, base: Path) -> Voice:
        reader = template.load_tokenizer(base)
        return cls(
            reader=reader,
            stop_ids=template.stop_ids(reader),
            context=_context(base),
            widest=max(map(len, reader.get_vocab())),
            lock=threading.Lock(),
        )

    def read(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The prompt's tokens; a prompt that cannot fit is refused before it is tokenised."""
        characters = sum(len(message.content) for message in messages)
        if characters >= self.context * self.widest:
            raise _too_long(f"{characters} characters", self.context)
        with self.lock:
            ids = tuple(template.prompt_ids(self.reader, messages))
        if len(ids) >= self.context:
            raise _too_long(f"{len(ids)} tokens", self.context)
        return ids


class Service:
    """Open with `with`, or `start` and `close`."""

    def __init__(
        self,
        store: Store,
        home: Home,
        limits: Limits = DEFAULTS,
        threads: int | None = None,
        apart: bool = False,
    ) -> None:
        """`apart`: the engine is a process of its own, and comes back when it crashes."""
        self.limits = limits
        self.store = store
        self.router = Router(store, home)
        self.engine = (EngineProcess if apart else Worker)(replace(limits, waiting=QUEUE), threads)
        self.worker = Desk(self.engine, limits)
        self.journal = Journal(store)
        self._voices: dict[str, Voice] = {}
        self._loading = threading.Lock()

    def __enter__(self) -> Service:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close(grace_s=0.0)

    def start(self) -> None:
        self.worker.start()
        self.journal.start()

    def warm(self) -> int:
        """Load what stands in production, so that the first request is quick; returns how many are ready.

        A release that cannot be loaded is logged and does not keep the others from being served.
        """
        ready = 0
        for model in self.router.in_production():
            try:
                target = self.router.resolve(model)
                self._voice(target)
                self.worker.warm(target)
                ready += 1
            except LuthierError as error:
                log.warning("%s cannot be served: %s", model, error)
        return ready

    def close(self, grace_s: float | None = None) -> None:
        """Finish what is under way within the grace time, write the log, end the threads."""
        self.worker.close(self.limits.grace_s if grace_s is None else grace_s)
        self.journal.close()

    def prepare(self, target: Target, messages: Sequence[Message], options: Options) -> Ask:
        """Everything that can be refused, refused; what is left only has to be computed."""
        self.worker.require_room()
        voice = self._voice(target)
        ids = voice.read(messages)
        wanted = options.max_tokens or self.limits.default_tokens
        sampling = Sampling(
            max_new_tokens=min(wanted, voice.context - len(ids)),
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
        )
        return Ask(target, ids, sampling, voice.stop_ids, options.stops)

    def submit(self, ask: Ask, sink: Sink, turn: Turn | None = None) -> Callable[[], None]:
        """Start an answer; its events come to `sink` on the worker's thread. Returns what cancels it."""
        return self.worker.submit(ask, sink, turn)

    @property
    def state(self) -> str:
        """ "ok" or "starting" while requests are taken, else what keeps them out."""
        if isinstance(self.engine, EngineProcess):
            return self.engine.state.value
        return "ok" if self.engine.alive else "failed"

    def talk(self, model: str, messages: Sequence[Message], options: Options | None = None) -> Iterator[str]:
        """One answer in pieces, in this thread. Leaving the loop early cancels the rest."""
        ask = self.prepare(self.router.resolve(model), messages, options or Options())
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        cancel = self.submit(ask, events.put)
        try:
            while True:
                match events.get():
                    case Said(text=text):
                        if text:
                            yield text
                    case End(text=text):
                        if text:
                            yield text
                        return
                    case Failed(error=error):
                        raise error
        finally:
            cancel()

    def _voice(self, target: Target) -> Voice:
        with self._loading:
            voice = self._voices.get(target.base_digest)
            if voice is None:
                voice = Voice.load(target.base_dir)
                while len(self._voices) >= self.limits.bases:
                    self._voices.pop(next(iter(self._voices)))
                self._voices[target.base_digest] = voice
            return voice


def _context(base: Path) -> int:
    config = json.loads((base / "config.json").read_text("utf-8"))
    length = config.get("max_position_embeddings")
    if not isinstance(length, int) or length < 2:
        raise ModelError("`max_position_embeddings` does not say how long a context may be", where=str(base))
    return length


def _too_long(found: str, context: int) -> TooLong:
    return TooLong(f"the conversation is too long: {found}, and the model reads {context} tokens in all")
