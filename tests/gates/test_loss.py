from __future__ import annotations

import math

import pytest

from luthier.gates import loss
from tests.gates.evidence import evidence


@pytest.mark.parametrize(
    ("tuned", "tolerance", "passed"),
    [(1.9, 0.0, True), (2.0, 0.0, True), (2.01, 0.0, False), (2.1, 0.06, True), (math.nan, 0.5, False)],
)
def test_a_tuned_model_may_not_lose_likelihood_beyond_the_tolerance(
    tuned: float, tolerance: float, passed: bool
) -> None:
    seen = evidence(scorecard={"loss": {"base": 2.0, "tuned": tuned}, "split": "train"})
    verdict = loss.check(loss.Params(tolerance=tolerance), seen)
    assert verdict.passed is passed
    assert "rows it was trained on" in verdict.reason


def test_a_loss_that_was_not_measured_gives_no_verdict() -> None:
    with pytest.raises(LookupError):
        loss.check(loss.Params(), evidence(scorecard={"systems": {}}))
