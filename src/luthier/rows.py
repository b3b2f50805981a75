"""Row types: what one example is. A `Chat` is a conversation whose last word is the assistant's; a `Pair` is
a prompt with two answers, of which one was preferred; a `Prompt` is a question alone, with what a grader
needs to judge answers to it.

Sources: the `messages` form of chat fine-tuning files (system?, then user and assistant in turn, and after
an assistant's `tool_calls` the tools' answers; https://platform.openai.com/docs/guides/function-calling),
with `tools` beside them and a `weight` of 0 on answers that are not to be learnt; for pairs the prompt,
chosen and rejected of Rafailov et al. 2023 (arXiv 2305.18290), section 3; for prompts the lines of OpenAI's
reinforcement fine-tuning, whose fields beside `messages` a grader reads as `item`. Who only asks may speak in
any order that the model's template can write.
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
    TOOL = "tool"


@dataclass(frozen=True, slots=True)
class Call:
    """One use of a tool that the assistant asks for; `arguments` is a JSON object as text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `calls` are an assistant's; `answers` names the call that a tool's message answers."""

    role: Role
    content: str
    calls: tuple[Call, ...] = ()
    answers: str | None = None
    learnt: bool = True


Tools = tuple[Mapping[str, Any], ...]


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
    tools: Tools = ()

    @property
    def prompt(self) -> tuple[Message, ...]:
        """Everything before the answer that is learnt or examined."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        return _answer(self.messages[-1])

    def as_record(self) -> dict[str, object]:
        record = {"id": self.id, "where": self.where, "messages": dicts(self.messages)}
        return record | _offered(self.tools)

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
    tools: Tools = ()

    @property
    def answer(self) -> str:
        """The end of the chosen answer."""
        return _answer(self.chosen[-1])

    def as_record(self) -> dict[str, object]:
        sides = {name: dicts(getattr(self, name)) for name in ("prompt", "chosen", "rejected")}
        return {"id": self.id, "where": self.where, **sides, **_offered(self.tools)}

    @property
    def documents(self) -> tuple[Chat, ...]:
        """Both conversations, the chosen one first, to be learnt behind the prompt alone."""
        given = len(self.prompt)
        return tuple(
            Chat((*self.prompt, *side), self.where, self.id, given, self.tools)
            for side in (self.chosen, self.rejected)
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


def dicts(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as OpenAI writes them: what files hold and what HTTP clients speak."""
    return [_as_dict(message) for message in messages]


def _as_dict(message: Message) -> dict[str, Any]:
    found: dict[str, Any] = {"role": message.role.value, "content": message.content}
    if message.calls:
        found["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.calls
        ]
    if message.answers is not None:
        found["tool_call_id"] = message.answers
    if not message.learnt:
        found["weight"] = 0
    return found


def _answer(message: Message) -> str:
    """What was said, or where nothing was, what was called."""
    if message.content or not message.calls:
        return message.content
    return json.dumps([[call.name, json.loads(call.arguments)] for call in message.calls], sort_keys=True)


def _offered(tools: Tools) -> dict[str, object]:
    return {"tools": list(tools)} if tools else {}


def chat(messages: object, where: str, tools: object = None) -> Chat:
    """Read a row of messages; raise `DataError` naming `where` if the turns are not a conversation."""
    turns = in_turn(messages, where)
    if turns[-1].role is not Role.ASSISTANT:
        raise DataError(
            f"the last turn is {turns[-1].role.value!r}; a training row must end with the assistant's answer",
            where=where,
            hint="add the assistant's reply as the last message",
        )
    if not any(turn.learnt for turn in turns if turn.role is Role.ASSISTANT):
        raise DataError("every answer has a weight of 0, so nothing is learnt", where=where)
    offered = offers(tools, where)
    name = _named([dicts(turns), list(offered)] if offered else dicts(turns))
    return Chat(turns, where, name, 0, offered)


def pair(prompt: object, chosen: object, rejected: object, where: str, tools: object = None) -> Pair:
    """Read a preference; both sides must be conversations that end with the assistant, and differ."""
    asked = in_turn(prompt, f"{where}, prompt")
    if asked[-1].role is Role.ASSISTANT:
        raise DataError("the prompt ends with 'assistant', expected 'user'", where=where)
    sides = []
    for name, said in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(said, Sequence) or isinstance(said, str | bytes) or not said:
            raise DataError(f"the {name} answer must be a non-empty list of messages", where=where)
        whole = chat([*dicts(asked), *said], f"{where}, {name}").messages
        sides.append(whole[len(asked) :])
    if sides[0] == sides[1]:
        raise DataError("the chosen and the rejected answer are the same", where=where)
    offered = offers(tools, where)
    name = _named([dicts(asked), *map(dicts, sides), *([list(offered)] if offered else [])])
    return Pair(asked, sides[0], sides[1], where, name, offered)


def prompt(messages: object, item: Mapping[str, Any], where: str) -> Prompt:
    """Read a question and its fields; raise `DataError` naming `where` if the last turn is not the user's."""
    turns = in_turn(messages, where)
    if turns[-1].role is Role.ASSISTANT:
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
        sides = record["prompt"], record["chosen"], record["rejected"]
        return pair(*sides, record["where"], record.get("tools"))
    return chat(record["messages"], record["where"], record.get("tools"))


def _named(content: object) -> str:
    text = json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def in_turn(messages: object, where: str) -> tuple[Message, ...]:
    """A conversation to learn from: an optional system first, then user and assistant in turn. Rows in
    another order are more often broken than meant, so they are refused and not learnt from."""
    turns = conversation(messages, where)
    first = turns[0].role is Role.SYSTEM
    if len(turns) == first:
        raise DataError("only a system message; a user turn must follow", where=where)
    before = Role.ASSISTANT
    for n, turn in enumerate(turns[first:], first + 1):
        wanted = Role.USER if before is Role.ASSISTANT else Role.ASSISTANT
        if turn.role not in (wanted, Role.TOOL):
            raise DataError(
                f"message {n} is {turn.role.value!r}, expected {wanted.value!r}", where=where,
                hint="the order is: system (optional, first), then user and assistant in turn",
            )  # fmt: skip
        before = turn.role
    return turns


def conversation(messages: object, where: str) -> tuple[Message, ...]:
    """Validate turns: none of them empty, and after an assistant's calls an answer to each of them. Else
    their order is for the model's chat template to take or to refuse."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise DataError("`messages` must be a non-empty list", where=where)
    turns = tuple(_message(message, f"{where}, message {n}") for n, message in enumerate(messages, 1))
    open_calls = set[str]()
    for n, turn in enumerate(turns, 1):
        if open_calls and turn.role is not Role.TOOL:
            raise DataError(
                f"message {n} is {turn.role.value!r}, expected 'tool'",
                where=where,
                hint=f"these calls have no answer yet: {', '.join(sorted(open_calls))}",
            )
        if turn.answers is not None:
            if turn.answers not in open_calls:
                raise DataError(f"message {n} answers a call that nobody made: {turn.answers!r}", where=where)
            open_calls.remove(turn.answers)
        open_calls |= {call.id for call in turn.calls}
    if open_calls and turns[-1].role is not Role.ASSISTANT:
        raise DataError(f"no answer to {', '.join(sorted(open_calls))}", where=where)
    return turns


def _message(message: object, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise DataError("a message must be an object with `role` and `content`", where=where)
    role = message.get("role")
    if role == "developer":  # the newer name of the system
        role = Role.SYSTEM.value
    if not isinstance(role, str) or role not in set(Role):
        raise DataError(f"unknown role {role!r}", where=where, hint=f"known roles: {', '.join(Role)}")
    calls = _calls(message, role, where)
    content = _content(message)
    if calls and content is None:
        content = ""
    if not isinstance(content, str) or not (content.strip() or calls or role == Role.TOOL):
        raise DataError(f"the {role} message is empty or not text", where=where)
    answers = message.get("tool_call_id") if role == Role.TOOL else None
    if role == Role.TOOL and not (isinstance(answers, str) and answers):
        raise DataError("a tool's message names the call it answers in `tool_call_id`", where=where)
    weight = message.get("weight", 1)
    if weight not in (0, 1) or (weight == 0 and role != Role.ASSISTANT):
        raise DataError("`weight` is 0 or 1, on the assistant's messages", where=where)
    found = Message(Role(role), content, calls, answers, bool(weight))
    _sound(_as_dict(found), where)
    return found


def _content(message: Mapping[str, Any]) -> object:
    """The text; of several text parts their sum, of a refusal its words."""
    content = message.get("content")
    if content is None and isinstance(message.get("refusal"), str):
        return message["refusal"]
    if isinstance(content, list) and all(
        isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    ):
        return "".join(part["text"] for part in content)
    return content


def _calls(message: Mapping[str, Any], role: str, where: str) -> tuple[Call, ...]:
    given = message.get("tool_calls")
    if message.get("function_call"):
        raise DataError("`function_call` is the old form", where=where, hint="use `tool_calls`")
    if not given:
        return ()
    if role != Role.ASSISTANT or not isinstance(given, list):
        raise DataError("`tool_calls` is a list, on the assistant's messages", where=where)
    found = tuple(_call(call, f"{where}, call {n}") for n, call in enumerate(given, 1))
    if len({call.id for call in found}) < len(found):
        raise DataError("two calls have the same id", where=where)
    return found


def _call(call: object, where: str) -> Call:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise DataError("a call is {id, type: function, function: {name, arguments}}", where=where)
    name, arguments = function.get("name"), function.get("arguments", "{}")
    if not (isinstance(name, str) and name and isinstance(call.get("id"), str) and call["id"]):
        raise DataError("a call needs an `id` and its function a `name`", where=where)
    if isinstance(arguments, Mapping):
        arguments = json.dumps(arguments, ensure_ascii=False)
    try:
        held = json.loads(arguments) if isinstance(arguments, str) else None
    except (ValueError, RecursionError):
        held = None
    if not isinstance(held, dict):
        raise DataError(f"the arguments of {name[:64]!r} are not a JSON object", where=where)
    return Call(call["id"], name, arguments)


def offers(tools: object, where: str) -> Tools:
    """The tools that a conversation may use: OpenAI's function tools, each by a name of its own."""
    if tools is None:
        return ()
    if not isinstance(tools, Sequence) or isinstance(tools, str | bytes):
        raise DataError("`tools` must be a list", where=where)
    names = set()
    for n, tool in enumerate(tools, 1):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or tool.get("type") != "function":
            raise DataError(f"tool {n} is not {{type: function, function: {{name, …}}}}", where=where)
        name = function.get("name")
        if not isinstance(name, str) or not name or name in names:
            raise DataError(f"tool {n} has no name, or that of another", where=where)
        if not isinstance(function.get("parameters") or {}, Mapping):
            raise DataError(f"the parameters of {name[:64]!r} are not a JSON schema", where=where)
        names.add(name)
        _sound(tool, where)
    return tuple(tools)


def _sound(value: object, where: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise DataError("the text holds a lone surrogate, which is not valid Unicode", where=where) from None
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"this is not a JSON value: {error}", where=where) from None
