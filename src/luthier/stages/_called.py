"""Evaluation of tool calls: of the rows that offer tools, how base and tuned call them.

What can be wrong with a call stands in `metrics._calls`. Wilson's intervals go with the right ones and with
the functions that do not exist. It does not know arguments that mean the same.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from luthier import statistics, tool_calls
from luthier.metrics._calls import Verdict, verdict
from luthier.rows import Chat


def said(row: Chat, text: str) -> str | None:
    """An answer's calls, spelt as `Chat.answer` spells a row's own; None where it makes none."""
    calls = tool_calls.called(text) if row.tools else []
    return json.dumps([[name, held] for name, held in calls], sort_keys=True) if calls else None


def rates(rows: Sequence[Chat], texts: Mapping[str, Sequence[str]]) -> dict[str, Any] | None:
    """Each system's verdicts counted; None where no row offers a tool."""
    offering = [n for n, row in enumerate(rows) if row.tools]
    if not offering:
        return None
    systems = {}
    for name, answers in texts.items():
        found = Counter(_judged(rows[n], answers[n]) for n in offering)
        counts = {kind.value: found[kind] for kind in Verdict}
        low, high = statistics.wilson(found[Verdict.RIGHT], len(offering))
        made_up = statistics.wilson(found[Verdict.HALLUCINATED], len(offering))
        systems[name] = counts | {"low": low, "high": high, "hallucinated_range": list(made_up)}
    return {"rows": len(offering), "systems": systems}


def _judged(row: Chat, text: str) -> Verdict:
    wanted = [(call.name, tool_calls.arguments(call.arguments)) for call in row.messages[-1].calls]
    names = {str(tool["function"]["name"]) for tool in row.tools}
    return verdict(tool_calls.called(text), wanted, names)
