"""Figures with their uncertainty: scores of a classifier, intervals, and exact paired tests.

Sources: Wilson (1927) score interval; McNemar (1947) in its exact binomial form; Cohen (1960) kappa;
the percentile bootstrap, Efron (1979). Percentiles interpolate linearly (numpy's default).
It does not know models, rows or files. scipy and numpy are loaded when a figure needs them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

NORMAL_975 = 1.959963984540054  # the 97.5 % point of the standard normal: a two-sided 95 % interval


@dataclass(frozen=True)
class Scores:
    """One system on one set of rows. F1, precision and recall are about `positive`; None without it."""

    accuracy: float
    low: float
    high: float
    f1: float | None
    precision: float | None
    recall: float | None
    kappa: float | None
    confusion: Mapping[str, Mapping[str, int]]
    unparsed: int


def scores(gold: Sequence[str], said: Sequence[str | None], positive: str | None = None) -> Scores:
    """Score answers against gold labels. `None` (no answer could be read) is wrong, and counted."""
    if len(gold) != len(said) or not gold:
        raise ValueError(f"{len(gold)} gold labels and {len(said)} answers; both must be the same, not zero")
    right = sum(a == b for a, b in zip(gold, said, strict=True))
    low, high = wilson(right, len(gold))
    confusion: dict[str, dict[str, int]] = {}
    for truth, answer in zip(gold, said, strict=True):
        row = confusion.setdefault(truth, {})
        name = "" if answer is None else answer
        row[name] = row.get(name, 0) + 1
    precision, recall, f1 = _about(positive, gold, said) if positive is not None else (None, None, None)
    return Scores(
        accuracy=right / len(gold),
        low=low,
        high=high,
        f1=f1,
        precision=precision,
        recall=recall,
        kappa=kappa(gold, ["" if answer is None else answer for answer in said]),
        confusion={truth: dict(sorted(row.items())) for truth, row in sorted(confusion.items())},
        unparsed=sum(answer is None for answer in said),
    )


def _about(positive: str, gold: Sequence[str], said: Sequence[str | None]) -> tuple[float, float, float]:
    """Precision, recall and F1 of one label; 0 where a ratio has no cases (scikit-learn's zero_division)."""
    hit = sum(truth == answer == positive for truth, answer in zip(gold, said, strict=True))
    claimed, present = sum(answer == positive for answer in said), sum(truth == positive for truth in gold)
    precision = hit / claimed if claimed else 0.0
    recall = hit / present if present else 0.0
    return precision, recall, 2 * hit / (claimed + present) if claimed + present else 0.0


def wilson(right: int, total: int) -> tuple[float, float]:
    """95 % interval for a share: never below 0 or above 1, sensible even at 0 of n and n of n."""
    if not 0 <= right <= total or total < 1:
        raise ValueError(f"{right} of {total} is no share")
    z2, share = NORMAL_975**2, right / total
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = NORMAL_975 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return (0.0 if right == 0 else max(0.0, centre - half)), (
        1.0 if right == total else min(1.0, centre + half)
    )


def mcnemar(wins: int, losses: int) -> float:
    """Two-sided exact p: could `wins` and `losses` on paired rows be the fall of a fair coin?"""
    if wins + losses == 0:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses, 0.5).pvalue)


def worse(wins: int, losses: int) -> float:
    """One-sided exact p that the losses are no more than a fair coin would give: small means worse."""
    if wins + losses == 0:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(losses, wins + losses, 0.5, alternative="greater").pvalue)


def kappa(a: Sequence[str], b: Sequence[str]) -> float | None:
    """Cohen's kappa: agreement beyond chance. None when chance alone would agree always."""
    total = len(a)
    agreed = sum(x == y for x, y in zip(a, b, strict=True)) / total
    chance = sum((list(a).count(label) / total) * (list(b).count(label) / total) for label in set(a) | set(b))
    return None if chance >= 1.0 else (agreed - chance) / (1 - chance)


def bootstrap(values: Sequence[float], seed: int, resamples: int = 2000) -> tuple[float, float]:
    """95 % percentile interval of the mean: of as many rows drawn again with replacement, so many times."""
    import numpy

    found = numpy.asarray(values, dtype=numpy.float64)
    draw = numpy.random.default_rng(seed)
    means = [found[draw.integers(0, len(found), len(found))].mean() for _ in range(resamples)]
    low, high = numpy.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99 of one or more values, interpolated linearly."""
    ordered = sorted(values)
    found = {}
    for point in (50, 95, 99):
        at = (len(ordered) - 1) * point / 100
        low = math.floor(at)
        high = min(low + 1, len(ordered) - 1)
        found[f"p{point}"] = ordered[low] + (ordered[high] - ordered[low]) * (at - low)
    return found
