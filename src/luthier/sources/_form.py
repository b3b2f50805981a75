"""How a flat record becomes a conversation: value maps, then `{column}` replaced once, literally.

Source: the recipe's `chat` and `values`. Replacement is a single pass over the form, so braces inside a
record's text come out as they are and can never name another column. `{{` and `}}` stand for braces.
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
from luthier.rows import Chat, chat

_PLACE = re.compile(r"\{\{|\}\}|\{([^{}\n]*)\}")
_BRACES = {"{{": "{", "}}": "}"}


@dataclass(frozen=True)
class Form:
    """Texts of the turns, and for some columns the value to use for each value in the file."""

    user: str
    assistant: str
    system: str | None
    values: Mapping[str, Mapping[str, str]]


def read(record: Mapping[str, Any], form: Form | None, where: str) -> Chat:
    """The record as a conversation: through `form`, or from its own `messages` when there is none."""
    if form is None:
        if "messages" not in record:
            raise DataError(
                f"the record has no `messages` (it has: {_named(record)})",
                where=where,
                hint="say how columns become turns: chat: {user: '{column}', assistant: '{column}'}",
            )
        return chat(record["messages"], where)
    columns = _mapped(record, form.values, where)
    turns = [("user", form.user), ("assistant", form.assistant)]
    if form.system is not None:
        turns.insert(0, ("system", form.system))
    return chat([{"role": role, "content": _filled(text, columns, where)} for role, text in turns], where)


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
