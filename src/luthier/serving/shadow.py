"""Shadows: another release answers the same request, unseen, once its user has been served.

The shadow's request begins when the champion's answer has ended, in the desk's low priority: it takes idle
room only and gives way to anyone. What is kept is how alike the answers are, never their words: whether the
tokens are the same, their edit similarity (1 - Levenshtein distance / the longer length; Levenshtein 1966),
and both latencies. When more shadows are wanted than there is room for, they are dropped and counted.
It does not know HTTP, shares or verdicts.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from luthier.errors import LuthierError
from luthier.serving.desk import Desk, Dropped, Turn
from luthier.serving.limits import Busy
from luthier.serving.splits import Comparison, Split, Splits
from luthier.serving.worker import Ask, End, Event, Failed, Said, Sink

ROOM = 32  # shadows that may wait to be answered
LENGTH = 512  # tokens of each answer that are compared
LONGEST_S = 300.0
TURN = Turn(tenant="shadow", low=True)

log = logging.getLogger("luthier.serving")


@dataclass(frozen=True, slots=True)
class _Wanted:
    split: Split
    ask: Callable[[], Ask]
    tokens: tuple[int, ...]
    seconds: float


class Shadows:
    def __init__(self, desk: Desk, splits: Splits) -> None:
        self._desk = desk
        self._splits = splits
        self._queue: queue.Queue[_Wanted | None] = queue.Queue(ROOM)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="luthier-shadow", daemon=True)
        self.dropped = 0

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        if self._thread.is_alive():
            with suppress(queue.Full):  # then it looks at `_closing` after the one it has
                self._queue.put_nowait(None)
            self._thread.join()

    def tap(self, split: Split, ask: Callable[[], Ask], sink: Sink) -> Sink:
        """A sink that hears what `sink` hears; `ask` makes the shadow's request when its time has come."""
        tokens: list[int] = []
        began_s = time.monotonic()

        def hear(event: Event) -> None:
            sink(event)
            if isinstance(event, Said):
                tokens.append(event.token)
            elif isinstance(event, End):
                self._want(_Wanted(split, ask, tuple(tokens), time.monotonic() - began_s))

        return hear

    def _want(self, wanted: _Wanted) -> None:
        try:
            self._queue.put_nowait(wanted)
        except queue.Full:
            self.dropped += 1

    def _run(self) -> None:
        while not self._closing.is_set() and (wanted := self._queue.get()) is not None:
            try:
                comparison = self._answer(wanted)
                if comparison is None:
                    self.dropped += 1
                else:
                    self._splits.compare(comparison)
            except Exception:
                self.dropped += 1
                log.exception("a shadow could not be compared")

    def _answer(self, wanted: _Wanted) -> Comparison | None:
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        tokens: list[int] = []
        began_s = time.monotonic()
        error: LuthierError | None = None
        try:
            cancel = self._desk.submit(wanted.ask(), events.put, TURN)
        except LuthierError as refusal:
            return None if isinstance(refusal, Dropped | Busy) else self._compared(wanted, [], 0.0, refusal)
        try:
            while time.monotonic() - began_s < LONGEST_S and not self._closing.is_set():
                try:
                    event = events.get(timeout=1.0)
                except queue.Empty:
                    continue
                if isinstance(event, Said):
                    tokens.append(event.token)
                elif isinstance(event, Failed):
                    error = event.error
                    break
                elif isinstance(event, End):
                    break
            else:
                return None
        finally:
            cancel()
        if isinstance(error, Dropped | Busy):
            return None
        return self._compared(wanted, tokens, time.monotonic() - began_s, error)

    @staticmethod
    def _compared(
        wanted: _Wanted, tokens: Sequence[int], seconds: float, error: LuthierError | None
    ) -> Comparison:
        return Comparison(
            split=wanted.split.id,
            champion=wanted.split.champion,
            challenger=wanted.split.digest,
            same=error is None and tuple(tokens) == wanted.tokens,
            similarity=None if error else similarity(wanted.tokens, tokens),
            champion_tokens=len(wanted.tokens),
            challenger_tokens=len(tokens),
            champion_s=wanted.seconds,
            challenger_s=seconds,
            error=type(error).__name__ if error else None,
        )


def similarity(a: Sequence[int], b: Sequence[int]) -> float:
    """1 for the same tokens, 0 for none in common, of at most the first 512 of each."""
    a, b = a[:LENGTH], b[:LENGTH]
    if not a and not b:
        return 1.0
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (left != right))
    return 1.0 - row[-1] / max(len(a), len(b))
