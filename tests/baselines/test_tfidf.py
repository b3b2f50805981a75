from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from luthier.baselines import Task
from luthier.baselines.tfidf import Params, predict
from luthier.errors import DataError
from luthier.rows import Chat, Message, chat


def rows(seed: int, count: int, answers: tuple[str, str] = ("injection", "safe")) -> list[Chat]:
    draw = random.Random(seed)
    made = []
    for n in range(count):
        words = draw.choices(["alpha", "beta", "gamma", "delta", "epsilon"], k=6)
        words[draw.randrange(6)] = "ignore" if n % 2 else "please"
        turns = [("user", " ".join(words)), ("assistant", answers[0] if n % 2 else answers[1])]
        made.append(chat([{"role": role, "content": text} for role, text in turns], f"{seed}:{n}"))
    return made


def unasked(prompts: Sequence[Sequence[Message]]) -> list[str | None]:
    raise AssertionError("word counts need no language model")


def task(train: list[Chat]) -> Task:
    return Task(train, [], rows(2, 40), ("injection", "safe"), 3, unasked)


def test_a_word_that_gives_the_answer_away_is_learnt() -> None:
    found = predict(Params(), task(rows(1, 120)))
    assert found.said == [row.answer for row in rows(2, 40)]
    assert "120 training rows" in found.note


def test_it_answers_the_same_each_time() -> None:
    assert predict(Params(), task(rows(1, 50))) == predict(Params(), task(rows(1, 50)))


def test_training_rows_with_one_answer_alone_are_refused_with_a_way_out() -> None:
    with pytest.raises(DataError, match="two different answers"):
        predict(Params(), task(rows(1, 20, ("safe", "safe"))))
