"""The chat format: what a request may say.

Source: https://platform.openai.com/docs/api-reference/chat. Fields we do not know are ignored (so none of
them reaches a chat template: CVE-2025-62426); fields we know and cannot honour are refused with their name,
for silence would be a wrong answer. `temperature` defaults to 0 (greedy) here, not to OpenAI's 1: a guard
should say the same thing twice. `top_k`, `ignore_eos` and `return_token_ids` are vLLM's.

It does not know sockets, releases in memory or tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from luthier.errors import DataError
from luthier.http.problems import RequestError
from luthier.inference.grammar import Grammar, Kind
from luthier.rows import Message, Tools, conversation, offers
from luthier.serving import limits
from luthier.serving.service import Options
from luthier.tool_calls import forced

# What we cannot do, and the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "service_tier": ("auto", "default"),
}
NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
StopText = Annotated[str, Field(min_length=1, max_length=limits.STOP_CHARACTERS)]
Stop = StopText | Annotated[list[StopText], Field(max_length=limits.STOPS)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Biases = Annotated[dict[str, Bias], Field(max_length=limits.BIASES)]


class Given(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="allow", allow_inf_nan=False)


class Part(Given):
    type: Literal["text", "refusal"]
    text: str = ""
    refusal: str = ""


class Turn(Given):
    role: str
    content: str | Annotated[list[Part], Field(max_length=limits.PARTS)] | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class StreamOptions(Given):
    include_usage: bool | None = Field(default=None, description="a last chunk tells the token counts")


class NamedFunction(Given):
    name: str


class NamedTool(Given):
    type: Literal["function"]
    function: NamedFunction


class Schema(Given):
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    schema_: dict[str, Any] = Field(default={}, alias="schema")
    strict: bool | None = None


class Format(Given):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None


class Spoken(Given):
    """What chat and completions have in common."""

    model: str = Field(min_length=1, max_length=256, description="NAME, NAME@ALIAS or NAME@DIGEST")
    temperature: float | None = Field(default=None, ge=0, le=2, description="default 0: greedy, repeatable")
    top_p: float | None = Field(default=None, ge=0, le=1, description="default 1")
    top_k: int | None = Field(default=None, ge=-1, le=1_000_000, description="0 or -1: no bound")
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63, description="makes sampling repeatable")
    n: int | None = Field(default=None, ge=1, le=limits.CHOICES)
    stop: Stop | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Biases | None = Field(default=None, description="token id to what its logit gains")
    user: str | None = Field(default=None, max_length=256, description="stays on one side of a canary")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = Field(default=None, description="tell the tokens' ids too")
    ignore_eos: bool | None = Field(default=None, description="go on past the end of the answer")

    @property
    def usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def options(self, max_tokens: int | None) -> Options:
        """How to answer, as the service takes it."""
        stop = self.stop
        try:
            bias = tuple((int(token), more) for token, more in (self.logit_bias or {}).items())
        except ValueError:
            raise RequestError("the keys of `logit_bias` are token ids", param="logit_bias") from None
        return Options(
            max_tokens=max_tokens,
            temperature=self.temperature or 0.0,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stops=(stop,) if isinstance(stop, str) else tuple(stop or ()),
            top_k=max(0, self.top_k or 0),
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=bias,
            ignore_eos=bool(self.ignore_eos),
        )


class ChatRequest(Spoken):
    """Ask a release to go on with a conversation. Greedy (temperature 0) unless a temperature is given."""

    messages: Annotated[list[Turn], Field(min_length=1, max_length=limits.MESSAGES)] = Field(
        description="in any order that the model's chat template takes; after calls the tools' answers"
    )
    max_tokens: int | None = Field(default=None, ge=1, description="default 256, at most the context")
    max_completion_tokens: int | None = Field(default=None, ge=1, description="the newer name of max_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=limits.TOP_LOGPROBS)
    response_format: Format | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=limits.TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that was understood. `must`: the answer is one call; `one`: it is at most one."""

    model: str
    messages: tuple[Message, ...]
    options: Options
    stream: bool
    include_usage: bool
    n: int = 1
    must: bool = False
    named: bool = False
    one: bool = False
    token_ids: bool = False
    user: str | None = None


Request = TypeVar("Request", bound=Given)


def read(kind: type[Request], data: bytes, unsupported: Mapping[str, tuple[object, ...]]) -> Request:
    """Understand a body or raise `RequestError` naming the field. It is understood at one go while all
    others wait, so what makes that long is bounded: containers cost a microsecond each, however small."""
    if data.count(b"[") + data.count(b"{") > limits.NESTS:
        raise RequestError(
            f"the body holds more than {limits.NESTS} lists and objects", code="body_too_large"
        )
    try:
        given = kind.model_validate_json(data)
    except ValidationError as error:
        raise _invalid(error) from None
    except RecursionError:
        raise RequestError("the JSON is nested too deeply") from None
    for name, harmless in unsupported.items():
        value = (given.model_extra or {}).get(name)
        if value is not None and value not in harmless:
            raise RequestError(f"`{name}` is not supported here", param=name, code="unsupported_parameter")
    return given


