"""Baselines: what could have been done without training. A report that hides them flatters.

A baseline module offers `class Params` and `predict(params, task) -> Baseline`. It must learn and choose
on the training and validation rows only; the test rows are for its final answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from luthier.rows import Chat, Message


def _silent(done: int, total: int) -> None:
    del done, total


@dataclass(frozen=True)
class Task:
    """What a baseline may use.

    answer: the untouched base model's greedy answers to prompts, read as labels (None: unreadable).
    labels: the closed set of answers; empty when answers are free text.
    """

    train: Sequence[Chat]
    validation: Sequence[Chat]
    test: Sequence[Chat]
    labels: tuple[str, ...]
    seed: int
    answer: Callable[[Sequence[Sequence[Message]]], list[str | None]]
    tell: Callable[[int, int], None] = _silent


@dataclass(frozen=True)
class Baseline:
    """Answers to the test rows in order, one honest sentence on how they came to be, and what was chosen."""

    said: list[str | None]
    note: str
    chosen: dict[str, Any] = field(default_factory=dict)
