"""What may be written down only so often: the first few of a minute, whoever asks.

A flood of refusals must not become a flood of rows: all of them are counted (`http.meter`), a bounded number
is written. The minute is a window of the monotonic clock. It does not know what is written.
"""

from __future__ import annotations

import time

MINUTE_S = 60.0


class Minute:
    """The window that is counted in; it begins with the first moment after the one before."""

    def __init__(self) -> None:
        self._until_s = 0.0

    def begins(self, now_s: float | None = None) -> bool:
        """Whether a new one begins now: what was counted is to be forgotten."""
        moment_s = time.monotonic() if now_s is None else now_s
        if moment_s < self._until_s:
            return False
        self._until_s = moment_s + MINUTE_S
        return True

    def left_s(self, now_s: float | None = None) -> float:
        """How long this one still is."""
        return max(0.0, self._until_s - (time.monotonic() if now_s is None else now_s))


class Sparing:
    """True for the first `most` calls of each minute. For one thread, or where one too many does no harm."""

    def __init__(self, most: int) -> None:
        self._most, self._left = most, 0
        self._minute = Minute()

    def __call__(self, now_s: float | None = None) -> bool:
        if self._minute.begins(now_s):
            self._left = self._most
        self._left -= 1
        return self._left >= 0