def parse(data: bytes) -> Asked:
    """A chat request, understood."""
    given = read(ChatRequest, data, UNSUPPORTED)
    if given.top_logprobs and not given.logprobs:
        raise RequestError("`top_logprobs` needs `logprobs` to be true", param="top_logprobs")
    tools, grammar = _tools(given), _format(given.response_format)
    choice = given.tool_choice
    must = choice == "required" or isinstance(choice, NamedTool)
    if must:
        name = choice.function.name if isinstance(choice, NamedTool) else None
        if not any(name in (None, tool["function"]["name"]) for tool in tools):
            raise RequestError("`tool_choice` asks for a tool that is not in `tools`", param="tool_choice")
        grammar = Grammar(Kind.JSON_SCHEMA, json.dumps(forced(tools, name)))
    options = given.options(given.max_completion_tokens or given.max_tokens)
    options = _with(
        options,
        logprobs=(given.top_logprobs or 0) if given.logprobs else None,
        grammar=grammar,
        tools=() if choice == "none" else tools,
    )
    return Asked(
        model=given.model,
        messages=_messages(given.messages),
        options=options,
        stream=bool(given.stream),
        include_usage=given.usage,
        n=given.n or 1,
        must=must,
        named=isinstance(choice, NamedTool),
        one=given.parallel_tool_calls is False,
        token_ids=bool(given.return_token_ids),
        user=given.user,
    )


def _with(options: Options, **changes: Any) -> Options:
    from dataclasses import replace

    return replace(options, **changes)


def _tools(given: ChatRequest) -> Tools:
    if not given.tools:
        return ()
    if len(json.dumps(given.tools)) > limits.TOOLS_BYTES:
        raise RequestError(f"the tools are larger than {limits.TOOLS_BYTES} bytes", param="tools")
    try:
        tools = offers(given.tools, "tools")
    except DataError as error:
        raise RequestError(error.what, param="tools", hint=error.hint) from None
    for tool in tools:
        if not NAME.fullmatch(tool["function"]["name"]):
            raise RequestError("a tool's name is letters, digits, _ and -, at most 64", param="tools")
    return tools


def _format(given: Format | None) -> Grammar | None:
    if given is None or given.type == "text":
        return None
    if given.type == "json_object":
        return Grammar(Kind.JSON_OBJECT)
    if given.json_schema is None:
        raise RequestError("`response_format.json_schema` is missing", param="response_format")
    return Grammar(Kind.JSON_SCHEMA, json.dumps(given.json_schema.schema_))


def _messages(turns: list[Turn]) -> tuple[Message, ...]:
    rows = []
    for turn in turns:
        row: dict[str, Any] = {"role": turn.role, "content": _text(turn.content)}
        row |= {"tool_calls": turn.tool_calls} if turn.tool_calls else {}
        row |= {"tool_call_id": turn.tool_call_id} if turn.tool_call_id else {}
        rows.append(row)
    try:
        return conversation(rows, "messages")
    except DataError as error:
        place = (error.where or "").removeprefix("messages").removeprefix(", ")
        raise RequestError(
            f"{place}: {error.what}" if place else error.what, param="messages", hint=error.hint
        ) from None


def _text(content: str | list[Part] | None) -> str | None:
    if isinstance(content, list):
        return "".join(part.text or part.refusal for part in content)
    return content


def _invalid(error: ValidationError) -> RequestError:
    found = error.errors(include_url=False, include_context=False, include_input=False)
    first = _meant(found)
    words = [str(step) for step in first["loc"] if str(step).isdigit() or str(step).isidentifier()]
    place = ".".join(word for word in words[:3] if word not in ("str", "int", "float"))
    said = first["msg"]
    if first["loc"][0:1] == ("messages",) and first["loc"][-1] == "type" and len(first["loc"]) > 3:
        said = "a part of a message is text here: {type: text, text: …}; images, audio and files are not read"
    return RequestError(f"{place}: {said}" if place else said, param=place.split(".")[0] or None)


def _meant(found: list[Any]) -> Any:
    """The first error; of a union's branches, that of the one whose type was given."""
    first = found[0]
    union = first["loc"][:-1]
    if not union or not first["type"].endswith("_type"):
        return first
    near = [one for one in found[1:] if one["loc"][: len(union)] == union]
    return next((one for one in near if not one["type"].endswith("_type")), first)
