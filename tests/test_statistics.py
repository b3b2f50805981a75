from __future__ import annotations

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.stats import binomtest
from sklearn.metrics import cohen_kappa_score, precision_recall_fscore_support

from luthier.statistics import bootstrap, kappa, mcnemar, percentiles, scores, wilson, worse

LABELS = ("injection", "safe")
ANSWERS = st.lists(
    st.tuples(st.sampled_from(LABELS), st.sampled_from([*LABELS, None])), min_size=1, max_size=60
)


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_wilson_interval_is_scipys(case: tuple[int, int]) -> None:
    right, total = case
    expected = binomtest(right, total).proportion_ci(0.95, method="wilson")
    low, high = wilson(right, total)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= low <= right / total <= high <= 1


def test_an_interval_of_nothing_or_of_more_than_all_is_refused() -> None:
    for right, total in ((0, 0), (3, 2), (-1, 5)):
        with pytest.raises(ValueError, match="no share"):
            wilson(right, total)


@given(ANSWERS)
def test_precision_recall_and_f1_are_scikit_learns(pairs: list[tuple[str, str | None]]) -> None:
    gold, said = [a for a, _ in pairs], [b for _, b in pairs]
    found = scores(gold, said, "injection")
    expected = precision_recall_fscore_support(
        gold, [answer or "" for answer in said], labels=["injection"], zero_division=0.0
    )
    assert (found.precision, found.recall, found.f1) == pytest.approx(
        tuple(float(v[0]) for v in expected[:3])
    )


@given(ANSWERS)
def test_every_answer_stands_once_in_the_confusion_and_unreadable_ones_are_wrong(
    pairs: list[tuple[str, str | None]],
) -> None:
    gold, said = [a for a, _ in pairs], [b for _, b in pairs]
    found = scores(gold, said)
    assert sum(count for row in found.confusion.values() for count in row.values()) == len(gold)
    right = sum(found.confusion.get(label, {}).get(label, 0) for label in LABELS)
    assert found.accuracy == right / len(gold)
    assert found.unparsed == said.count(None)
    assert found.f1 is None and found.precision is None and found.recall is None


@given(ANSWERS)
def test_kappa_is_scikit_learns(pairs: list[tuple[str, str | None]]) -> None:
    a, b = [a for a, _ in pairs], [b or "" for _, b in pairs]
    found = kappa(a, b)
    if len(set(a) | set(b)) == 1:
        assert found is None
    else:
        assert found == pytest.approx(float(cohen_kappa_score(a, b)))


def test_scores_of_no_rows_or_of_unequal_lists_are_refused() -> None:
    for gold, said in (([], []), (["a"], [])):
        with pytest.raises(ValueError, match="same, not zero"):
            scores(gold, said)


@given(st.integers(0, 400), st.integers(0, 400))
def test_mcnemar_is_the_exact_binomial_test_and_cares_not_who_is_first(wins: int, losses: int) -> None:
    p = mcnemar(wins, losses)
    assert p == pytest.approx(mcnemar(losses, wins))
    assert 0 <= p <= 1
    if wins == losses:
        assert p == 1


def test_known_exact_p_values() -> None:
    assert mcnemar(10, 0) == pytest.approx(2 / 2**10)
    assert worse(0, 10) == pytest.approx(1 / 2**10)
    assert worse(10, 0) == 1
    assert mcnemar(0, 0) == worse(0, 0) == 1


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=80))
def test_percentiles_are_numpys(values: list[float]) -> None:
    found = percentiles(values)
    expected = numpy.percentile(values, [50, 95, 99])
    assert list(found) == ["p50", "p95", "p99"]
    assert list(found.values()) == pytest.approx(expected.tolist(), rel=1e-9, abs=1e-9)


def test_the_bootstrap_interval_of_a_mean_is_that_of_scipy() -> None:
    values = (numpy.random.default_rng(1).random(60) ** 2).tolist()
    low, high = bootstrap(values, seed=3)
    found = stats.bootstrap((values,), numpy.mean, n_resamples=9999, method="percentile", rng=5)
    assert low == pytest.approx(found.confidence_interval.low, abs=0.01)
    assert high == pytest.approx(found.confidence_interval.high, abs=0.01)
    assert bootstrap(values, seed=3) == (low, high)
    assert bootstrap([0.5] * 9, seed=3) == (0.5, 0.5)
