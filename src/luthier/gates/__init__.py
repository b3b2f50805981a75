"""Gates: may it ship? Each looks at evidence and says yes or no with a reason; missing evidence is a no.

A gate module offers `class Params` and `check(params, evidence) -> Verdict`. It measures nothing that the
evidence already holds, moves no alias and writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Evidence:
    """What is known about the candidate.

    scorecard:  the evaluate stage's, `correct` its rows: {row id: {system: right?}}.
    champion:   the scorecard of the release in production, with its rows, or None when there is none.
    adapter, base: folders as a stranger would load them.
    probes:     prompts as token ids, `stop_ids` what ends an answer, `max_new_tokens` its longest.
    serve:      the engine that will serve: a prompt in, its greedy tokens out.
    rewards:    where a grader judged, its rows instead: {row id: {system: reward}}; the champion's likewise.
    """

    scorecard: Mapping[str, Any]
    correct: Mapping[str, Mapping[str, bool]]
    champion: Mapping[str, Any] | None
    champion_correct: Mapping[str, Mapping[str, bool]]
    efficiency: Mapping[str, Any]
    adapter: Path
    base: Path
    probes: Sequence[Sequence[int]]
    stop_ids: frozenset[int]
    max_new_tokens: int
    serve: Callable[[Sequence[int]], list[int]]
    rewards: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    champion_rewards: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    passed: bool
    reason: str
    evidence: Mapping[str, Any] = field(default_factory=dict)
