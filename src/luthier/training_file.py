"""Training files as OpenAI's fine-tuning takes them: what each line must be, and every fault by its line.

Source: https://platform.openai.com/docs/guides/supervised-fine-tuning (messages, tools, weight),
…/direct-preference-optimization (input, preferred_output, non_preferred_output) and
…/reinforcement-fine-tuning (messages that end with the user, and reference fields for the grader).
Lines are counted from 1, blank ones too. The work is bounded: a line by `_records`, a look at an upload by
bytes, and the faults told by their number. It does not know jobs, tokenizers or what a base can learn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from luthier.errors import DataError
from luthier.plugins import unknown
from luthier.sources import _records

FAULTS = 10  # the first ones are told; more would only repeat them
EXAMPLES = 1_000_000
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
MESSAGE_KEYS = (
    *("role", "content", "name", "weight", "tool_calls", "tool_call_id", "function_call", "refusal"),
)
CHAT_KEYS = ("messages", "tools", "parallel_tool_calls", "functions", "function_call")
PAIR_KEYS = ("input", "preferred_output", "non_preferred_output")
INPUT_KEYS = ("messages", "tools", "parallel_tool_calls")


class Kind(StrEnum):
    """What a line teaches: an answer, a preference between two, or a task that a grader scores."""

    CHAT = "chat"
    PREFERENCE = "preference"
    REINFORCEMENT = "reinforcement"


@dataclass(frozen=True, slots=True)
class Example:
    """One line that is as it should be. `conversations`: the chat; input and each output; or the task."""

    kind: Kind
    line: int
    conversations: tuple[tuple[Mapping[str, Any], ...], ...]


@dataclass(frozen=True, slots=True)
class Bounds:
    """How far to look, and what an example may weigh: `tokens` counts one, `context` is the most it may."""

    kind: Kind | None = None
    bytes: int | None = None
    tokens: Callable[[Example], int] | None = None
    context: int | None = None


@dataclass
class Findings:
    """What a file holds. `faults` begin with `line N: `; `whole` is false where the look ended early."""

    examples: int = 0
    kinds: set[Kind] = field(default_factory=set)
    tokens: int = 0
    longest: int = 0
    faults: list[str] = field(default_factory=list)
    whole: bool = True

    def error(self, name: str) -> DataError:
        """All faults as one error, its first line the first fault."""
        more = "" if self.whole else "\n(the file was not read to its end)"
        return DataError("\n".join(self.faults) + more, where=name)


def check(path: Path, bounds: Bounds) -> Findings:
    """Read a file and say what is in it and what is wrong with it; never more than the first faults."""
    found = Findings()
    first: Kind | None = bounds.kind
    if bounds.bytes is not None:
        found.whole = path.stat().st_size <= bounds.bytes
    for number, record in _records.scan(path, path.name, bounds.bytes):
        try:
            if isinstance(record, DataError):
                raise record
            example = read(record, number, first)
            first = first or example.kind
            _weigh(example, bounds, found)
        except DataError as error:
            found.faults.append(f"line {number}: {_said(error)}")
        if len(found.faults) >= FAULTS or found.examples >= EXAMPLES:
            found.whole = False
            break
    if not found.examples and not found.faults:
        found.faults.append("line 1: the file holds no example")
    return found


def read(record: Mapping[str, Any], line: int, kind: Kind | None = None) -> Example:
    """One line's object as an example of `kind` (None: of the kind it looks like)."""
    looks = kind or _kind(record)
    if looks is Kind.PREFERENCE:
        return Example(looks, line, _pair(record))
    if "messages" not in record:
        keys = ", ".join(repr(key[:40]) for key in list(record)[:5]) or "none"
        raise DataError(f"`messages` is missing (keys: {keys})")
    messages = _messages(record["messages"], "messages")
    if looks is Kind.CHAT:
        _only(record, CHAT_KEYS, "")
        _tools(record, "")
        if messages[-1]["role"] != "assistant":
            raise DataError(f"the last message is the {messages[-1]['role']}'s; it must be the assistant's")
        if not any(m["role"] == "assistant" and m.get("weight", 1) for m in messages):
            raise DataError("no assistant message has a weight of 1, so nothing is learnt")
    elif messages[-1]["role"] not in ("user", "developer", "tool"):
        raise DataError(f"the last message is the {messages[-1]['role']}'s; it must be the user's")
    return Example(looks, line, (messages,))


