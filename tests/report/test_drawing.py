"""Charts and numbers: the arithmetic behind what is drawn."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.report import charts, numbers

finite = st.floats(-1e12, 1e12, allow_nan=False)


@given(finite, st.floats(1e-9, 1e12))
def test_ticks_cover_the_range_and_are_few(low: float, span: float) -> None:
    marks = charts.ticks(low, low + span)
    slack = 1e-6 * max(abs(low), abs(low + span), span)
    assert marks[0] <= low + slack and marks[-1] >= low + span - slack
    assert len(marks) <= 8


@given(st.floats(1e-6, 1e3), st.floats(1.01, 1e6))
def test_log_ticks_cover_the_range_and_rise(low: float, ratio: float) -> None:
    marks = charts.log_ticks(low, low * ratio)
    assert marks[0] <= low * (1 + 1e-9) and marks[-1] >= low * ratio * (1 - 1e-9)
    assert marks == sorted(set(marks))


@given(st.lists(finite, min_size=1, max_size=200))
def test_a_moving_mean_stays_within_what_it_averages(values: list[float]) -> None:
    mean = charts.smooth(list(enumerate(values)))
    slack = 1e-6 * max(1.0, *(abs(value) for value in values))
    assert len(mean) == len(values)
    assert all(min(values) - slack <= y <= max(values) + slack for _, y in mean)


@given(st.lists(st.floats(1e-9, 1e6), max_size=60), st.lists(st.floats(1e-9, 1e6), max_size=8))
def test_any_losses_can_be_drawn(train: list[float], held_out: list[float]) -> None:
    if not train and not held_out:
        return
    drawn = charts.curves(list(enumerate(train, 1)), [(5.0 * n, y) for n, y in enumerate(held_out, 1)], 5.0)
    assert "nan" not in drawn and "inf" not in drawn


def test_f1_interval_holds_the_f1_of_the_table() -> None:
    table = {"yes": {"yes": 90, "no": 10}, "no": {"yes": 5, "no": 95}}
    found = charts.f1_interval(table, "yes")
    assert found is not None
    f1, low, high = found
    assert f1 == pytest.approx(2 * 90 / (2 * 90 + 10 + 5))
    assert 0 < low < f1 < high < 1


@given(st.integers(1, 400), st.integers(0, 400), st.integers(0, 400))
def test_f1_interval_is_within_zero_and_one(hits: int, missed: int, false: int) -> None:
    found = charts.f1_interval({"yes": {"yes": hits, "no": missed}, "no": {"yes": false, "no": 3}}, "yes")
    assert found is not None
    assert 0 <= found[1] <= found[0] + 1e-12 <= found[2] + 1e-9 and found[2] <= 1 + 1e-12


def test_a_label_cannot_close_its_element() -> None:
    drawn = charts.track("k", "F1", charts.Bar("</title><script>", 0.5), None)
    assert "<script" not in drawn


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (0.0042, "4.2 ms"),
        (0.3, "300 ms"),
        (1.0, "1.0 s"),
        (59.96, "1 min 00 s"),
        (421.6, "7 min 02 s"),
        (7260, "2 h 01 min"),
    ],
)
def test_durations_carry_their_unit(seconds: float, told: str) -> None:
    assert numbers.duration(seconds).replace(numbers.THIN, " ") == told


@pytest.mark.parametrize(
    ("value", "told"),
    [(0.0, "p < 10⁻³⁰⁰"), (3.2e-27, "p = 3 × 10⁻²⁷"), (0.0123, "p = 0.012"), (0.38, "p = 0.38")],
)
def test_p_values_never_claim_zero(value: float, told: str) -> None:
    assert numbers.p_value(value).replace(numbers.NBSP, " ") == told


@pytest.mark.parametrize("missing", [None, math.nan, math.inf, "7", True])
def test_what_was_not_measured_is_a_dash(missing: object) -> None:
    for show in (numbers.count, numbers.percent, numbers.duration, numbers.size, numbers.rate):
        assert show(missing) == numbers.DASH


@given(st.text())
def test_visible_text_hides_nothing(text: str) -> None:
    shown = numbers.visible(text)
    assert not set(shown) & set("\u202e\u202d\u200b\u2066\x00\x1b\x7f")
    shown.encode("utf-8")
