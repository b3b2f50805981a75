from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.serving.text import Unfolding
from luthier.template import load_tokenizer

TOKENS = st.lists(st.integers(0, 258), max_size=60)


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Any:
    return load_tokenizer(tiny_base)


def unfold(tokenizer: Any, ids: list[int], stops: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    text = Unfolding(tokenizer, stops)
    pieces = []
    for token in ids:
        pieces.append(text.push(token))
        if text.stopped:
            break
    return [*pieces, text.close()], text.stopped


@settings(max_examples=150, deadline=None)
@given(ids=TOKENS)
def test_the_pieces_of_any_tokens_add_up_to_their_decoding(tokenizer: Any, ids: list[int]) -> None:
    pieces, _ = unfold(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)


@settings(max_examples=100, deadline=None)
@given(said=st.text(max_size=30))
def test_no_piece_of_valid_text_holds_half_a_character(tokenizer: Any, said: str) -> None:
    said = said.replace("\ufffd", "")
    ids = tokenizer(said, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    pieces, _ = unfold(tokenizer, ids)
    assert "".join(pieces) == said
    assert "\ufffd" not in "".join(pieces)


@settings(max_examples=150, deadline=None)
@given(said=st.text("abc", max_size=30), stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_text_is_cut_before_the_first_stop_string(tokenizer: Any, said: str, stops: list[str]) -> None:
    ids = tokenizer(said, add_special_tokens=False)["input_ids"]
    pieces, stopped = unfold(tokenizer, ids, tuple(stops))
    ends = [(said.find(stop) + len(stop), said.find(stop)) for stop in stops if stop in said]
    assert stopped == bool(ends)
    if ends:  # letters arrive one by one: the stop string that is complete first cuts, at its earliest
        first = min(end for end, _ in ends)
        assert "".join(pieces) == said[: min(start for end, start in ends if end == first)]
    else:
        assert "".join(pieces) == said


def test_a_possible_beginning_of_a_stop_string_is_held_back_until_it_is_none(tokenizer: Any) -> None:
    ids = tokenizer("ab###", add_special_tokens=False)["input_ids"]
    text = Unfolding(tokenizer, ("###!",))
    assert [text.push(token) for token in ids] == ["a", "b", "", "", ""]
    assert text.close() == "###"
