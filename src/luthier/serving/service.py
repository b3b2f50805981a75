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
from luthier.errors import DataError, LuthierError, ModelError
from luthier.home import Home
from luthier.inference.grammar import Grammar, check, vocabulary
from luthier.inference.sampling import Sampling
from luthier.plugins import Part
from luthier.rows import Message, Tools
from luthier.serving.cache import Cache
from luthier.serving.desk import QUEUE, Desk, Engine, Turn
from luthier.serving.engine_process import EngineProcess
from luthier.serving.journal import Journal
from luthier.serving.limits import DEFAULTS, Limits
from luthier.serving.router import Router, Target
from luthier.serving.traffic import Traffic
from luthier.serving.worker import Ask, End, Event, Failed, Said, Sink, Worker
from luthier.store import Store
from luthier.tool_calls import Convention, convention

log = logging.getLogger("luthier.serving")


@dataclass(frozen=True, slots=True)
class Options:
    """How to answer. Greedy unless a temperature is given; `max_tokens` None is the server's default."""

    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stops: tuple[str, ...] = ()
    top_k: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    grammar: Grammar | None = None
    tools: Tools = ()
    score_prompt: bool = False
    embed: bool = False
    ignore_eos: bool = False

    def sampling(self, max_new_tokens: int) -> Sampling:
        return Sampling(
            max_new_tokens=max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            top_k=self.top_k,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias,
            logprobs=self.logprobs,
        )


class TooLong(DataError):
    """The conversation leaves no room for an answer."""

    http_code = 400


class NoToken(DataError):
    """A token that the model does not have."""

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

    def read(self, messages: Sequence[Message], tools: Tools = ()) -> tuple[int, ...]:
        """The prompt's tokens; a prompt that cannot fit is refused before it is tokenised."""
        characters = sum(len(message.content) for message in messages)
        self._require_fit(characters)
        with self.lock:
            ids = tuple(template.prompt_ids(self.reader, messages, tools))
        return self._fitting(ids, self.context - 1)

    def read_text(self, text: str, room: int) -> tuple[int, ...]:
        """A document's tokens, leaving `room` for what follows."""
        self._require_fit(len(text))
        with self.lock:
            ids = tuple(template.text_ids(self.reader, text))
        return self._fitting(ids, self.context - room)

    def check_ids(self, ids: Sequence[int], room: int) -> tuple[int, ...]:
        """Tokens that a client gives as such; they must be tokens, and leave `room`."""
        size = len(self.reader)
        if any(not 0 <= token < size for token in ids):
            raise NoToken(f"a token id is not one of the model's {size}")
        return self._fitting(tuple(ids), self.context - room)

    @property
    def convention(self) -> Convention:
        return convention(self.reader.chat_template)

    def check(self, grammar: Grammar) -> None:
        """Refuse a grammar that cannot be compiled in time."""
        with self.lock:
            check(grammar, self.reader)

    def ready_to_spell(self) -> None:
        """Do now, in this thread, what the first `spelt` and the first grammar need."""
        with self.lock:
            vocabulary(self.reader)

    def spelt(self, token: int) -> tuple[str, list[int]]:
        """A token's own text, and its bytes, which need not be whole characters."""
        held = bytes(vocabulary(self.reader).decode_bytes([token])).lstrip(b"\xff")
        return held.decode("utf-8", "replace"), list(held)

    def _require_fit(self, characters: int) -> None:
        if characters >= self.context * self.widest:
            raise _too_long(f"{characters} characters", self.context)

    def _fitting(self, ids: tuple[int, ...], most: int) -> tuple[int, ...]:
        if len(ids) > most:
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
        backend: Part | None = None,
    ) -> None:
        """`apart`: the engine is a process of its own, and comes back when it crashes.
        `backend`: what computes the answers instead."""
        self.limits = limits
        self.store = store
        self.router = Router(store, home)
        wide = replace(limits, waiting=QUEUE)
        self.engine: Engine
        if backend is None:
            self.engine = (EngineProcess if apart else Worker)(wide, threads)
        else:
            self.engine = backend.module.engine(backend.params, wide, home)
        self.worker = Desk(self.engine, limits)
        cache = Cache(limits.cached) if limits.cached else None
        self.traffic = Traffic(store, home, self.router, self.worker, cache)
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
        self.traffic.shadows.start()

    def warm(self) -> int:
        """Load what stands in production, so that the first request is quick; returns how many are ready.

        A release that cannot be loaded is logged and does not keep the others from being served.
        """
        ready = 0
        for model in self.router.in_production():
            try:
                target = self.router.resolve(model)
                self.voice(target).ready_to_spell()
                self.worker.warm(target)
                ready += 1
            except LuthierError as error:
                log.warning("%s cannot be served: %s", model, error)
        return ready

    def close(self, grace_s: float | None = None) -> None:
        """Finish what is under way within the grace time, write the log, end the threads."""
        self.worker.close(self.limits.grace_s if grace_s is None else grace_s)
        self.traffic.shadows.close()
        self.journal.close()

    def prepare(
        self, target: Target, messages: Sequence[Message], options: Options, turn: Turn | None = None
    ) -> Ask:
        """Everything that can be refused, refused; what is left only has to be computed."""
        self.worker.require_room(turn)
        voice = self.voice(target)
        return self._ask(target, voice, voice.read(messages, options.tools), options)

    def prepare_text(
        self, target: Target, prompt: str | Sequence[int], options: Options, turn: Turn | None = None
    ) -> Ask:
        """The same for a document to go on with, as text or as tokens."""
        self.worker.require_room(turn)
        voice = self.voice(target)
        room = 0 if options.max_tokens == 0 else 1
        if isinstance(prompt, str):
            return self._ask(target, voice, voice.read_text(prompt, room), options)
        return self._ask(target, voice, voice.check_ids(prompt, room), options)

    def _ask(self, target: Target, voice: Voice, ids: tuple[int, ...], options: Options) -> Ask:
        wanted = self.limits.default_tokens if options.max_tokens is None else options.max_tokens
        if options.grammar is not None:
            voice.check(options.grammar)
        if options.logprobs is not None:
            voice.ready_to_spell()
        sampling = options.sampling(min(wanted, voice.context - len(ids)))
        return Ask(
            target=target,
            prompt_ids=ids,
            sampling=sampling,
            stop_ids=frozenset() if options.ignore_eos else voice.stop_ids,
            stops=options.stops,
            grammar=options.grammar,
            score_prompt=options.score_prompt,
            embed=options.embed,
        )

    def submit(self, ask: Ask, sink: Sink, turn: Turn | None = None) -> Callable[[], None]:
        """Start an answer; its events come to `sink` on the worker's thread. Returns what cancels it."""
        return self.worker.submit(ask, sink, turn)

    @property
    def state(self) -> str:
        """ "ok" or "starting" while requests are taken, else what keeps them out."""
        if isinstance(self.engine, EngineProcess):
            return self.engine.state.value
        return "ok" if self.engine.alive else "failed"

    def talk(
        self,
        model: str,
        messages: Sequence[Message],
        options: Options | None = None,
        tenant: str | None = None,
    ) -> Iterator[str]:
        """One answer in pieces, in this thread. Leaving the loop early cancels the rest.

        `tenant`: whose models may be named and whose turn it is; None sees all.
        """
        turn = Turn(tenant) if tenant else None
        ask = self.prepare(self.router.resolve(model, tenant), messages, options or Options(), turn)
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        cancel = self.submit(ask, events.put, turn)
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

    def voice(self, target: Target) -> Voice:
        """How the base of `target` reads and spells."""
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
