"""Row types: what one example is. A `Chat` is a conversation whose last word is the assistant's; a `Pair` is
a prompt with two answers, of which one was preferred; a `Prompt` is a question alone, with what a grader
needs to judge answers to it.

Sources: the `messages` form of chat fine-tuning files (system?, then user and assistant in turn); for pairs
the prompt, chosen and rejected of Rafailov et al. 2023 (arXiv 2305.18290), section 3; for prompts the lines
of OpenAI's reinforcement fine-tuning, whose fields beside `messages` a grader reads as `item`.
This module does not know tokens, templates, files or tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

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
    ids wherever they came from; `where` is the place it was read, as `file:line`. Of the first `given`
    messages nothing is learnt.
    """

    messages: tuple[Message, ...]
    where: str
    id: str
    given: int = 0

    @property
    def prompt(self) -> tuple[Message, ...]:
        """Everything before the answer that is learnt or examined."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        return self.messages[-1].content

    def as_record(self) -> dict[str, object]:
        return {"id": self.id, "where": self.where, "messages": dicts(self.messages)}

    @property
    def documents(self) -> tuple[Chat, ...]:
        """The conversations that a model reads of this row."""
        return (self,)


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt, the answer that was chosen and the one that was rejected; each may be several turns."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    where: str
    id: str

    @property
    def answer(self) -> str:
        """The end of the chosen answer."""
        return self.chosen[-1].content

    def as_record(self) -> dict[str, object]:
        sides = {name: dicts(getattr(self, name)) for name in ("prompt", "chosen", "rejected")}
        return {"id": self.id, "where": self.where, **sides}

    @property
    def documents(self) -> tuple[Chat, ...]:
        """Both conversations, the chosen one first, to be learnt behind the prompt alone."""
        given = len(self.prompt)
        return tuple(
            Chat((*self.prompt, *side), self.where, self.id, given) for side in (self.chosen, self.rejected)
        )


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation whose last word is the user's, and the fields of its row: JSON values by name."""

    prompt: tuple[Message, ...]
    item: Mapping[str, Any]
    where: str
    id: str

    @property
    def answer(self) -> str:
        """There is none: it is for the model to give."""
        return ""

    def as_record(self) -> dict[str, object]:
        return {"id": self.id, "where": self.where, "prompt": dicts(self.prompt), "item": dict(self.item)}

    @property
    def documents(self) -> tuple[Chat, ...]:
        """What is learnt is not in the row."""
        return ()


Row = Chat | Pair | Prompt


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
    return Chat(turns, where, _named(dicts(turns)))


def pair(prompt: object, chosen: object, rejected: object, where: str) -> Pair:
    """Read a preference; both sides must be conversations that end with the assistant, and differ."""
    asked = conversation(prompt, f"{where}, prompt")
    if asked[-1].role is not Role.USER:
        raise DataError(f"the prompt ends with {asked[-1].role.value!r}, expected 'user'", where=where)
    sides = []
    for name, said in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(said, Sequence) or isinstance(said, str | bytes) or not said:
            raise DataError(f"the {name} answer must be a non-empty list of messages", where=where)
        whole = chat([*dicts(asked), *said], f"{where}, {name}").messages
        sides.append(whole[len(asked) :])
    if sides[0] == sides[1]:
        raise DataError("the chosen and the rejected answer are the same", where=where)
    name = _named([dicts(asked), *map(dicts, sides)])
    return Pair(asked, sides[0], sides[1], where, name)


def prompt(messages: object, item: Mapping[str, Any], where: str) -> Prompt:
    """Read a question and its fields; raise `DataError` naming `where` if the last turn is not the user's."""
    turns = conversation(messages, where)
    if turns[-1].role is not Role.USER:
        raise DataError(
            f"the last turn is {turns[-1].role.value!r}; a prompt must end with the user's question",
            where=where,
            hint="leave the assistant's answer out: the model gives its own, and the grader judges it",
        )
    try:
        json.dumps(item, ensure_ascii=False).encode("utf-8")
        name = _named([dicts(turns), item])
    except (TypeError, ValueError) as error:
        raise DataError(f"a field of the row is not a JSON value: {error}", where=where) from error
    return Prompt(turns, item, where, name)


def again(record: Mapping[str, Any]) -> Row:
    """The row that `as_record` made this of."""
    if "item" in record:
        return prompt(record["prompt"], record["item"], record["where"])
    if "chosen" in record:
        return pair(record["prompt"], record["chosen"], record["rejected"], record["where"])
    return chat(record["messages"], record["where"])


def _named(content: object) -> str:
    text = json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


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
