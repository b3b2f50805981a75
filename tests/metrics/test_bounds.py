"""What a stranger's grader may cost is bounded before it is worked on."""

from __future__ import annotations

import pytest

from luthier.metrics import _formula, _overlap


@pytest.mark.parametrize("sign", ["+", "*", "-", "/"])
def test_a_formula_of_many_terms_is_refused_and_not_recursed_into(sign: str) -> None:
    with pytest.raises(_formula.BadFormula, match="more than 200"):
        _formula.parse(sign.join(["a"] * 494))
    assert _formula.value(_formula.parse("+".join(["a"] * 100)), {"a": 1.0}) == 100.0


def test_a_longest_common_subsequence_looks_at_a_bounded_part() -> None:
    text = "".join(chr(0x4E00 + n % 20_000) for n in range(200_000))
    assert _overlap.fuzzy_match(text, text) == 1.0
    assert _overlap.lcs(text, text) == _overlap.LONGEST
