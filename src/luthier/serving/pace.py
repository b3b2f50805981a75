"""How soon an answer's first token can be expected, by how the last ones went.

Sources: waiting is bounded by time, not by number, as in "Controlling Queue Delay" (Nichols and Jacobson, ACM
Queue 2012) and "Fail at Scale" (Maurer, ACM Queue 2015): a long queue only makes everybody late. What is
foreseen stands on three measures of the recent past: seconds that a running answer takes for a token, seconds
that a prompt token takes to be read (a median, so that a base which was loaded meanwhile does not count), and
how much of the tokens it may write an answer does write. The last is kept as a sample, and an answer under
way is expected to go on as the median of those did that came as far.

It knows no clock, lock, tenant or text. Before anything was measured nothing is expected to take any time.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

STEADY = 0.005  # what one token's time weighs in the mean: sixteen answers bring as many a step
READS, PROMPTS, SHARES = 15, 15, 64


@dataclass(frozen=True, slots=True)
class Running:
    """An answer that has a place: what it wrote and may write, and the prompt tokens it has still to read."""

    said: int
    most: int
    unread: int


class Pace:
    def __init__(self) -> None:
        self.token_s = 0.0
        self._reads: deque[float] = deque(maxlen=READS)
        self._prompts: deque[int] = deque(maxlen=PROMPTS)
        self._shares: deque[float] = deque(maxlen=SHARES)
        self._read_s = 0.0
        self._prompt = 0
        self._ordered: list[float] = []

    # ---- what was heard ----------------------------------------------------------------------------------

    def wrote(self, seconds: float) -> None:
        """A running answer took this long from one token to the next."""
        self.token_s += STEADY * (seconds - self.token_s) if self.token_s else seconds

    def read(self, seconds: float, tokens: int, prompt: int) -> None:
        """A prompt was read this long after it got its place; so many tokens stood before its first word."""
        self._reads.append(max(0.0, seconds - self.token_s) / max(1, tokens))
        self._prompts.append(prompt)
        self._read_s, self._prompt = _median(self._reads), int(_median(self._prompts))

    def ended(self, said: int, most: int) -> None:
        """An answer came to its end."""
        if most > 0:
            self._shares.append(min(1.0, said / most))
            self._ordered = sorted(self._shares)

    # ---- what is expected --------------------------------------------------------------------------------

    def left_s(self, answer: Running) -> float:
        """Until an answer under way gives up its place."""
        if not answer.most:
            return answer.unread * self._read_s
        come = answer.said / answer.most
        further = self._ordered[bisect_left(self._ordered, come) :]
        share = further[len(further) // 2] if further else 1.0
        return max(1.0, share * answer.most - answer.said) * self.token_s + answer.unread * self._read_s

    def reading_s(self, tokens: int) -> float:
        """What reading so many prompt tokens takes."""
        return tokens * self._read_s

    def own_s(self, prompt: int | None = None) -> float:
        """What a prompt (or one like the last ones) takes to its first token with nothing before it."""
        return self.token_s + (self._prompt if prompt is None else prompt) * self._read_s

    def first_s(
        self, running: Sequence[Running], ahead: Sequence[int], places: int, prompt: int | None = None
    ) -> float:
        """Until the first token of a newcomer who finds `running`, behind prompts of `ahead` tokens."""
        reading_s = (sum(answer.unread for answer in running) + sum(ahead)) * self._read_s
        return max(self.place_s(running, len(ahead), places), reading_s) + self.own_s(prompt)

    def place_s(self, running: Sequence[Running], ahead: int, places: int) -> float:
        """Until it gets a place."""
        turn = ahead - (places - len(running))
        if turn < 0 or not running:
            return 0.0
        rounds, turn = divmod(turn, len(running))
        ends = sorted(self.left_s(answer) for answer in running)
        return ends[turn] + rounds * ends[-1]


def _median(values: Sequence[float] | deque[float] | deque[int]) -> float:
    return sorted(values)[len(values) // 2]
