from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from luthier.gates.floor import Params, check
from tests.gates.evidence import evidence


def test_a_score_at_the_floor_passes_and_one_below_it_does_not() -> None:
    assert check(Params(minimum=0.95), evidence()).passed
    verdict = check(Params(minimum=0.9501), evidence())
    assert not verdict.passed
    assert "0.9500" in verdict.reason and "0.9501" in verdict.reason


def test_the_low_end_of_the_interval_can_be_asked_for() -> None:
    assert not check(Params(minimum=0.9, bound="low"), evidence()).passed
    assert check(Params(minimum=0.88, bound="low"), evidence()).passed


def test_a_score_that_was_not_measured_is_a_refusal() -> None:
    verdict = check(Params(metric="f1", minimum=0.1), evidence())
    assert not verdict.passed and "not measured" in verdict.reason
    verdict = check(Params(metric="f1", minimum=0.1, bound="low"), evidence())
    assert not verdict.passed and "no interval" in verdict.reason


@given(st.floats(0, 1), st.floats(0, 1))
def test_raising_the_floor_never_turns_a_no_into_a_yes(a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert check(Params(minimum=low), evidence()).passed or not check(Params(minimum=high), evidence()).passed


def test_a_mean_reward_has_a_floor_and_an_interval() -> None:
    card = {"systems": {"tuned": {"reward": 7.5, "low": 6.9, "high": 8.1, "accuracy": None}}}
    assert check(Params(metric="reward", minimum=7), evidence(scorecard=card)).passed
    assert not check(Params(metric="reward", minimum=7, bound="low"), evidence(scorecard=card)).passed
    assert "not measured" in check(Params(minimum=0.5), evidence(scorecard=card)).reason
    assert "not measured" in check(Params(metric="reward", minimum=0), evidence()).reason
