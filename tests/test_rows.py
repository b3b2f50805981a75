from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.errors import DataError
from luthier.rows import Pair, Prompt, Role, again, chat, conversation, pair, prompt

TEXT = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)


def turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in pairs]


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4), st.one_of(st.none(), TEXT))
def test_a_conversation_comes_back_from_its_record_with_the_same_id(
    talk: list[tuple[str, str]], system: str | None
) -> None:
    messages = turns(*((role, text) for q, a in talk for role, text in (("user", q), ("assistant", a))))
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    row = chat(messages, "a.jsonl:1")
    assert row.as_record()["messages"] == messages
    assert chat(messages, "b.jsonl:9").id == row.id and len(row.id) == 16
    assert row.answer == messages[-1]["content"] and len(row.prompt) == len(messages) - 1


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "non-empty list"),
        ("hello", "non-empty list"),
        ([3], "object with `role`"),
        (turns(("user", "a")), "must end with the assistant"),
        (turns(("assistant", "a")), "expected 'user'"),
        (turns(("user", "a"), ("user", "b")), "expected 'assistant'"),
        (turns(("user", "a"), ("system", "b"), ("assistant", "c")), "expected 'assistant'"),
        (turns(("system", "a")), "only a system message"),
        (turns(("robot", "a")), "unknown role 'robot'"),
        (turns(("user", "  "), ("assistant", "b")), "empty"),
        ([{"role": "user", "content": None}], "empty or not text"),
        (turns(("user", "\ud800"), ("assistant", "b")), "surrogate"),
    ],
)
def test_turns_that_are_no_training_row_are_refused_with_their_place(messages: object, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        chat(messages, "rows.jsonl:3")
    assert caught.value.where is not None and caught.value.where.startswith("rows.jsonl:3")


def test_a_conversation_may_end_with_the_user_when_it_is_a_question() -> None:
    assert conversation(turns(("user", "a")), "request")[0].role is Role.USER


def test_anyone_may_speak_twice_and_calls_are_answered_all_the_same() -> None:
    said = turns(("assistant", "hi"), ("user", "a"), ("user", "b"), ("system", "c"), ("user", "d"))
    assert [turn.role.value for turn in conversation(said, "here")] == [m["role"] for m in said]
    answer = {"role": "tool", "content": "x", "tool_call_id": "nobody's"}
    with pytest.raises(DataError, match="nobody made"):
        conversation([*turns(("user", "a")), answer], "here")


PROMPT = turns(("system", "be brief"), ("user", "hi"))


def test_a_pair_comes_back_from_its_record_and_is_two_conversations_learnt_behind_the_prompt() -> None:
    row = pair(PROMPT, turns(("assistant", "hello")), turns(("assistant", "go away")), "a.jsonl:1")
    again_ = again({**row.as_record(), "where": "b.jsonl:9"})
    assert isinstance(again_, Pair) and again_.id == row.id and again_.where == "b.jsonl:9"
    chosen, rejected = row.documents
    assert chosen.prompt == rejected.prompt == row.prompt and chosen.given == rejected.given == 2
    assert (chosen.answer, rejected.answer, row.answer) == ("hello", "go away", "hello")
    assert chosen.id == rejected.id == row.id
    swapped = pair(PROMPT, turns(("assistant", "go away")), turns(("assistant", "hello")), "a.jsonl:1")
    assert swapped.id != row.id


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "words"),
    [
        (PROMPT, turns(("assistant", "a")), turns(("assistant", "a")), "are the same"),
        (PROMPT, [], turns(("assistant", "a")), "chosen answer must be a non-empty list"),
        (PROMPT, turns(("assistant", "a")), "b", "rejected answer must be a non-empty list"),
        (PROMPT, turns(("user", "a"), ("assistant", "c")), turns(("assistant", "b")), "expected 'assistant'"),
        (PROMPT, turns(("assistant", "a"), ("user", "b")), turns(("assistant", "b")), "must end with the"),
        (
            [*PROMPT, *turns(("assistant", "x"))],
            turns(("assistant", "a")),
            [],
            "prompt ends with 'assistant'",
        ),
        ([], turns(("assistant", "a")), turns(("assistant", "b")), "non-empty list"),
    ],
)
def test_what_is_no_preference_is_refused_with_its_place(
    prompt: object, chosen: object, rejected: object, words: str
) -> None:
    with pytest.raises(DataError, match=words) as caught:
        pair(prompt, chosen, rejected, "rows.jsonl:3")
    assert caught.value.where is not None and caught.value.where.startswith("rows.jsonl:3")


def test_a_prompt_ends_with_the_user_keeps_its_fields_and_comes_back_from_its_record() -> None:
    row = prompt(PROMPT, {"reference_answer": {"a": [1, None]}, "n": 4}, "a.jsonl:1")
    back = again({**row.as_record(), "where": "b.jsonl:9"})
    assert isinstance(back, Prompt) and (back.id, back.item, back.prompt) == (row.id, row.item, row.prompt)
    assert row.documents == () and row.answer == ""
    assert prompt(PROMPT, {"n": 5}, "a.jsonl:1").id != row.id


@pytest.mark.parametrize(
    ("messages", "item", "words"),
    [
        ([*PROMPT, *turns(("assistant", "a"))], {}, "must end with the user"),
        ([], {}, "non-empty list"),
        (PROMPT, {"a": float("nan")}, "not a JSON value"),
        (PROMPT, {"a": {1, 2}}, "not a JSON value"),
        (PROMPT, {"a": "\ud800"}, "not a JSON value"),
    ],
)
def test_what_is_no_prompt_is_refused_with_its_place(messages: object, item: Any, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        prompt(messages, item, "rows.jsonl:3")
    assert caught.value.where is not None and caught.value.where.startswith("rows.jsonl:3")
