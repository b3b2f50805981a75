"""Evidence made by hand for gates that only read figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.gates import Evidence


def evidence(**changes: Any) -> Evidence:
    """A tuned model that is right on 95 of 100 rows, over a base that is right on 50 of them."""
    made: dict[str, Any] = {
        "scorecard": {"systems": {"tuned": {"accuracy": 0.95, "low": 0.888, "high": 0.978, "f1": None}}},
        "correct": answers(base=50, tuned=95),
        "champion": None,
        "champion_correct": {},
        "efficiency": {},
        "adapter": Path("adapter"),
        "base": Path("base"),
        "probes": [],
        "stop_ids": frozenset({2}),
        "max_new_tokens": 4,
        "serve": lambda prompt: [],
    }
    return Evidence(**{**made, **changes})


def answers(rows: int = 100, **right: int) -> Mapping[str, Mapping[str, bool]]:
    """`right` says how many of the first rows each system got right."""
    return {f"row{n}": {name: n < count for name, count in right.items()} for n in range(rows)}
