"""How a model speaks of tools: what its template makes of them, and what its answer says it wants to call.

Sources: Hermes and Qwen (`<tool_call>{"name", "arguments"}</tool_call>`,
https://github.com/NousResearch/Hermes-Function-Calling), Llama 3 (one JSON object with `name` and
`parameters`) and Mistral (a JSON list behind `[TOOL_CALLS]`), each told by its chat template. A template that
does not know tools gets them described in the system message, in the Hermes form, and the tools' answers as
the user's words in `<tool_response>`; training rows and served prompts are described alike.

Answers come as decoded text, in which special tokens (`[TOOL_CALLS]`, `<|python_tag|>`) are already left out.
It does not know tokens, nor conventions that are not JSON (Qwen-Coder's XML, Mistral's later `[ARGS]`): what
they say stays the answer's text.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Any

from luthier.rows import Call, Message, Role, Tools

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MARKS = re.compile(r"\[TOOL_CALLS\]|<\|python_tag\|>")
TAGGED = re.compile(rf"{OPEN}(.*?)(?:{CLOSE}|$)", re.DOTALL)
LONGEST = 256 * 1024  # characters of one call; longer is the answer's text

DESCRIPTION = """You may call these functions:
<tools>
{tools}
</tools>
To call one, answer with a JSON object within <tool_call></tool_call>:
<tool_call>
{{"name": "the function's name", "arguments": {{"its": "arguments"}}}}
</tool_call>"""


class Convention(StrEnum):
    TAGS = "tags"
    OBJECT = "object"
    LIST = "list"
    DESCRIBED = "described"


def convention(chat_template: object) -> Convention:
    """Which way of calling a chat template teaches."""
    if isinstance(chat_template, Mapping):
        chat_template = chat_template.get("tool_use") or chat_template.get("default")
    text = str(chat_template)
    if "tools" not in text:
        return Convention.DESCRIBED
    if OPEN in text:
        return Convention.TAGS
    return Convention.LIST if "[TOOL_CALLS]" in text else Convention.OBJECT


def turns(messages: Sequence[Message], tools: Tools, how: Convention) -> list[dict[str, Any]]:
    """Messages as a chat template takes them: arguments as objects, a tool's message with its name."""
    if how is Convention.DESCRIBED and (tools or any(m.calls or m.answers for m in messages)):
        messages = described(messages, tools)
    names = {call.id: call.name for message in messages for call in message.calls}
    found = []
    for message in messages:
        turn: dict[str, Any] = {"role": message.role.value, "content": message.content}
        if message.calls:
            turn["tool_calls"] = [
                {"id": call.id, "type": "function",
                 "function": {"name": call.name, "arguments": json.loads(call.arguments)}}
                for call in message.calls
            ]  # fmt: skip
        if message.answers is not None:
            turn |= {"tool_call_id": message.answers, "name": names.get(message.answers, "")}
        found.append(turn)
    return found


def described(messages: Sequence[Message], tools: Tools) -> list[Message]:
    """The same conversation for a template that knows only the system, the user and the assistant."""
    found: list[Message] = []
    for message in messages:
        if message.role is Role.TOOL:
            said = f"<tool_response>\n{message.content}\n</tool_response>"
            if found and found[-1].role is Role.USER:  # two tools' answers are one turn
                found[-1] = replace(found[-1], content=f"{found[-1].content}\n{said}")
            else:
                found.append(Message(Role.USER, said))
        else:
            calls = [f"{OPEN}\n{_json_of(call)}\n{CLOSE}" for call in message.calls]
            content = "\n".join(([message.content] if message.content else []) + calls)
            found.append(replace(message, content=content, calls=()))
    if tools:
        listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        text = DESCRIPTION.format(tools=listed)
        if found and found[0].role is Role.SYSTEM:
            found[0] = replace(found[0], content=f"{found[0].content}\n\n{text}")
        else:
            found.insert(0, Message(Role.SYSTEM, text))
    return found


