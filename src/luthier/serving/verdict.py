"""Whether a canary does worse than its champion: a test that may be read after every answer.

Three questions, each a count of bad answers against good ones: does it fail more often than the champion;
is it slow more often; does it break its own baseline's promise of latency more often than the champion
breaks its own. They are asked in blocks of one canary answer and `k` champion answers that began about
the same time, so that load, which hits both, cancels. A block's evidence is the two-sample e-variable of
Turner, Ly and Grünwald (2024, https://arxiv.org/abs/2106.02693) for Bernoulli streams, with the rates
estimated from earlier blocks alone. A fourth question needs no champion: does it fail more often than its
baseline and a margin allow. Products of e-variables pass 1/α with probability at most α however often one
looks (Ville 1939), so with four questions at 4/α a canary that is as good as its champion is aborted with
probability at most α, in all.

"Slow" is past 1.5 times the 90th percentile of the champion's latest answers, in time to the first token
or time a token after it. It knows no clock, no store and no release; answers must come in the order in
which they began, or a slow answer would choose whom it is compared with.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

ALPHA = 0.01
WINDOW, ENOUGH = 200, 20  # champion answers the limits of slowness come from, and how many are needed
PERCENTILE, MARGIN = 0.9, 1.5
ERROR_MARGIN = 0.02  # above the baseline's error rate
LATENCY_RATIO = 2.0  # of the baseline's 95th percentile
PRIOR = (0.18, 0.18)  # of a rate, before any answer (the choice of the `safestats` package)
FAILING = 0.1  # a canary that is broken fails at least so often; half of the bet is on that


class Question(StrEnum):
    ERRORS = "fails more often than the champion"
    SLOW = "is slow more often than the champion"
    LATE = "breaks its latency baseline more often than the champion breaks its own"
    BASELINE = "fails more often than its baseline allows"


@dataclass(frozen=True, slots=True)
class Answer:
    """What is known of one answer. `first_s` is the time waited, for one that never said anything."""

    failed: bool
    first_s: float | None = None
    token_s: float | None = None
    total_s: float | None = None


@dataclass(frozen=True, slots=True)
class Baseline:
    """What a release promised when it was made. None where nothing was measured."""

    error_rate: float = 0.0
    p95_s: float | None = None


@dataclass(slots=True)
class _Rate:
    bad: int = 0
    n: int = 0

    @property
    def guess(self) -> float:
        return (self.bad + PRIOR[0]) / (self.n + sum(PRIOR))

    def see(self, bad: int, n: int = 1) -> None:
        self.bad += bad
        self.n += n


@dataclass(slots=True)
class _Pair:
    """One question asked of both: two bets, on the rates seen so far and on a canary that is broken."""

    champion: _Rate = field(default_factory=_Rate)
    canary: _Rate = field(default_factory=_Rate)
    log_learnt: float = 0.0
    log_broken: float = 0.0

    @property
    def log_e(self) -> float:
        return _mean(self.log_learnt, self.log_broken)

    def see(self, champion: list[bool], canary: bool) -> None:
        a, b = self.champion.guess, self.canary.guess
        if b > a:
            self.log_learnt += _evidence(a, b, champion, canary)
        self.log_broken += _evidence(a, min(0.95, a + FAILING), champion, canary)
        self.champion.see(sum(champion), len(champion))
        self.canary.see(canary)


class Trial:
    """Tell it every answer of both arms in the order they began; `verdict` is the question that was lost."""

    def __init__(self, share: float, champion: Baseline, canary: Baseline, alpha: float = ALPHA) -> None:
        self._k = max(1, min(19, round((1 - share) / share))) if share < 1 else 1
        self._baselines = (champion, canary)
        self._limit = math.log(len(Question) / alpha)
        self._latest: deque[Answer] = deque(maxlen=WINDOW)
        self._champions: deque[Answer] = deque(maxlen=self._k)
        self._canaries: deque[Answer] = deque(maxlen=1000)
        self._pairs = {question: _Pair() for question in (Question.ERRORS, Question.SLOW, Question.LATE)}
        self._alone = _Rate()
        self._log_alone = 0.0
        self._answers = [0, 0]
        self.verdict: Question | None = None

    def champion(self, answer: Answer) -> None:
        self._answers[0] += 1
        self._champions.append(answer)
        self._compare()

    def canary(self, answer: Answer) -> None:
        self._answers[1] += 1
        self._against_baseline(answer.failed)
        self._canaries.append(answer)
        self._compare()

    def figures(self) -> dict[str, Any]:
        """Everything the verdict stands on, as plain values."""
        first_s, token_s = self._slowness()
        asked = {
            question.name.lower(): {
                "e_value": _plain(pair.log_e),
                "champion": [pair.champion.bad, pair.champion.n],
                "canary": [pair.canary.bad, pair.canary.n],
            }
            for question, pair in self._pairs.items()
        }
        asked["baseline"] = {
            "e_value": _plain(self._log_alone),
            "canary": [self._alone.bad, self._alone.n],
            "allowed": self._allowed,
        }
        return {
            "verdict": self.verdict.value if self.verdict else None,
            "needed": _plain(self._limit),
            "answers": {"champion": self._answers[0], "canary": self._answers[1]},
            "slow_from": {"first_token_s": first_s, "token_s": token_s},
            "baseline_p95_s": [baseline.p95_s for baseline in self._baselines],
            "questions": asked,
        }

    @property
    def _allowed(self) -> float:
        return min(0.5, self._baselines[1].error_rate + ERROR_MARGIN)

    def _against_baseline(self, failed: bool) -> None:
        allowed = self._allowed
        guess = max(allowed, self._alone.guess)
        self._log_alone += math.log(guess / allowed if failed else (1 - guess) / (1 - allowed))
        self._alone.see(failed)
        self._decide(Question.BASELINE, self._log_alone)

    def _compare(self) -> None:
        """Close a block when it is whole. Limits come from blocks before it."""
        if len(self._champions) < self._k or not self._canaries:
            return
        champions, canary = [*self._champions], self._canaries.popleft()
        self._champions.clear()
        self._pairs[Question.ERRORS].see([answer.failed for answer in champions], canary.failed)
        if len(self._latest) >= ENOUGH:
            limits = self._slowness()
            slow = [_slow(answer, limits) for answer in champions]
            self._pairs[Question.SLOW].see(slow, _slow(canary, limits))
        if all(baseline.p95_s is not None for baseline in self._baselines):
            late = [_late(answer, self._baselines[0]) for answer in champions]
            self._pairs[Question.LATE].see(late, _late(canary, self._baselines[1]))
        self._latest.extend(champions)
        for question, pair in self._pairs.items():
            self._decide(question, pair.log_e)

    def _decide(self, question: Question, log_e: float) -> None:
        if self.verdict is None and log_e >= self._limit:
            self.verdict = question

    def _slowness(self) -> tuple[float | None, float | None]:
        first = [answer.first_s for answer in self._latest if answer.first_s is not None]
        token = [answer.token_s for answer in self._latest if answer.token_s is not None]
        return _high(first), _high(token)


def _evidence(a: float, b: float, champion: list[bool], canary: bool) -> float:
    """Log e-value of one block: how much likelier with rates (a, b) than with their mean in both arms."""
    k = len(champion)
    null = (k * a + b) / (k + 1)
    bad = sum(champion)
    log = math.log(b / null if canary else (1 - b) / (1 - null))
    return log + bad * math.log(a / null) + (k - bad) * math.log((1 - a) / (1 - null))


def _mean(a: float, b: float) -> float:
    """log of the mean of two e-values, itself an e-value."""
    top = max(a, b)
    return top + math.log((math.exp(a - top) + math.exp(b - top)) / 2)


def _high(values: list[float]) -> float | None:
    if len(values) < ENOUGH:
        return None
    return MARGIN * sorted(values)[math.ceil(PERCENTILE * len(values)) - 1]


def _slow(answer: Answer, limits: tuple[float | None, float | None]) -> bool:
    seen = zip((answer.first_s, answer.token_s), limits, strict=True)
    return any(value is not None and limit is not None and value > limit for value, limit in seen)


def _late(answer: Answer, baseline: Baseline) -> bool:
    return answer.total_s is not None and answer.total_s > LATENCY_RATIO * (baseline.p95_s or math.inf)


def _plain(log: float) -> float:
    return round(math.exp(min(log, 50.0)), 4)
