"""Answers that are known already: the same release, prompt and settings, asked again by the same tenant.

Only what is deterministic is kept (greedy, or sampled from a given seed) and only what ended well. The key
holds everything the answer depends on, the release's digest first, so an alias that moves is asked under
another key and nothing has to be invalidated. A cached answer is one tenant's: another cannot learn from
its speed that it was given before. The longest unused make room, by number and by bytes.
It does not know aliases, HTTP or time.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence

from luthier.serving import wire
from luthier.serving.worker import Ask, End, Event, Failed, Heard, Sink

BYTES = 64 * 1024 * 1024
LARGEST = BYTES // 16  # of one answer
EVENT_BYTES = 200  # what an event holds besides its text
NUMBER_BYTES, PAIR_BYTES = 64, 128


class Cache:
    def __init__(self, answers: int, size_bytes: int = BYTES) -> None:
        self._answers = answers
        self._size_bytes = size_bytes
        self._kept: OrderedDict[str, tuple[tuple[Heard, ...], int]] = OrderedDict()
        self._held_bytes = 0
        self._lock = threading.Lock()
        self.hits = self.misses = 0

    @property
    def held_bytes(self) -> int:
        return self._held_bytes

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: str) -> Sequence[Heard] | None:
        with self._lock:
            found = self._kept.get(key)
            if found is None:
                self.misses += 1
                return None
            self._kept.move_to_end(key)
            self.hits += 1
            return found[0]

    def tee(self, key: str, sink: Sink) -> Sink:
        """A sink that hears what `sink` hears, and keeps an answer that ends well."""
        heard: list[Heard] = []
        size = 0

        def hear(event: Event) -> None:
            nonlocal size
            if not isinstance(event, Failed):
                size += _size(event)
                if size <= LARGEST:
                    heard.append(event)
                    if isinstance(event, End):  # kept before it is told, so whoever hears it finds it known
                        self._put(key, tuple(heard), size)
            sink(event)

        return hear

    def _put(self, key: str, events: tuple[Heard, ...], size: int) -> None:
        with self._lock:
            before = self._kept.pop(key, None)
            self._held_bytes += size - (before[1] if before else 0)
            self._kept[key] = (events, size)
            while len(self._kept) > self._answers or self._held_bytes > self._size_bytes:
                _, (_, freed) = self._kept.popitem(last=False)
                self._held_bytes -= freed


def key_of(ask: Ask, tenant: str) -> str | None:
    """What the answer depends on, and whose it is; None where the same request may be answered otherwise."""
    if ask.sampling.temperature > 0 and ask.sampling.seed is None:
        return None
    plain = wire.from_ask(ask)
    plain["stop_ids"] = sorted(ask.stop_ids)
    text = json.dumps([tenant, plain], sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _size(event: Heard) -> int:
    held = EVENT_BYTES + 4 * len(getattr(event, "text", ""))
    numbers = sum(len(getattr(event, name, ())) for name in ("top", "logps", "values"))
    pairs = sum(map(len, getattr(event, "tops", ())))
    return held + NUMBER_BYTES * numbers + PAIR_BYTES * pairs
