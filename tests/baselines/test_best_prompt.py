from __future__ import annotations

from collections.abc import Sequence

from luthier.baselines import Task
from luthier.baselines.best_prompt import Params, predict
from luthier.rows import Chat, Message, Role, chat

Asked = list[tuple[Message, ...]]


def rows(split: str, count: int) -> list[Chat]:
    return [
        chat(
            [
                {"role": "system", "content": "own"},
                {"role": "user", "content": f"{split} {n} {'bad' if n % 2 else 'good'}"},
                {"role": "assistant", "content": "no" if n % 2 else "yes"},
            ],
            f"{split}:{n}",
        )
        for n in range(count)
    ]


def task(good_prompt: str, asked: Asked, *, shots_help: bool = False, test: int = 10) -> Task:
    """A base model that is right only under one system prompt (or only after worked examples)."""

    def answer(prompts: Sequence[Sequence[Message]]) -> list[str | None]:
        asked.extend(tuple(prompt) for prompt in prompts)
        said: list[str | None] = []
        for prompt in prompts:
            ready = len(prompt) > 2 if shots_help else prompt[0].content == good_prompt
            said.append(("no" if "bad" in prompt[-1].content else "yes") if ready else None)
        return said

    return Task(rows("train", 30), rows("validation", 40), rows("test", test), ("yes", "no"), 7, answer)


def test_the_prompt_that_is_best_on_validation_rows_answers_the_test_rows() -> None:
    asked: Asked = []
    found = predict(
        Params(prompts=("poor", "rich", "other"), shots=0, validation_rows=20), task("rich", asked)
    )
    assert found.said == ["no" if n % 2 else "yes" for n in range(10)]
    assert "'rich'" in found.note and "4 prompts" in found.note and "100.0%" in found.note
    best = found.chosen["candidates"][found.chosen["best"]]
    assert (best["prompt"], best["shots"], best["accuracy"]) == ("rich", 0, 1.0)
    assert len(asked) == 4 * 20 + 10


def test_the_test_rows_are_seen_only_after_the_choice() -> None:
    asked: Asked = []
    predict(Params(prompts=("a", "b"), shots=2), task("a", asked))
    heard = [prompt[-1].content.split()[0] for prompt in asked]
    assert heard == ["validation"] * (len(asked) - 10) + ["test"] * 10


def test_worked_examples_are_tried_too_and_come_from_training_rows_alone() -> None:
    asked: Asked = []
    found = predict(Params(shots=4, validation_rows=10), task("", asked, shots_help=True))
    assert found.chosen["candidates"][found.chosen["best"]]["shots"] == 4
    final = asked[-1]
    assert [message.role for message in final[1:]] == [Role.USER, Role.ASSISTANT] * 4 + [Role.USER]
    assert all(message.content.startswith("train ") for message in final[1:-1:2])
    assert {message.content for message in final[2::2]} == {"yes", "no"}


def test_equal_candidates_give_the_first_and_the_same_seed_the_same_choice() -> None:
    params = Params(prompts=("x", "y"), shots=2, validation_rows=8)
    one, two = (predict(params, task("nobody", [])) for _ in range(2))
    assert one == two
    assert one.chosen["best"] == 0


def test_a_candidate_is_versioned_by_its_content() -> None:
    def versions(prompt: str) -> list[str]:
        found = predict(Params(prompts=(prompt,), shots=2, validation_rows=4), task("x", []))
        return [candidate["version"] for candidate in found.chosen["candidates"]]

    assert len(set(versions("x"))) == 4
    assert versions("x") == versions("x")
    assert versions("x")[:2] == versions("z")[:2] and versions("x")[2:] != versions("z")[2:]
