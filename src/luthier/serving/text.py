"""Text out of a growing answer: what is certain is said at once, the rest is held back.

Two things are uncertain: the last bytes of a character whose other bytes are still to come (they decode
to U+FFFD, see Unicode §3.9), and a tail that may be the beginning of a stop string. Decoding looks at a
short window that starts where an earlier character ended, so the cost of a token does not grow with the
answer. The pieces add up to `tokenizer.decode` of all the tokens.

It does not know models, and it is owned by one thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\ufffd"


class Unfolding:
    """Feed it tokens; `stopped` turns true when a stop string has been met, which is never said itself."""

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._ids: list[int] = []
        self._from, self._said = 0, 0  # window of decoding: from a clean edge, and up to what was said
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that this token made certain, often one word, sometimes nothing."""
        self._ids.append(token)
        before = self._decode(self._ids[self._from : self._said])
        now = self._decode(self._ids[self._from :])
        if now.endswith(UNFINISHED):
            return ""
        self._from, self._said = self._said, len(self._ids)
        return self._release(now[len(before) :])

    def close(self) -> str:
        """What was held back, now that nothing follows."""
        before = self._decode(self._ids[self._from : self._said])
        now = self._decode(self._ids[self._from :])
        self._from = self._said = len(self._ids)
        text = self._release(now[len(before) :]) + self._held
        self._held = ""
        return text

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    def _release(self, text: str) -> str:
        """Cut at the first stop string, or keep back the longest tail that could become one."""
        if self.stopped:
            return ""
        text = self._held + text
        cuts = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if cuts:
            self.stopped, self._held = True, ""
            return text[: min(cuts)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest tail of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
