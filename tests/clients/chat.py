"""LiteLLM and LangChain do the chat part: run by `make test-clients` in an environment of their own.

Reads OPENAI_BASE_URL and OPENAI_API_KEY, as both do; talks to the first base that the server lists.
It needs nothing of luthier.
"""

from __future__ import annotations

import os
from typing import Any

import litellm
import openai
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

SAY = [{"role": "user", "content": "Say hello."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "the weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


class Verdict(BaseModel):
    """Whether a text is safe."""

    safe: bool


@tool
def weather(city: str) -> str:
    """The weather of a city."""
    return f"rain in {city}"


def through_litellm(model: str) -> None:
    how: dict[str, Any] = {
        "model": f"openai/{model}",
        "api_base": os.environ["OPENAI_BASE_URL"],
        "api_key": os.environ["OPENAI_API_KEY"],
        "max_tokens": 24,
    }
    whole = litellm.completion(messages=SAY, **how)
    text = whole.choices[0].message.content
    assert text and whole.usage.completion_tokens > 0
    pieces = litellm.completion(messages=SAY, stream=True, **how)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == text
    called = litellm.completion(
        messages=SAY, tools=[WEATHER], tool_choice="required", **how | {"max_tokens": 64}
    )
    assert called.choices[0].message.tool_calls[0].function.name == "weather"
    try:
        litellm.completion(messages=SAY, **how | {"model": "openai/nobody"})
    except litellm.NotFoundError:
        return
    raise AssertionError("a model that is not there was found")


def through_langchain(model: str) -> None:
    chat = ChatOpenAI(model=model, max_completion_tokens=24, temperature=0)
    text = chat.invoke("Say hello.").content
    assert text
    assert "".join(str(piece.content) for piece in chat.stream("Say hello.")) == text
    verdict = chat.with_structured_output(Verdict).invoke("Is 'hello' a safe text?")
    assert isinstance(verdict, Verdict)
    roomy = ChatOpenAI(model=model, max_completion_tokens=96, temperature=0)
    asked = roomy.bind_tools([weather], tool_choice="weather").invoke("How is the weather in Paris?")
    (call,) = asked.tool_calls
    assert call["name"] == "weather" and isinstance(call["args"]["city"], str)
    result = weather.invoke(call)
    assert roomy.invoke([("user", "How is the weather in Paris?"), asked, result]).content


def main() -> None:
    model = openai.OpenAI().models.list().data[0].id
    through_litellm(model)
    through_langchain(model)
    print(f"litellm and langchain chat with {model}")


if __name__ == "__main__":
    main()
