"""What an answer's calls are worth: right, or in which way they are not.

Source: kinds of error that the Berkeley Function Calling Leaderboard tells apart, too
(https://gorilla.cs.berkeley.edu/leaderboard.html): a function that does not exist, another one than was
meant, arguments that differ, no call where one was needed, a call where none was. Arguments are compared as
JSON values, calls without regard to their order. It does not know which arguments are optional, nor that two
texts may mean the same.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any

Said = tuple[str, Mapping[str, Any] | None]  # a function's name; None: what stood there was no JSON object


class Verdict(StrEnum):
    RIGHT = "right"
    WRONG_ARGUMENTS = "wrong_arguments"
    WRONG_FUNCTION = "wrong_function"
    HALLUCINATED = "hallucinated"
    MISSING = "missing"
    UNASKED = "unasked"


def verdict(said: Sequence[Said], wanted: Sequence[Said], offered: Collection[str]) -> Verdict:
    """The worst that can be said of these calls."""
    if any(name not in offered for name, _ in said):
        return Verdict.HALLUCINATED
    if not wanted:
        return Verdict.UNASKED if said else Verdict.RIGHT
    if not said:
        return Verdict.MISSING
    if _names(said) != _names(wanted):
        return Verdict.WRONG_FUNCTION
    return Verdict.RIGHT if _whole(said) == _whole(wanted) else Verdict.WRONG_ARGUMENTS


def _names(calls: Iterable[Said]) -> list[str]:
    return sorted(name for name, _ in calls)


def _whole(calls: Iterable[Said]) -> list[str]:
    return sorted(json.dumps([name, arguments], sort_keys=True) for name, arguments in calls)
