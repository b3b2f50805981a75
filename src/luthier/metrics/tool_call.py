"""Tool call: 1 if an answer calls the right functions with the right arguments, else 0.

Source: OpenAI's `tool_calls` and `tools` (https://platform.openai.com/docs/guides/function-calling) as fields
of the row; how an answer spells a call stands in `tool_calls`, what is wrong with one in `_calls`. A call of
the right function with other arguments may be worth something (`partial`), one that was not offered never.
This is luthier's own kind of grader: OpenAI has none of this name. It does not run a function.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from luthier import plugins, tool_calls
from luthier.errors import GraderError
from luthier.metrics import Ask, _calls, _paths
from luthier.metrics._template import Template

VERSION = 1


class Params(plugins.Params):
    label: str = ""
    input: Template = "{{ sample.output_text }}"
    calls: Template = Field(default="{{ item.tool_calls }}", description="the right ones; [] is none")
    tools: Template = Field(default="{{ item.tools }}", description="the functions there are")
    partial: float = Field(default=0.0, ge=0, le=1, description="for the right function, wrongly called")


class NoCalls(GraderError):
    """The row's field does not hold calls or tools."""

    flag = "invalid_variable_error"


def templates(params: Params) -> tuple[str, ...]:
    return params.input, params.calls, params.tools


def score(answer: str, item: Mapping[str, Any], params: Params, ask: Ask) -> float:
    del ask
    said = tool_calls.called(_paths.fill(params.input, answer, item))
    wanted = [_call(one) for one in _listed(_paths.fill(params.calls, answer, item), "calls")]
    offered = {_name(one) for one in _listed(_paths.fill(params.tools, answer, item), "tools")}
    found = _calls.verdict(said, wanted, offered)
    return {_calls.Verdict.RIGHT: 1.0, _calls.Verdict.WRONG_ARGUMENTS: params.partial}.get(found, 0.0)


def _listed(text: str, what: str) -> list[Any]:
    try:
        held = json.loads(text)
    except (ValueError, RecursionError):
        held = None
    if not isinstance(held, list):
        raise NoCalls(f"`{what}` is no list", hint='write [{"function": {"name": …, "arguments": …}}]')
    return held


def _call(held: Any) -> _calls.Said:
    """One of OpenAI's calls, or its inside; arguments as an object or as its text."""
    inside = held.get("function", held) if isinstance(held, Mapping) else {}
    arguments = inside.get("arguments", {}) if isinstance(inside, Mapping) else None
    if isinstance(arguments, str):
        arguments = tool_calls.arguments(arguments)
    if not isinstance(arguments, Mapping):
        raise NoCalls("the arguments of a call are an object, or its text")
    return _name(held), arguments


def _name(held: Any) -> str:
    inside = held.get("function", held) if isinstance(held, Mapping) else None
    name = inside.get("name") if isinstance(inside, Mapping) else None
    if not isinstance(name, str):
        raise NoCalls("a function without a name")
    return name
