"""The measures of overlap, against cases worked by hand and against their definitions written out."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.metrics import _overlap

TEXT = st.text(alphabet="ab c.", max_size=12)


def slow_lcs(a: str, b: str) -> int:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


@given(st.text(alphabet="abc", max_size=30), st.text(alphabet="abcd", max_size=30))
def test_the_subsequence_by_bits_is_the_one_by_table(a: str, b: str) -> None:
    assert _overlap.lcs(a, b) == slow_lcs(a, b)


def test_fuzzy_match_is_rapidfuzz_ratio() -> None:
    # rapidfuzz.fuzz.ratio("this is a test", "this is a test!") is 96.55…, its documentation's own example
    assert _overlap.fuzzy_match("this is a test", "this is a test!") == pytest.approx(0.9655, abs=1e-4)


def test_bleu_of_papineni_s_clipping_example() -> None:
    # "the" stands seven times, twice in the reference: 2/7, then no bigram: (0+1)/(6+1), (0+1)/(5+1), 1/5
    found = _overlap.bleu("the the the the the the the", "the cat is on the mat")
    assert found == pytest.approx((2 / 7 * 1 / 7 * 1 / 6 * 1 / 5) ** 0.25)


def test_bleu_of_a_short_answer_is_cut_by_the_brevity_penalty() -> None:
    assert _overlap.bleu("a b", "a b c d") == pytest.approx(math.exp(1 - 4 / 2))


def test_gleu_is_the_lesser_of_precision_and_recall() -> None:
    # said: 3+2+1 n-grams, wanted: 4+3+2+1; found: a, b, "a b" = 3
    assert _overlap.gleu("a b x", "a b c d") == pytest.approx(3 / 10)


def test_meteor_of_one_chunk_and_of_two() -> None:
    # P = 3/3, R = 3/4, F = 10PR/(R+9P); one chunk of three: penalty 0.5·(1/3)³
    mean = 10 * 0.75 / (0.75 + 9)
    assert _overlap.meteor("the cat sat", "The cat sat down") == pytest.approx(mean * (1 - 0.5 / 27))
    # "sat the cat" against "the cat sat": three matches in two chunks
    assert _overlap.meteor("sat the cat", "the cat sat") == pytest.approx(1 - 0.5 * (2 / 3) ** 3)


def test_rouge_of_lin_s_example() -> None:
    # Lin 2004, section 3: against "police kill the gunman", "the gunman kill police"
    assert _overlap.rouge_l("police kill the gunman", "police killed the gunman") == pytest.approx(0.75)
    assert _overlap.rouge_l("the gunman kill police", "police killed the gunman") == pytest.approx(0.5)
    assert _overlap.rouge(2)("police kill the gunman", "police killed the gunman") == pytest.approx(1 / 3)


def test_cosine_of_word_counts() -> None:
    assert _overlap.cosine("a a b", "a b b") == pytest.approx(4 / 5)


@pytest.mark.parametrize("name", sorted(_overlap.MEASURES))
@given(said=TEXT, wanted=TEXT)
def test_every_measure_lies_between_0_and_1(name: str, said: str, wanted: str) -> None:
    assert 0.0 <= _overlap.MEASURES[name](said, wanted) <= 1.0


@pytest.mark.parametrize("name", sorted(set(_overlap.MEASURES) - {"meteor"}))
@given(text=TEXT)
def test_equal_texts_score_1(name: str, text: str) -> None:
    assert _overlap.MEASURES[name](text, text) == pytest.approx(1.0)


@pytest.mark.parametrize("name", sorted(_overlap.MEASURES))
def test_texts_without_a_common_letter_score_0(name: str) -> None:
    assert _overlap.MEASURES[name]("aa bb", "cccc") == 0.0
