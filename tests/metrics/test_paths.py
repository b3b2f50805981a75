"""Templates of graders name places and nothing else; what is put in is never read again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.errors import GraderError
from luthier.metrics import _paths

ITEM = {"answer": "four", "list": [1, {"deep": True}], "number": 4, "nothing": None, "a-b": "x"}


@pytest.mark.parametrize(
    ("template", "filled"),
    [
        ("{{ sample.output_text }}!", '{"a": {"b": [10, "ü"]}}!'),
        ("{{sample.output_json.a.b[1]}}", "ü"),
        ("{{ sample.output_json.a }}", '{"b": [10, "ü"]}'),
        ("{{ item.answer }} {{item.number}}", "four 4"),
        ("{{ item.list[1].deep }}", "true"),
        ("{{ item.a-b }} { {x} }", "x { {x} }"),
        ("no place", "no place"),
    ],
)
def test_a_path_becomes_its_value(template: str, filled: str) -> None:
    assert _paths.fill(template, '{"a": {"b": [10, "ü"]}}', ITEM) == filled


def test_a_value_that_looks_like_a_template_stays_text() -> None:
    assert _paths.fill("{{ item.a }}", "", {"a": "{{ item.b }}", "b": "secret"}) == "{{ item.b }}"


@pytest.mark.parametrize(
    "text",
    [
        "item.__class__()", "item|upper", "7*7", "self", "item.x + 1", "", "sample", "sample.secret",
        "sample.output_text.x", "item['x']", "config.items()", "item.list[-1]", "for a in item", "item..x",
    ],
)  # fmt: skip
def test_what_is_no_path_is_refused(text: str) -> None:
    with pytest.raises(_paths.BadTemplate):
        _paths.places("{{ " + text + " }}")


@pytest.mark.parametrize(
    "path", ["item.none", "item.list[9]", "item.answer.x", "item.answer[0]", "item.nothing"]
)
def test_a_field_the_row_does_not_have_is_named(path: str) -> None:
    with pytest.raises(_paths.NoSuchPlace, match="there is nothing at item"):
        _paths.fill("{{ " + path + " }}", "", ITEM)


def test_attributes_of_python_objects_are_no_places() -> None:
    with pytest.raises(_paths.NoSuchPlace):
        _paths.fill("{{ item.__class__ }}", "", ITEM)


@pytest.mark.parametrize("answer", ["not json", "[" * 100_000, '{"a": NaN}', '{"b": 1}'])
def test_an_answer_that_is_not_the_json_asked_for_is_the_answers_fault(answer: str) -> None:
    with pytest.raises(_paths.Unreadable):
        _paths.fill("{{ sample.output_json.a }}", answer, ITEM)


def test_a_filled_template_is_bounded() -> None:
    with pytest.raises(_paths.Unreadable, match="longer"):
        _paths.fill("{{ sample.output_text }}" * 1000, "x" * 2000, ITEM)


@given(st.text(max_size=200), st.text(max_size=50))
def test_any_template_either_fills_or_says_why_not(template: str, value: str) -> None:
    try:
        _paths.fill(template, value, {"a": value})
    except GraderError as error:
        assert str(error)