def _kind(record: Mapping[str, Any]) -> Kind:
    if any(key in record for key in PAIR_KEYS):
        return Kind.PREFERENCE
    messages = record.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    if isinstance(last, dict) and last.get("role") in ("user", "developer", "tool"):
        return Kind.REINFORCEMENT if set(record) - set(CHAT_KEYS) else Kind.CHAT
    return Kind.CHAT


def _pair(record: Mapping[str, Any]) -> tuple[tuple[Mapping[str, Any], ...], ...]:
    _only(record, PAIR_KEYS, "")
    for key in PAIR_KEYS:
        if key not in record:
            raise DataError(f"`{key}` is missing")
    given = record["input"]
    if not isinstance(given, dict):
        raise DataError("`input` must be an object with `messages`")
    _only(given, INPUT_KEYS, "input.")
    _tools(given, "input.")
    prompt = _messages(given.get("messages"), "input.messages")
    if prompt[-1]["role"] == "assistant":
        raise DataError("the last message of `input.messages` is the assistant's; the outputs answer it")
    outputs = []
    for key in PAIR_KEYS[1:]:
        turns = _messages(record[key], key)
        if len(turns) != 1 or turns[0]["role"] != "assistant":
            raise DataError(f"`{key}` must hold one message of the assistant's")
        outputs.append(prompt + turns)
    if outputs[0][-1] == outputs[1][-1]:
        raise DataError("`preferred_output` and `non_preferred_output` are the same")
    return tuple(outputs)


def _messages(value: object, where: str) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(value, list) or not value:
        raise DataError(f"`{where}` must be a list that is not empty")
    return tuple(_message(item, f"{where}[{n}]") for n, item in enumerate(value))


def _message(message: object, where: str) -> Mapping[str, Any]:
    if not isinstance(message, dict):
        raise DataError(f"`{where}` must be an object with `role` and `content`")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"`{where}.role`: {unknown('role', str(role)[:40], ROLES)}")
    _only(message, MESSAGE_KEYS, f"{where}.")
    weight = message.get("weight", 1)
    if "weight" in message and (role != "assistant" or isinstance(weight, bool) or weight not in (0, 1)):
        raise DataError(f"`{where}.weight` is 0 or 1, and only an assistant message has one")
    calls = message.get("tool_calls")
    if calls is not None:
        _calls(calls, role, f"{where}.tool_calls")
    _content(message, bool(calls) or message.get("function_call") is not None, where)
    if role == "tool" and not isinstance(message.get("tool_call_id"), str):
        raise DataError(f"`{where}.tool_call_id` is missing: it says which call this answers")
    return message


def _content(message: Mapping[str, Any], called: bool, where: str) -> None:
    content = message.get("content")
    if content is None and called and message["role"] == "assistant":
        return
    if isinstance(content, list):
        for n, part in enumerate(content):
            if (
                not isinstance(part, dict)
                or part.get("type") != "text"
                or not isinstance(part.get("text"), str)
            ):
                raise DataError(
                    f"`{where}.content[{n}]` must be {{type: text, text: …}}; only text is learnt"
                )
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise DataError(f"`{where}.content` must be text")
    if not content.strip() and message["role"] != "tool":
        raise DataError(f"`{where}.content` is empty")


def _calls(calls: object, role: str, where: str) -> None:
    if role != "assistant" or not isinstance(calls, list) or not calls:
        raise DataError(f"`{where}` is a list that is not empty, and only an assistant message has one")
    for n, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(call.get("id"), str):
            raise DataError(f"`{where}[{n}]` must be {{id, type: function, function: {{name, arguments}}}}")
        if not isinstance(function.get("name"), str) or not isinstance(function.get("arguments"), str):
            raise DataError(f"`{where}[{n}].function` needs a `name` and `arguments`, both text")


def _tools(record: Mapping[str, Any], where: str) -> None:
    tools = record.get("tools")
    if tools is None:
        return
    if not isinstance(tools, list):
        raise DataError(f"`{where}tools` must be a list")
    for n, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"`{where}tools[{n}]` must be {{type: function, function: {{name, parameters}}}}")


def _only(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in given:
        if key not in known:
            raise DataError(f"`{where}{key[:60]}`: {unknown('key', key[:60], known)}")


def _weigh(example: Example, bounds: Bounds, found: Findings) -> None:
    found.examples += 1
    found.kinds.add(example.kind)
    if bounds.tokens is None:
        return
    tokens = bounds.tokens(example)
    found.tokens += tokens
    found.longest = max(found.longest, tokens)
    if bounds.context is not None and tokens > bounds.context:
        raise DataError(f"the example has {tokens} tokens, and the base reads {bounds.context}")


def _said(error: DataError) -> str:
    return f"{error.what} ({error.hint})" if error.hint else error.what
