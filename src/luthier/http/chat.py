"""The chat format: what a request may say, and the shapes of its answers, whole or in a stream.

Source: https://platform.openai.com/docs/api-reference/chat. Fields we do not know are ignored; fields we
know and cannot honour are refused with their name, for silence would be a wrong answer. `temperature`
defaults to 0 (greedy) here, not to OpenAI's 1: a guard should say the same thing twice.

It does not know sockets, releases in memory or tokens.
"""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from luthier.errors import DataError
from luthier.http.problems import RequestError
from luthier.rows import Message, Role, conversation
from luthier.serving.service import Options

# What we cannot do, and the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
}
StopText = Annotated[str, Field(min_length=1, max_length=256)]


class Given(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="allow", allow_inf_nan=False)


class TextPart(Given):
    type: Literal["text"]
    text: str


class Turn(Given):
    role: str
    content: str | list[TextPart]


class StreamOptions(Given):
    include_usage: bool | None = Field(default=None, description="a last chunk tells the token counts")


class ChatRequest(Given):
    """Ask a release to go on with a conversation. Greedy (temperature 0) unless a temperature is given."""

    model: str = Field(min_length=1, max_length=256, description="NAME, NAME@ALIAS or NAME@DIGEST")
    messages: list[Turn] = Field(min_length=1, description="system (optional), then user, assistant in turn")
    max_tokens: int | None = Field(default=None, ge=1, description="default 256, at most the context")
    max_completion_tokens: int | None = Field(default=None, ge=1, description="the newer name of max_tokens")
    temperature: float | None = Field(default=None, ge=0, le=2, description="default 0: greedy, repeatable")
    top_p: float | None = Field(default=None, ge=0, le=1, description="default 1")
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63, description="makes sampling repeatable")
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that was understood."""

    model: str
    messages: tuple[Message, ...]
    options: Options
    stream: bool
    include_usage: bool


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int

    def as_dict(self) -> dict[str, int]:
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }


def parse(data: bytes) -> Asked:
    """Understand a body or raise `RequestError` naming the field."""
    try:
        given = ChatRequest.model_validate_json(data)
    except ValidationError as error:
        raise _invalid(error) from None
    except RecursionError:
        raise RequestError("the JSON is nested too deeply") from None
    for name, harmless in UNSUPPORTED.items():
        value = (given.model_extra or {}).get(name)
        if value is not None and value not in harmless:
            raise RequestError(f"`{name}` is not supported here", param=name, code="unsupported_parameter")
    stops = (given.stop,) if isinstance(given.stop, str) else tuple(given.stop or ())
    options = Options(
        max_tokens=given.max_completion_tokens or given.max_tokens,
        temperature=given.temperature or 0.0,
        top_p=1.0 if given.top_p is None else given.top_p,
        seed=given.seed,
        stops=stops,
    )
    usage = bool(given.stream_options and given.stream_options.include_usage)
    return Asked(given.model, _messages(given.messages), options, bool(given.stream), usage)


def _messages(turns: list[Turn]) -> tuple[Message, ...]:
    rows = [{"role": turn.role, "content": _text(turn.content)} for turn in turns]
    try:
        messages = conversation(rows, "messages")
    except DataError as error:
        place = (error.where or "").removeprefix("messages").removeprefix(", ")
        raise RequestError(
            f"{place}: {error.what}" if place else error.what, param="messages", hint=error.hint
        ) from None
    if messages[-1].role is not Role.USER:
        raise RequestError("the last message must be the user's", param="messages")
    return messages


def _text(content: str | list[TextPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _invalid(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(step) for step in first["loc"][:3])
    return RequestError(
        f"{place}: {first['msg']}" if place else first["msg"], param=place.split(".")[0] or None
    )


@dataclass(frozen=True, slots=True)
class Shape:
    """What all parts of one answer have in common."""

    model: str
    release: str
    include_usage: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, reason: str, usage: Usage) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
        return self._head("chat.completion") | {"choices": [choice], "usage": usage.as_dict()}

    def chunk(self, delta: dict[str, str], reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        body = self._head("chat.completion.chunk") | {"choices": [choice]}
        return event(body | {"usage": None} if self.include_usage else body)

    def counts(self, usage: Usage) -> bytes:
        return event(self._head("chat.completion.chunk") | {"choices": [], "usage": usage.as_dict()})

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"luthier-{self.release[:12]}",
        }


def event(body: dict[str, Any]) -> bytes:
    """One server-sent event (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8") + b"\n\n"


DONE = b"data: [DONE]\n\n"
