"""The canary's test, by simulation: seeded traffic, no clock."""

from __future__ import annotations

import math
import random

import pytest

from luthier.serving.verdict import ALPHA, Answer, Baseline, Question, Trial

BASELINE = Baseline(error_rate=0.01, p95_s=0.5)


def answer(random: random.Random, slow: float = 1.0, errors: float = 0.01) -> Answer:
    if random.random() < errors:
        return Answer(True)
    first_s, token_s = random.lognormvariate(-2, 0.5) * slow, random.lognormvariate(-4, 0.3) * slow
    return Answer(False, first_s, token_s, first_s + 20 * token_s)


def traffic(
    seed: int, share: float, canaries: int, *, slow: float = 1.0, errors: float = 0.01, before: float = 0.01
) -> Trial:
    """A trial over seeded traffic, until it is decided or so many canary answers were seen."""
    draw, trial, seen = random.Random(seed), Trial(share, BASELINE, BASELINE), 0
    while trial.verdict is None and seen < canaries:
        if draw.random() < share:
            trial.canary(answer(draw, slow, errors))
            seen += 1
        else:
            trial.champion(answer(draw, errors=before))
    return trial


def false_aborts(runs: int, canaries: int) -> int:
    return sum(traffic(seed, 0.2, canaries).verdict is not None for seed in range(runs))


def test_of_a_thousand_canaries_as_good_as_their_champion_at_most_one_in_a_hundred_is_aborted() -> None:
    assert false_aborts(1000, 60) <= 1000 * ALPHA


@pytest.mark.long
def test_of_a_thousand_such_canaries_watched_for_two_thousand_answers_neither() -> None:
    assert false_aborts(1000, 2000) <= 1000 * ALPHA


def test_a_load_that_slows_both_arms_aborts_nothing() -> None:
    aborted = 0
    for seed in range(100):
        draw, trial = random.Random(seed), Trial(0.2, BASELINE, BASELINE)
        for n in range(500):
            slow = 6.0 if (n // 50) % 2 else 1.0
            (trial.canary if draw.random() < 0.2 else trial.champion)(answer(draw, slow))
        aborted += trial.verdict is not None
    assert aborted <= 1


def test_a_canary_three_times_as_slow_is_aborted_within_thirty_answers() -> None:
    for seed in range(100):
        trial = traffic(seed, 0.1, 30, slow=3.0)
        assert trial.verdict in (Question.SLOW, Question.LATE)


def test_a_canary_that_fails_one_in_twenty_is_aborted_within_four_hundred_answers() -> None:
    for seed in range(50):
        trial = traffic(seed, 0.1, 400, errors=0.05, before=0.001)
        assert trial.verdict in (Question.ERRORS, Question.BASELINE)
        assert trial.figures()["answers"]["canary"] <= 400


def test_a_canary_without_a_champion_is_held_against_its_own_baseline() -> None:
    trial = Trial(1.0, BASELINE, BASELINE)
    seen = 0
    while trial.verdict is None:
        trial.canary(Answer(True))
        seen += 1
    assert trial.verdict is Question.BASELINE and seen <= 6


def test_the_evidence_of_a_block_is_at_most_one_on_average_when_both_arms_are_equal() -> None:
    """The e-variable's own promise, exactly: over all outcomes of a block, for any common rate."""
    from luthier.serving.verdict import _evidence

    for rate in (0.001, 0.05, 0.3, 0.9):
        for guess_a, guess_b in ((0.01, 0.1), (0.2, 0.9), (0.4, 0.5)):
            expected = 0.0
            for outcome in range(2**5):
                bits = [bool(outcome >> n & 1) for n in range(5)]
                chance = math.prod(rate if bit else 1 - rate for bit in bits)
                expected += chance * math.exp(_evidence(guess_a, guess_b, bits[:4], bits[4]))
            assert expected <= 1 + 1e-9


def test_figures_are_plain_values_that_tell_what_the_verdict_stands_on() -> None:
    figures = traffic(1, 0.1, 30, slow=3.0).figures()
    assert figures["verdict"] and figures["questions"]["slow"]["canary"][1] > 0
    assert figures["slow_from"]["first_token_s"] > 0
