"""The chat format over the wire, against one server in a thread."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.serving.limits import Limits
from tests.http.running import Client, body, threaded
from tests.serving.make_home import PROMPTS, TOKENS, World, copy_home, publish_release

HELLO = PROMPTS[0]


@pytest.fixture(scope="module")
def own(world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    return copy_home(world, tmp_path_factory.mktemp("own") / "home")


@pytest.fixture(scope="module")
def client(own: World) -> Iterator[Client]:
    with threaded(
        own.store, own.home, limits=Limits(active=8, waiting=120, default_tokens=4, grace_s=1.0)
    ) as client:
        yield client


def chunks(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line for line in response.text.split("\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def said(parts: list[dict[str, Any]]) -> str:
    return "".join(part["choices"][0]["delta"].get("content", "") for part in parts if part["choices"])


def assert_refused(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    return error


def gauge(client: Client, name: str) -> float:
    with client.open() as http:
        page = http.get("/metrics").text
    found = re.search(rf"^{name} (\S+)$", page, re.M)
    assert found, page
    return float(found[1])


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_answer_has_openais_shape_and_names_its_release(own: World, client: Client) -> None:
    response = client.ask(body(HELLO, max_tokens=TOKENS, user="ignored", store=False))
    assert response.status_code == 200
    assert response.headers["x-luthier-release"] == own.releases[0]
    answer = own.answers[own.releases[0], HELLO]
    whole = response.json()
    assert whole["id"].startswith("chatcmpl-") and whole["object"] == "chat.completion"
    assert abs(whole["created"] - time.time()) < 60 and whole["model"] == "guard"
    assert whole["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": None,
            "finish_reason": answer.reason,
        }
    ]
    usage = whole["usage"]
    assert usage["completion_tokens"] == len(answer.tokens)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_stream_says_what_a_whole_answer_says(own: World, client: Client, prompt: str) -> None:
    whole = client.ask(body(prompt, max_tokens=TOKENS)).json()
    response = client.ask(
        body(prompt, max_tokens=TOKENS, stream=True, stream_options={"include_usage": True})
    )
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-luthier-release"] == own.releases[0]
    parts = chunks(response)
    assert parts[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert said(parts) == whole["choices"][0]["message"]["content"]
    assert [part["choices"][0]["finish_reason"] for part in parts[:-1]] == [None] * (len(parts) - 2) + [
        "length"
    ]
    assert parts[-1]["choices"] == [] and parts[-1]["usage"] == whole["usage"]
    assert len({part["id"] for part in parts}) == 1
    assert {part["object"] for part in parts} == {"chat.completion.chunk"}


def test_without_include_usage_no_chunk_speaks_of_it(client: Client) -> None:
    parts = chunks(client.ask(body(HELLO, stream=True)))
    assert not any("usage" in part for part in parts)
    assert parts[-1]["choices"][0]["finish_reason"] == "length"


def test_a_stop_string_ends_the_answer_before_it(own: World, client: Client) -> None:
    text = own.answers[own.releases[0], HELLO].text
    stop = text[3:5]
    for stream in (False, True):
        response = client.ask(body(HELLO, max_tokens=TOKENS, stop=[stop, "never"], stream=stream))
        found = said(chunks(response)) if stream else response.json()["choices"][0]["message"]["content"]
        assert found == text[: text.index(stop)]


def test_the_other_name_of_max_tokens_the_default_and_text_parts_work(client: Client) -> None:
    assert client.ask(body(HELLO, max_completion_tokens=3)).json()["usage"]["completion_tokens"] == 3
    assert client.ask(body(HELLO)).json()["usage"]["completion_tokens"] == 4
    parts = {
        "role": "user",
        "content": [{"type": "text", "text": "hello "}, {"type": "text", "text": "there"}],
    }
    split = client.ask(body(HELLO) | {"messages": [parts]}).json()
    assert split["choices"] == client.ask(body(HELLO)).json()["choices"]


def test_every_name_of_a_model_is_listed_and_answers(own: World, client: Client) -> None:
    with client.open() as http:
        listed = http.get("/v1/models").json()
    assert listed["object"] == "list"
    ids = {entry["id"]: entry["release"] for entry in listed["data"]}
    assert ids["guard@production"] == own.releases[0]
    for digest in own.releases:
        assert ids[f"guard@{digest}"] == digest
        response = client.ask(body(HELLO, max_tokens=TOKENS) | {"model": f"guard@{digest[:12]}"})
        assert response.headers["x-luthier-release"] == digest
        assert response.json()["choices"][0]["message"]["content"] == own.answers[digest, HELLO].text


def turns(*said: tuple[Any, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in said]}


WRONG: list[dict[str, Any]] = [
    {"messages": []}, {"messages": "hi"}, {"messages": None}, {"messages": [{"role": "user"}]},
    {"model": 3}, {"model": ""}, turns(("user", "  ")), turns((["user"], "x")), turns(("robot", "x")),
    turns((None, "x")), turns(("user", "x"), ("assistant", " ")), turns(("user", "x"), ("tool", "y")),
    turns(("user", [{"type": "image_url", "image_url": {"url": "x"}}])), turns(("user", "a" * 3000)),
    {"max_tokens": 0}, {"max_tokens": "5"}, {"max_tokens": 1.5}, {"temperature": -1}, {"temperature": 3},
    {"temperature": True}, {"top_p": 2}, {"seed": 2**70}, {"stop": [""]}, {"stop": ["a"] * 5},
    {"stream": "yes"}, {"n": 0}, {"n": 9}, {"top_logprobs": 3}, {"tools": [{"type": "function"}]},
    {"response_format": {"type": "xml"}}, {"presence_penalty": 2.5}, {"logit_bias": {"x": 1}},
    {"logit_bias": {"5": 101}}, {"logit_bias": {str(n): 1 for n in range(2000)}}, {"tool_choice": "required"},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "odd"}}}},
    {"response_format": {"type": "json_schema"}}, {"audio": {"voice": "x"}}, {"reasoning_effort": "high"},
    {"messages": [{"role": "user", "content": "x"}] * 3000}, {"stop": ["a" * 300]}, {"top_k": -2},
    {"tools": [{"type": "function", "function": {"name": "<|im_start|>"}}]}, {"functions": [{"name": "f"}]},
]  # fmt: skip
HARMLESS: list[dict[str, Any]] = [
    {"n": 1}, {"tools": []}, {"logprobs": False}, {"response_format": {"type": "text"}}, {"stop": None},
    {"presence_penalty": 0.0}, {"max_tokens": None}, {"tool_choice": "auto"}, {"metadata": {"a": 1}},
    {"chat_template": "{{ 1 / 0 }}", "chat_template_kwargs": {"tokenize": True, "tools": [1]}},
    {"documents": [1], "add_generation_prompt": False, "tokenize": True, "continue_final_message": True},
]  # fmt: skip


def test_what_others_offer_and_we_do_not_is_told_in_words(client: Client) -> None:
    image = turns(("user", [{"type": "text", "text": "what is it?"}, {"type": "image_url", "image_url": {}}]))
    assert (
        "images, audio and files are not read"
        in assert_refused(client.ask(body(HELLO) | image), 400)["message"]
    )


def test_a_body_of_countless_lists_is_refused_before_it_is_understood(client: Client) -> None:
    refused = client.ask(body(HELLO) | {"junk": [[]] * 60_000})
    assert assert_refused(refused, 400)["code"] == "body_too_large"
    parts = turns(("user", [{"type": "text", "text": "x"}] * 1025))
    assert "at most 1024" in assert_refused(client.ask(body(HELLO) | parts), 400)["message"]
    many = assert_refused(client.ask(body(HELLO) | {"stop": ["a"] * 5}), 400)
    assert many["message"].startswith("stop: List should have at most 4")


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_field_is_refused_by_name(client: Client, wrong: dict[str, Any]) -> None:
    error = assert_refused(client.ask(body(HELLO) | wrong), 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == next(iter(wrong))


@pytest.mark.parametrize("harmless", HARMLESS)
def test_a_field_that_asks_for_nothing_is_ignored(client: Client, harmless: dict[str, Any]) -> None:
    assert client.ask(body(HELLO) | harmless).status_code == 200


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"model": "\\ud800"}',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"NaN",
    ],
)
def test_a_body_that_is_no_request_is_refused(client: Client, data: bytes) -> None:
    with client.open() as http:
        assert_refused(http.post("/v1/chat/completions", content=data), 400)


def test_a_huge_body_is_refused_whether_or_not_its_length_is_declared(client: Client) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(80):
            yield b"x" * 65536

    for content in (b"x" * (5 << 20), pieces()):
        with client.open() as http:
            assert_refused(http.post("/v1/chat/completions", content=content), 413)
    assert client.ask(body(HELLO)).status_code == 200


@pytest.mark.parametrize(
    "header", [None, "Bearer wrong", "Bearer", "Basic a test key", "Bearer a test keyy", "a test key"]
)
def test_without_the_key_nothing_but_health_answers(client: Client, header: str | None) -> None:
    headers = {} if header is None else {"authorization": header}
    with httpx.Client(base_url=client.url, headers=headers) as http:
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
            assert assert_refused(http.get(path), 401)["code"] == "invalid_api_key"
        assert_refused(http.post("/v1/chat/completions", json=body(HELLO)), 401)
        assert http.get("/health").json() == {"status": "ok"}


def test_an_unknown_model_or_path_is_not_found(client: Client) -> None:
    error = assert_refused(client.ask(body(HELLO) | {"model": "guard@prodution"}), 404)
    assert error["code"] == "model_not_found" and "guard@production" in error["message"]
    with client.open() as http:
        assert_refused(http.get("/v2"), 404)
        assert_refused(http.get("/v1/chat/completions"), 405)
        assert "/v1/chat/completions" in http.get("/openapi.json").json()["paths"]


def test_an_error_after_the_model_was_found_names_its_release(
    own: World, client: Client, tmp_path: Any
) -> None:
    response = client.ask(body("a" * 3000))
    assert_refused(response, 400)
    assert response.headers["x-luthier-release"] == own.releases[0]
    mad = publish_release(own.home, own.store, own.model, tmp_path, seed=97, std=1e30)
    response = client.ask(body(HELLO, temperature=1.0) | {"model": f"guard@{mad}"})
    assert assert_refused(response, 500)["type"] == "server_error"
    assert response.headers["x-luthier-release"] == mad
    assert client.ask(body(HELLO)).status_code == 200


def test_a_hundred_clients_that_leave_free_their_places(own: World, client: Client) -> None:
    began = len(own.store.requests())
    place = urlsplit(client.url)
    for n in range(100):
        sent = json.dumps(body(HELLO, max_tokens=1900, stream=n % 2 == 0)).encode()
        with socket.create_connection((place.hostname, place.port)) as wire:
            head = f"Host: x\r\nAuthorization: Bearer {client.key}\r\nContent-Length: {len(sent)}\r\n\r\n"
            wire.sendall(b"POST /v1/chat/completions HTTP/1.1\r\n" + head.encode() + sent)
            if n % 10 == 0:
                wire.settimeout(10)
                wire.recv(64) if n % 2 == 0 else time.sleep(0.05)
    until(lambda: gauge(client, "luthier_in_flight") + gauge(client, "luthier_queue") == 0)
    assert client.ask(body(HELLO)).status_code == 200
    until(lambda: len(own.store.requests()) >= began + 101)
    logged = own.store.requests()[began:]
    assert [record.status for record in logged].count(499) == 100
    assert sum(record.completion_tokens for record in logged) < 100 * 200


def test_a_full_queue_is_a_429_with_a_time_to_come_back(own: World) -> None:
    long = body(HELLO, stream=True, max_tokens=1900)
    with (
        threaded(own.store, own.home, limits=Limits(active=1, waiting=1, grace_s=0.0)) as client,
        client.open() as http,
        http.stream("POST", "/v1/chat/completions", json=long) as growing,
    ):
        lines = growing.iter_lines()  # kept: letting it go would hang up
        next(lines)
        waiting = threading.Thread(target=client.ask, args=(long,))
        waiting.start()
        until(lambda: gauge(client, "luthier_queue") == 1)
        refused = client.ask(body(HELLO))
        assert assert_refused(refused, 429)["type"] == "rate_limit_error"
        assert int(refused.headers["retry-after"]) >= 1
    waiting.join()


def test_stopping_ends_a_long_stream_with_a_well_formed_error(own: World) -> None:
    with threaded(own.store, own.home, limits=Limits(grace_s=0.2)) as client:
        http = client.open()
        stream = http.stream("POST", "/v1/chat/completions", json=body(HELLO, stream=True, max_tokens=1900))
        response = stream.__enter__()
        lines = response.iter_lines()
        next(lines)
    rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["error"]["type"] == "server_error"
    http.close()


def test_metrics_and_the_request_log_agree(own: World) -> None:
    release = own.releases[1]
    with threaded(own.store, own.home) as client:
        for n in range(3):
            client.ask(body(HELLO, max_tokens=5, stream=n == 0) | {"model": f"guard@{release[:12]}"})
        client.ask(body(HELLO, max_tokens=0))
        with client.open() as http:
            page = http.get("/metrics").text
    assert f'luthier_requests_total{{release="{release[:12]}",status="200"}} 3.0' in page
    assert 'luthier_requests_total{release="none",status="400"} 1.0' in page
    assert f'luthier_tokens_total{{kind="completion",release="{release[:12]}"}} 15.0' in page
    assert 'luthier_tenant_requests_total{tenant="local"} 4.0' in page
    assert 'luthier_tenant_tokens_total{kind="completion",tenant="local"} 15.0' in page
    assert 'luthier_refused_total{reason="RequestError"} 1.0' in page
    logged = [record for record in own.store.requests(release=release) if record.completion_tokens == 5]
    assert len(logged) == 3  # flushed by the shutdown
    for record in logged:
        assert (record.status, record.model, record.error) == (200, f"guard@{release[:12]}", None)
        assert record.first_token_s is not None and 0 < record.first_token_s <= record.total_s
    assert HELLO not in repr(own.store.requests())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
FIELDS = [
    "model",
    "messages",
    "max_tokens",
    "temperature",
    "top_p",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "n",
    "tools",
]
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant"]) | JSON, "content": JSON}
)
CHANGES = st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3)


@settings(max_examples=150, deadline=None)
@given(changes=CHANGES | st.fixed_dictionaries({"messages": st.lists(MESSAGE, max_size=3)}))
def test_no_body_brings_the_server_down(client: Client, changes: dict[str, Any]) -> None:
    data = json.dumps(
        body("hi", max_tokens=1) | changes
    ).encode()  # NaN, Infinity and lone surrogates included
    with client.open() as http:
        response = http.post("/v1/chat/completions", content=data)
    assert response.status_code < 500, response.text
    if response.status_code != 200:
        assert_refused(response, response.status_code)


def test_turns_may_come_in_any_order_that_the_models_template_takes(client: Client) -> None:
    def asked(*roles: str) -> dict[str, Any]:
        messages = [{"role": role, "content": f"{role} {n}"} for n, role in enumerate(roles)]
        return {"model": "guard", "messages": messages, "max_tokens": 1, "return_token_ids": True}

    seen = set()
    for roles in (
        ("user", "user"), ("user", "assistant", "assistant", "user"), ("user", "system", "user"),
        ("system",), ("assistant", "user"), ("user", "assistant"), ("user", "developer"),
    ):  # fmt: skip
        response = client.ask(asked(*roles))
        assert response.status_code == 200, response.text
        seen.add(tuple(response.json()["prompt_token_ids"]))
    assert len(seen) == 7
