"""Prompting baseline: the best of a few system prompts on the untouched base model.

Each candidate is tried on a seeded sample of validation rows, with and without worked examples drawn from
the training rows; the best one there answers the test rows. Source: requirement of every tuned result to be
compared with the best prompt. It does not know how answers are generated.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from pydantic import Field

from luthier import artifacts, plugins
from luthier.baselines import Baseline, Task
from luthier.rows import Chat, Message, Role


class Params(plugins.Params):
    prompts: tuple[str, ...] = Field(default=(), description="system prompts to try beside the rows' own")
    shots: int = Field(default=4, ge=0, le=32, description="worked examples to try each prompt with, too")
    validation_rows: int = Field(default=200, ge=1)


def predict(params: Params, task: Task) -> Baseline:
    """Choose on validation rows, answer the test rows with the choice."""
    draw = random.Random(task.seed)
    sample = draw.sample(list(task.validation), min(params.validation_rows, len(task.validation)))
    shots = _shots(task.train, params.shots, draw)
    candidates = [(prompt, count) for prompt in (None, *params.prompts) for count in sorted({0, len(shots)})]
    accuracies = []
    for n, (prompt, count) in enumerate(candidates):
        said = task.answer([_asked(row, prompt, shots[:count]) for row in sample])
        right = sum(answer == row.answer for answer, row in zip(said, sample, strict=True))
        accuracies.append(right / len(sample))
        task.tell(n + 1, len(candidates) + 1)
    best = max(range(len(candidates)), key=lambda n: (accuracies[n], -n))
    prompt, count = candidates[best]
    said = task.answer([_asked(row, prompt, shots[:count]) for row in task.test])
    tried = [
        {
            "prompt": "the rows' own" if prompt is None else prompt,
            "version": artifacts.digest_of({"prompt": prompt, "shots": [row.id for row in shots[:count]]})[
                :12
            ],
            "shots": count,
            "accuracy": round(accuracy, 4),
        }
        for (prompt, count), accuracy in zip(candidates, accuracies, strict=True)
    ]
    note = (
        f"best of {len(candidates)} prompts on {len(sample)} validation rows ({accuracies[best]:.1%} there): "
        f"{'the rows’ own prompt' if prompt is None else repr(prompt)} with {count} worked examples"
    )
    return Baseline(said, note, {"candidates": tried, "best": best})


def _shots(rows: Sequence[Chat], count: int, draw: random.Random) -> tuple[Chat, ...]:
    """Worked examples, as evenly over the answers as they go."""
    by_answer: dict[str, list[Chat]] = {}
    for row in draw.sample(list(rows), len(rows)):
        by_answer.setdefault(row.answer, []).append(row)
    groups = [by_answer[answer] for answer in sorted(by_answer)][: max(count, 1)]
    picked = [group[n] for n in range(count) for group in groups if n < len(group)]
    return tuple(picked[:count])


def _asked(row: Chat, prompt: str | None, shots: Sequence[Chat]) -> list[Message]:
    own = [message for message in row.prompt if message.role is Role.SYSTEM]
    system = own if prompt is None else [Message(Role.SYSTEM, prompt)]
    worked = [message for shot in shots for message in shot.messages if message.role is not Role.SYSTEM]
    return [*system, *worked, *(message for message in row.prompt if message.role is not Role.SYSTEM)]
