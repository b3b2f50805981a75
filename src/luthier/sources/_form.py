"""How a record becomes a row: its own `messages`, or value maps and `{column}` replaced once, literally.

Source: the recipe's `chat` and `values`; which kind of row is asked for is the objective's to say. A prompt
keeps the record's other fields, for the grader. Replacement is a single pass over the form, so braces inside
a record's text come out as they are and can never name another column. `{{` and `}}` stand for braces.
This module does not know files, splits or tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from luthier.errors import DataError
from luthier.plugins import unknown
from luthier.rows import Row, chat, pair, prompt

_PLACE = re.compile(r"\{\{|\}\}|\{([^{}\n]*)\}")
_BRACES = {"{{": "{", "}}": "}"}


@dataclass(frozen=True)
class Form:
    """Texts of the turns, and for some columns the value to use for each value in the file."""

    user: str
    assistant: str
    system: str | None
    values: Mapping[str, Mapping[str, str]]
    rejected: str | None = None


def read(record: Mapping[str, Any], form: Form | None, where: str, kind: str = "Chat") -> Row:
    """The record as a row of that kind: through `form`, or from its own `messages` when there is none."""
    if kind == "Prompt":
        return _prompt(record, form, where)
    if kind == "Pair":
        return _pair(record, form, where)
    if form is not None and form.rejected is not None:
        raise DataError("`chat.rejected` is for pairs, and this objective reads conversations", where=where)
    if form is None:
        if "messages" not in record:
            raise DataError(
                f"the record has no `messages` (it has: {_named(record)})",
                where=where,
                hint="say how columns become turns: chat: {user: '{column}', assistant: '{column}'}",
            )
        return chat(record["messages"], where, record.get("tools"))
    columns = _mapped(record, form.values, where)
    turns = [("user", form.user), ("assistant", form.assistant)]
    if form.system is not None:
        turns.insert(0, ("system", form.system))
    return chat([{"role": role, "content": _filled(text, columns, where)} for role, text in turns], where)


def _pair(record: Mapping[str, Any], form: Form | None, where: str) -> Row:
    """A preference: through the form, as OpenAI writes it, or as lists of messages."""
    if form is None:
        if "preferred_output" in record:
            asked = record.get("input")
            if not isinstance(asked, Mapping):
                raise DataError("`input` must be an object with `messages`", where=where)
            sides = record["preferred_output"], record.get("non_preferred_output")
            return pair(asked.get("messages"), *sides, where, asked.get("tools"))
        if missing := [name for name in ("prompt", "chosen", "rejected") if name not in record]:
            raise DataError(
                f"no preference: the record has no `{missing[0]}` (it has: {_named(record)})",
                where=where,
                hint="a pair is {input, preferred_output, non_preferred_output}, or {prompt, chosen, "
                "rejected} as messages; of plain columns: chat: {user: …, assistant: …, rejected: …}",
            )
        return pair(record["prompt"], record["chosen"], record["rejected"], where, record.get("tools"))
    if form.rejected is None:
        raise DataError(
            "this objective reads pairs, and `chat` does not say what was rejected",
            where=where,
            hint="chat: {user: '{prompt}', assistant: '{chosen}', rejected: '{rejected}'}",
        )
    columns = _mapped(record, form.values, where)
    asked = [("user", form.user)] if form.system is None else [("system", form.system), ("user", form.user)]
    prompted, chosen, rejected = (
        [{"role": role, "content": _filled(text, columns, where)} for role, text in turns]
        for turns in (asked, [("assistant", form.assistant)], [("assistant", form.rejected)])
    )
    return pair(prompted, chosen, rejected, where)


def _prompt(record: Mapping[str, Any], form: Form | None, where: str) -> Row:
    """The question, and every other field as the grader's; the form's columns are fields too."""
    if form is None:
        if "messages" not in record:
            raise DataError(f"the record has no `messages` (it has: {_named(record)})", where=where)
        item = {name: value for name, value in record.items() if name != "messages"}
        return prompt(record["messages"], item, where)
    columns = _mapped(record, form.values, where)
    turns = [("user", form.user)] if form.system is None else [("system", form.system), ("user", form.user)]
    said = [{"role": role, "content": _filled(text, columns, where)} for role, text in turns]
    return prompt(said, columns, where)


def _mapped(record: Mapping[str, Any], values: Mapping[str, Mapping[str, str]], where: str) -> dict[str, Any]:
    columns = dict(record)
    for column, known in values.items():
        if column not in columns:
            raise DataError(f"`values`: {unknown('column', column, record)}", where=where)
        found = _text(columns[column], column, where)
        if found not in known:
            raise DataError(
                f"column {column!r} holds {found!r}, which `values` does not map",
                where=where,
                hint=f"mapped values: {', '.join(map(repr, known))}",
            )
        columns[column] = known[found]
    return columns


def _filled(text: str, columns: Mapping[str, Any], where: str) -> str:
    def value(match: re.Match[str]) -> str:
        if match[0] in _BRACES:
            return _BRACES[match[0]]
        if match[1] not in columns:
            raise DataError(
                f"`chat`: {unknown('column', match[1], columns)}",
                where=where,
                hint="write {{ and }} for plain braces",
            )
        return _text(columns[match[1]], match[1], where)

    return _PLACE.sub(value, text)


def _text(value: Any, column: str, where: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    raise DataError(
        f"column {column!r} holds {'nothing' if value is None else type(value).__name__}, not text",
        where=where,
    )


def _named(names: Iterable[str]) -> str:
    return ", ".join(map(str, names)) or "no columns"
