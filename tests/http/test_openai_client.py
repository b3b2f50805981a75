"""The official client, unmodified, asks for everything an answer can have."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest

from luthier.serving.limits import Limits
from tests.http.running import threaded
from tests.serving.make_home import PROMPTS, TOKENS, World

HELLO = [{"role": "user", "content": PROMPTS[0]}]
SCHEMA = {
    "type": "object",
    "properties": {
        "label": {"enum": ["safe", "unsafe"]},
        "score": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["label", "score"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "the weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def client(world: World) -> Iterator[Any]:
    with (
        threaded(world.store, world.home, limits=Limits(default_tokens=8, grace_s=1.0)) as found,
        openai.OpenAI(base_url=f"{found.url}/v1", api_key=found.key, max_retries=0) as client,
    ):
        yield client


def ask(client: Any, **more: Any) -> Any:
    return client.chat.completions.create(model="guard", **{"messages": HELLO, "max_tokens": 8} | more)


def test_a_stream_says_what_the_whole_says_and_tells_its_usage(world: World, client: Any) -> None:
    whole = ask(client)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content == world.answers[world.releases[0], PROMPTS[0]].text
    assert chunks[-1].usage == whole.usage and whole.usage.completion_tokens == TOKENS


def test_log_probabilities_name_the_chosen_token_and_the_likeliest(client: Any) -> None:
    whole = ask(client, logprobs=True, top_logprobs=5)
    entries = whole.choices[0].logprobs.content
    assert len(entries) == 8
    for entry in entries:
        assert entry.logprob <= 0 and len(entry.top_logprobs) == 5
        assert entry.top_logprobs[0].token == entry.token  # it was greedy
        assert math.isclose(entry.top_logprobs[0].logprob, entry.logprob, abs_tol=1e-5)
    said = b"".join(bytes(entry.bytes) for entry in entries).decode("utf-8", "replace")
    assert said == whole.choices[0].message.content
    streamed = [
        entry
        for chunk in ask(client, logprobs=True, top_logprobs=5, stream=True)
        for entry in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in entries]


def test_n_answers_differ_and_a_seed_repeats_them_all(client: Any) -> None:
    def texts(**more: Any) -> list[str]:
        found = ask(client, n=3, temperature=1.5, **more)
        assert [choice.index for choice in found.choices] == [0, 1, 2]
        return [choice.message.content for choice in found.choices]

    first = texts(seed=7)
    assert first == texts(seed=7) and len(set(first)) == 3
    assert [ask(client, temperature=1.5, seed=7 + n).choices[0].message.content for n in range(3)] == first


def test_a_stream_of_n_tells_which_answer_each_piece_belongs_to(client: Any) -> None:
    whole = ask(client, n=2, temperature=1.5, seed=3)
    texts = ["", ""]
    for chunk in ask(client, n=2, temperature=1.5, seed=3, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]


def test_a_schema_is_kept_to_whatever_the_weights_say(client: Any) -> None:
    how = {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": SCHEMA}}
    for seed in range(6):
        found = ask(client, response_format=how, temperature=1.5, seed=seed, max_tokens=200).choices[0]
        assert found.finish_reason == "stop"
        jsonschema.validate(json.loads(found.message.content), SCHEMA)


def test_a_required_tool_is_called_with_arguments_that_fit(client: Any) -> None:
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        found = ask(
            client, tools=[TOOL], tool_choice=choice, temperature=1.5, seed=1, max_tokens=200
        ).choices[0]
        (call,) = found.message.tool_calls
        assert found.message.content is None and call.function.name == "weather"
        jsonschema.validate(json.loads(call.function.arguments), TOOL["function"]["parameters"])
        assert found.finish_reason == ("tool_calls" if choice == "required" else "stop")


def test_a_call_is_streamed_in_openais_deltas_and_its_result_can_follow(client: Any) -> None:
    chunks = list(ask(client, tools=[TOOL], tool_choice="required", stream=True, max_tokens=200))
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert deltas[0].id and deltas[0].function.name == "weather"
    arguments = "".join(delta.function.arguments or "" for delta in deltas)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    call = {
        "id": deltas[0].id, "type": "function",
        "function": {"name": "weather", "arguments": arguments},
    }  # fmt: skip
    talk = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": "rain <|im_end|>"},
    ]
    assert ask(client, messages=talk, tools=[TOOL]).choices[0].finish_reason in ("stop", "length")


def test_a_bias_and_penalties_shape_the_answer(client: Any) -> None:
    assert (
        ask(client, logit_bias={"40": 100}).choices[0].message.content
        == 8 * ask(client, logit_bias={"40": 100}, max_tokens=1).choices[0].message.content
    )
    fined = ask(client, logit_bias={"40": 5}, frequency_penalty=2, presence_penalty=2, logprobs=True)
    free = ask(client, logit_bias={"40": 5}, logprobs=True)
    kinds = [len({entry.token for entry in one.choices[0].logprobs.content}) for one in (fined, free)]
    assert kinds[0] > kinds[1]


def test_errors_are_the_clients_own_classes(client: Any) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nobody", messages=HELLO)
    assert missing.value.code == "model_not_found" and missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as wrong:
        ask(client, temperature=9)
    assert wrong.value.param == "temperature" and wrong.value.type == "invalid_request_error"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=str(client.base_url), api_key="wrong").models.list()
    with pytest.raises(openai.BadRequestError) as long:
        ask(client, messages=[{"role": "user", "content": "a " * 2000}])
    assert long.value.code == "context_length_exceeded"


def test_token_ids_come_back_where_asked(world: World, client: Any) -> None:
    found = ask(client, extra_body={"return_token_ids": True}).model_dump()
    assert tuple(found["choices"][0]["token_ids"]) == world.answers[world.releases[0], PROMPTS[0]].tokens
    assert len(found["prompt_token_ids"]) == found["usage"]["prompt_tokens"]
