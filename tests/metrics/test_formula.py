"""Formulas over scores are arithmetic, by precedence, and nothing else."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.errors import GraderError
from luthier.metrics import _formula

SCORES = {"a": 0.5, "b_2": 2.0}


@pytest.mark.parametrize(
    ("formula", "value"),
    [
        ("a + b_2 * 3", 6.5),
        ("(a + b_2) * 3", 7.5),
        ("2 ^ 3 ^ 2", 512.0),
        ("-2 ^ 2", -4.0),
        ("2 ^ -1", 0.5),
        ("8 / 4 / 2", 1.0),
        ("5 - 3 - 1", 1.0),
        ("--a", 0.5),
        ("min(a, b_2, 0.1) + max(a, b_2)", 2.1),
        ("abs(-3) + floor(1.9) + ceil(1.1)", 6.0),
        ("exp(0) + sqrt(9) + log(1)", 4.0),
        ("1e2 + .5", 100.5),
    ],
)
def test_a_formula_has_the_value_arithmetic_gives_it(formula: str, value: float) -> None:
    assert _formula.value(_formula.parse(formula), SCORES) == pytest.approx(value)


@pytest.mark.parametrize(
    "formula",
    [
        "", "a +", "(a", "a)", "a b_2", "2 3", "a ** 2", "a.b", "a[0]", "f(a)", "a; b", "lambda: a",
        "abs(a, a)",
        "min(a)", "abs()", "'x'", "a if a else b", "__import__('os')", "a == b", "1 % 2",
    ],
)  # fmt: skip
def test_what_is_no_formula_is_refused(formula: str) -> None:
    with pytest.raises(_formula.BadFormula):
        _formula.parse(formula)


@pytest.mark.parametrize(
    "formula", ["1 / (a - a)", "log(0)", "sqrt(-1)", "exp(1000)", "(-1) ^ 0.5", "10 ^ 400", "1e308 * 10"]
)
def test_a_formula_without_a_real_value_says_so(formula: str) -> None:
    with pytest.raises(_formula.BadFormula):
        _formula.value(_formula.parse(formula), SCORES)


@pytest.mark.parametrize(
    "formula", ["(" * 500 + "a" + ")" * 500, "-" * 1000 + "a", "2" + "^2" * 500, "a" * 3000]
)
def test_length_and_depth_are_bounded(formula: str) -> None:
    with pytest.raises(_formula.BadFormula, match=r"deeper|longer|more than"):
        _formula.parse(formula)


@given(st.text(alphabet="ab()+-*/^.,0123456789 mxin", max_size=60))
def test_any_text_is_a_formula_or_a_named_error(text: str) -> None:
    try:
        found = _formula.value(_formula.parse(text), dict.fromkeys(_formula.names(_formula.parse(text)), 0.5))
    except GraderError:
        return
    assert math.isfinite(found)


@given(st.lists(st.sampled_from(["+", "-", "*"]), min_size=1, max_size=8), st.data())
def test_chains_agree_with_pythons_own_arithmetic(signs: list[str], data: st.DataObject) -> None:
    numbers = data.draw(st.lists(st.integers(0, 9), min_size=len(signs) + 1, max_size=len(signs) + 1))
    text = str(numbers[0]) + "".join(f" {sign} {n}" for sign, n in zip(signs, numbers[1:], strict=True))
    assert _formula.value(_formula.parse(text), {}) == eval(text)  # noqa: S307 - digits and signs, made above
