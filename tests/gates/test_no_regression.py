from __future__ import annotations

import pytest

from luthier.gates.no_regression import Params, check
from tests.gates.evidence import answers, evidence


def test_better_than_the_base_passes_while_nothing_is_in_production() -> None:
    verdict = check(Params(), evidence())
    assert verdict.passed and "nothing is in production" in verdict.reason
    assert verdict.evidence["base"] == {"wins": 45, "losses": 0, "p": pytest.approx(2 / 2**45)}


@pytest.mark.parametrize("tuned", [50, 40, 58])
def test_equal_worse_or_not_surely_better_than_the_base_is_a_refusal(tuned: int) -> None:
    verdict = check(Params(), evidence(correct=answers(base=50, tuned=tuned)))
    assert not verdict.passed and "not better than the base" in verdict.reason


def test_no_rows_are_no_evidence() -> None:
    assert not check(Params(), evidence(correct={})).passed


def champion(right: int, rows: int = 100) -> dict[str, object]:
    return {"champion": {"rows": rows}, "champion_correct": answers(rows, base=50, tuned=right)}


def test_as_good_as_production_passes() -> None:
    verdict = check(Params(), evidence(**champion(95)))
    assert verdict.passed and "not worse than production" in verdict.reason


def test_significantly_worse_than_production_is_a_refusal() -> None:
    verdict = check(Params(tolerance=1.0), evidence(**champion(100)))
    assert not verdict.passed and "worse than the release in production" in verdict.reason
    assert verdict.evidence["champion"]["p_worse"] == pytest.approx(1 / 2**5)


def test_a_drop_beyond_the_tolerance_is_a_refusal_though_chance_could_explain_it() -> None:
    verdict = check(Params(tolerance=0.005), evidence(**champion(96)))
    assert verdict.evidence["champion"]["p_worse"] == pytest.approx(0.5)
    assert not verdict.passed
    assert check(Params(tolerance=0.01), evidence(**champion(96))).passed


def test_only_rows_that_both_answered_are_compared() -> None:
    shared = {f"row{n}": {"base": False, "tuned": True} for n in (0, 1, 2)}
    others = {f"elsewhere{n}": {"base": True, "tuned": True} for n in range(500)}
    verdict = check(Params(), evidence(champion={"rows": 503}, champion_correct=shared | others))
    assert verdict.passed and verdict.evidence["champion"]["rows"] == 3


def rewards(base: float, tuned: float, rows: int = 40) -> dict[str, dict[str, float]]:
    return {f"row{n}": {"base": base, "tuned": tuned + 0.001 * (n % 3)} for n in range(rows)}


def test_rewards_are_compared_row_by_row_by_the_sign_test() -> None:
    better = evidence(correct={}, rewards=rewards(0.2, 0.7))
    assert check(Params(), better).evidence["base"] == {
        "wins": 40,
        "losses": 0,
        "p": pytest.approx(2 / 2**40),
    }
    assert not check(Params(), evidence(correct={}, rewards=rewards(0.7, 0.2))).passed


@pytest.mark.parametrize(
    ("champion", "grader", "words"),
    [
        (0.7, "a", "not worse than production"),
        (0.9, "a", "worse than the release"),
        (0.7, "b", "another grader"),
    ],
)
def test_a_champion_is_a_rival_by_the_same_graders_rewards(champion: float, grader: str, words: str) -> None:
    made = evidence(
        correct={}, rewards=rewards(0.2, 0.7), champion={"grader": {"name": grader}},
        champion_rewards=rewards(0.2, champion), scorecard={"grader": {"name": "a"}},
    )  # fmt: skip
    assert words in check(Params(), made).reason


def test_a_champion_examined_on_other_rows_is_missing_evidence() -> None:
    verdict = check(Params(), evidence(champion={"rows": 1}, champion_correct={"x": {"tuned": True}}))
    assert not verdict.passed and "no comparison" in verdict.reason
