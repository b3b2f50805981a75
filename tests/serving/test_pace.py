"""When a first token can be expected, by how the last answers went."""

from __future__ import annotations

import pytest

from luthier.serving.pace import Pace, Running

IDLE: list[Running] = []


def seen(*, token_s: float = 0.1, read_s: float = 0.01, prompt: int = 40) -> Pace:
    pace = Pace()
    pace.wrote(token_s)
    for _ in range(9):
        pace.read(token_s + prompt * read_s, prompt, prompt)
    return pace


def test_before_anything_was_measured_nothing_is_expected_to_take_time() -> None:
    assert Pace().first_s([Running(0, 10, 500)] * 4, [500] * 9, places=4) == 0.0


def test_a_prompt_waits_for_those_that_are_read_before_it_and_for_its_own_reading() -> None:
    pace = seen()
    assert pace.first_s(IDLE, [], 4) == pytest.approx(0.1 + 0.4)
    assert pace.first_s([Running(0, 10, 40), Running(3, 10, 0)], [], 4) == pytest.approx(0.4 + 0.5)
    assert pace.first_s(IDLE, [], 4, prompt=400) == pytest.approx(0.1 + 4.0)


def test_a_newcomer_waits_for_the_place_that_its_turn_comes_to() -> None:
    pace = seen()
    running = [Running(said, 10, 0) for said in (2, 9, 5)]
    assert pace.place_s(running, 0, places=4) == 0.0
    assert [pace.place_s(running, ahead, places=3) for ahead in range(3)] == pytest.approx([0.1, 0.5, 0.8])
    assert pace.place_s(running, 4, places=3) == pytest.approx(0.5 + 0.8)


def test_answers_are_expected_to_end_where_those_that_came_as_far_did() -> None:
    pace = seen()
    for said in (10, 10, 10, 10, 100):
        pace.ended(said, 100)
    assert pace.left_s(Running(4, 100, 0)) == pytest.approx(0.6)
    assert pace.left_s(Running(50, 100, 0)) == pytest.approx(5.0)
    assert pace.left_s(Running(4, 100, 40)) == pytest.approx(0.6 + 0.4)


def test_one_answer_that_waited_for_a_base_to_be_loaded_does_not_count() -> None:
    pace = seen()
    pace.read(60.0, 40, 40)
    assert pace.own_s() == pytest.approx(0.5)
