"""Row types: what one example is. A `Chat` is a conversation whose last word is the assistant's.

Source: the `messages` form of chat fine-tuning files (system?, then user and assistant in turn).
This module does not know tokens, templates, files or tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from luthier.errors import DataError


class Role(StrEnum):
    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation to learn from or to be examined on.

    `id` is the content's own name (first 16 hex of SHA-256 over the messages), so equal rows have equal
    ids wherever they came from; `where` is the place it was read, as `file:line`.
    """

    messages: tuple[Message, ...]
    where: str
    id: str

    @property
    def prompt(self) -> tuple[Message, ...]:
        """Everything before the answer that is learnt or examined."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        return self.messages[-1].content

    def as_record(self) -> dict[str, object]:
        return {"id": self.id, "where": self.where, "messages": dicts(self.messages)}


def dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Messages in the form that chat templates and HTTP clients speak."""
    return [{"role": message.role.value, "content": message.content} for message in messages]


def chat(messages: object, where: str) -> Chat:
    """Read a row of messages; raise `DataError` naming `where` if the turns are not a conversation."""
    turns = conversation(messages, where)
    if turns[-1].role is not Role.ASSISTANT:
        raise DataError(
            f"the last turn is {turns[-1].role.value!r}; a training row must end with the assistant's answer",
            where=where,
            hint="add the assistant's reply as the last message",
        )
    text = json.dumps(dicts(turns), ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return Chat(turns, where, hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16])


def conversation(messages: object, where: str) -> tuple[Message, ...]:
    """Validate turns: an optional system first, then user and assistant in turn, none of them empty."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise DataError("`messages` must be a non-empty list", where=where)
    turns = tuple(_message(message, f"{where}, message {n}") for n, message in enumerate(messages, 1))
    spoken = turns[1:] if turns[0].role is Role.SYSTEM else turns
    if not spoken:
        raise DataError("only a system message; a user turn must follow", where=where)
    for n, turn in enumerate(spoken):
        wanted = Role.ASSISTANT if n % 2 else Role.USER
        if turn.role is not wanted:
            raise DataError(
                f"turn {n + 1} after the system message is {turn.role.value!r}, expected {wanted.value!r}",
                where=where,
                hint="the order is: system (optional, first), then user and assistant in turn",
            )
    return turns


def _message(message: object, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise DataError("a message must be an object with `role` and `content`", where=where)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in set(Role):
        raise DataError(f"unknown role {role!r}", where=where, hint=f"known roles: {', '.join(Role)}")
    if not isinstance(content, str) or not content.strip():
        raise DataError(f"the {role} message is empty or not text", where=where)
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError("the text holds a lone surrogate, which is not valid Unicode", where=where) from None
    return Message(Role(role), content)
