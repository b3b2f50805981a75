"""Which refusals are written into the audit log, and that the others' number is.

A flood must not become a flood of rows, nor may one caller's flood hide another's refusals: of each source (a
key, or an address that showed no good key) the first `EACH` of a minute are written, of all keys and of all
addresses together the first `ALL` each. How many more there were is written once the minute is over, by
source, so silence shows. It does not know why a request was refused, nor who writes.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass

from luthier.http.sparing import Minute

EACH = 10
ALL = 60  # of all keys together, and again of all addresses
SOURCES = 512  # sources that are counted apart in a minute; those beyond are told as "others"
NAMED = 10  # sources that an entry about silence names


@dataclass(frozen=True, slots=True)
class Silence:
    """What was not written in a minute that is over."""

    more: int
    by: dict[str, int]


class Refusals:
    """One for a server; its methods may be called by any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._minute = Minute()
        self._written: Counter[str] = Counter()
        self._all: Counter[bool] = Counter()
        self._unwritten: Counter[str] = Counter()

    def may_write(self, source: str, *, a_key: bool, now_s: float | None = None) -> bool:
        """Whether this one is written; else it is counted."""
        with self._lock:
            if self._minute.begins(now_s):
                self._written.clear()
                self._all.clear()
            known = source in self._written or len(self._written) < SOURCES
            if known and self._written[source] < EACH and self._all[a_key] < ALL:
                self._written[source] += 1
                self._all[a_key] += 1
                return True
            self._unwritten[source if known else "others"] += 1
            return False

    def left_s(self, now_s: float | None = None) -> float:
        """How long this minute still is."""
        return self._minute.left_s(now_s)

    def silence(self) -> Silence | None:
        """What was not written since this was last asked, and nothing of it is remembered any more."""
        with self._lock:
            more, by = self._unwritten.total(), dict(self._unwritten.most_common(NAMED))
            self._unwritten.clear()
        return Silence(more, by) if more else None