def forced(tools: Tools, name: str | None = None) -> dict[str, Any]:
    """The JSON schema of one call: of the tool `name`, or of any."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool["function"]["name"]},
                "arguments": tool["function"].get("parameters") or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
        if name is None or tool["function"]["name"] == name
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def called(text: str) -> list[tuple[str, dict[str, Any] | None]]:
    """Every call that a whole answer makes, in any convention and of whatever name; None: no arguments that
    are an object. What stands between tags and cannot be read is a call without a name."""
    tagged = TAGGED.findall(text)
    if tagged:
        return [_said(_json(inside)) or ("", None) for inside in tagged]
    bare = _json(MARKS.sub("", text))
    return [call for one in (bare if isinstance(bare, list) else [bare]) if (call := _said(one))]


def _said(held: object) -> tuple[str, dict[str, Any] | None] | None:
    if not isinstance(held, dict) or not isinstance(held.get("name"), str):
        return None
    given = held.get("arguments", held.get("parameters", {}))
    return held["name"], arguments(given) if isinstance(given, str) else _object(given)


def arguments(text: str) -> dict[str, Any] | None:
    """A call's arguments out of their text, if that is a JSON object."""
    return _object(_json(text))


class Listener:
    """Feed it an answer's text; it gives back words, and calls once they are whole."""

    def __init__(self, how: Convention, names: Collection[str], must: bool = False) -> None:
        """`must`: the answer was constrained to be one call, so all of it is."""
        self._tagged = how in (Convention.TAGS, Convention.DESCRIBED) and not must
        self._names = frozenset(names)
        self._held = ""
        self._called = False

    def hear(self, text: str) -> list[str | Call]:
        self._held += text
        if not self._tagged:
            return self._bare()
        found: list[str | Call] = []
        while True:
            before, opened, rest = self._held.partition(OPEN)
            if not opened:
                return found + self._certain()
            inside, closed, after = rest.partition(CLOSE)
            if not closed:
                if len(rest) > LONGEST:
                    self._tagged, self._names = False, frozenset()
                    return found + self.close()
                return found
            call = self._call(inside)
            if call is None:
                found.append(f"{before}{OPEN}{inside}{CLOSE}")
            else:
                found += [before.rstrip(), call] if before.strip() else [call]
                self._called = True
            self._held = after

    def close(self) -> list[str | Call]:
        """What was held back, now that nothing follows."""
        text, self._held = self._held, ""
        if not self._tagged and (calls := self._calls(text)):
            self._called = True
            return list(calls)
        if self._tagged and OPEN in text:  # a last call whose end was cut, or was a stop token
            before, _, inside = text.partition(OPEN)
            if call := self._call(inside):
                return [before.rstrip(), call] if before.strip() else [call]
        if self._called and not text.strip():
            return []
        return [text] if text else []

    def _certain(self) -> list[str | Call]:
        """Text that can no longer turn out to belong to a call; blanks before a call do not count."""
        keep = next((n for n in range(min(len(self._held), len(OPEN) - 1), 0, -1)
                     if self._held.endswith(OPEN[:n])), 0)  # fmt: skip
        sure = self._held[: len(self._held) - keep]
        said = sure.rstrip()
        if not said:
            return []
        self._held = self._held[len(said) :]
        return [said]

    def _bare(self) -> list[str | Call]:
        """Without tags an answer is a call or is not: its first letter tells."""
        start = self._held.lstrip()
        if not start or (self._names and start[0] in "{[<" and len(start) < LONGEST):
            return []
        text, self._held = self._held, ""
        self._names = frozenset()  # it has begun to speak
        return [text]

    def _calls(self, text: str) -> list[Call]:
        held = _json(MARKS.sub("", text))
        listed = held if isinstance(held, list) else [held]
        found = [_call(one, self._names) for one in listed]
        return [call for call in found if call] if all(found) else []

    def _call(self, text: str) -> Call | None:
        return _call(_json(text), self._names)


def _call(held: object, names: Collection[str]) -> Call | None:
    if not isinstance(held, dict) or held.get("name") not in names:
        return None
    arguments = held.get("arguments", held.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _json(arguments)
    if not isinstance(arguments, dict):
        return None
    return Call(f"call_{uuid.uuid4().hex[:24]}", held["name"], json.dumps(arguments, ensure_ascii=False))


def _object(held: object) -> dict[str, Any] | None:
    return held if isinstance(held, dict) else None


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _json_of(call: Call) -> str:
    return json.dumps({"name": call.name, "arguments": json.loads(call.arguments)}, ensure_ascii=False)
