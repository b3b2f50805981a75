from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.errors import DataError
from luthier.sources import _form

FORM = _form.Form("{text}", "{label}", None, {})
TEXT = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)


@given(TEXT, TEXT)
def test_a_records_text_comes_out_literally(text: str, label: str) -> None:
    row = _form.read({"text": text, "label": label}, FORM, "a:1")
    assert [message.content for message in row.messages] == [text, label]


def test_braces_in_a_record_never_name_another_column() -> None:
    form = _form.Form("{a}{b} {{a}} {", "{b}", "S {b}", {})
    row = _form.read({"a": "{b}", "b": "x{a}"}, form, "a:1")
    assert [message.content for message in row.messages] == ["S x{a}", "{b}x{a} {a} {", "x{a}"]


def test_values_are_mapped_and_an_unmapped_one_is_refused() -> None:
    form = _form.Form("{text}", "{label}", None, {"label": {"0": "safe", "true": "yes"}})
    assert _form.read({"text": "a", "label": 0}, form, "a:1").answer == "safe"
    assert _form.read({"text": "a", "label": True}, form, "a:1").answer == "yes"
    with pytest.raises(DataError, match="'2', which `values` does not map"):
        _form.read({"text": "a", "label": "2"}, form, "a:1")
    with pytest.raises(DataError, match=r"`values`: unknown column 'label'.*known: text"):
        _form.read({"text": "a"}, form, "a:1")


def test_an_unknown_column_is_answered_with_those_that_exist() -> None:
    with pytest.raises(DataError, match=r"unknown column 'text'.*did you mean 'texts'.*label") as caught:
        _form.read({"texts": "a", "label": "b"}, FORM, "a.csv:4")
    assert caught.value.where == "a.csv:4"


def test_a_record_without_messages_needs_a_form() -> None:
    with pytest.raises(DataError, match=r"no `messages` \(it has: text\)"):
        _form.read({"text": "a"}, None, "a:1")


@pytest.mark.parametrize("value", [None, [], {}])
def test_only_plain_values_become_text(value: object) -> None:
    with pytest.raises(DataError, match="not text"):
        _form.read({"text": value, "label": "b"}, FORM, "a:1")
