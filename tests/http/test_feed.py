"""Requests of hundreds of answers: fed to the engine, the same as one by one, and nobody else's trouble."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from luthier import keys
from luthier.owners import share
from luthier.serving import limits
from luthier.serving.limits import Limits
from tests.http.running import Client, body, threaded
from tests.http.test_chat import gauge, until
from tests.serving.make_home import PROMPTS, TOKENS, World, copy_home

WORDS = ["a", "clause", "of", "the", "lease", "says", "what", "the", "tenant", "owes", "and", "when", "due"]


def texts(count: int) -> list[str]:
    return [f"{n} " + " ".join(WORDS[: 1 + n % len(WORDS)]) for n in range(count)]


@pytest.fixture(scope="module")
def client(world: World) -> Iterator[Client]:
    with threaded(world.store, world.home) as client:
        yield client


def post(client: Client, path: str, **more: Any) -> dict[str, Any]:
    with client.open() as http:
        found = http.post(f"/v1/{path}", json={"model": "guard", **more})
    assert found.status_code == 200, found.text
    return dict(found.json())


def test_256_inputs_are_embedded_in_one_request_as_one_by_one(client: Client) -> None:
    given = texts(256)
    found = post(client, "embeddings", input=given)
    assert [one["index"] for one in found["data"]] == list(range(256))
    read = 0
    for text, together in zip(given, found["data"], strict=True):
        alone = post(client, "embeddings", input=text)
        assert together["embedding"] == pytest.approx(alone["data"][0]["embedding"], abs=1e-5)
        read += alone["usage"]["prompt_tokens"]
    assert found["usage"] == {"prompt_tokens": read, "total_tokens": read}


def test_a_hundred_prompts_are_scored_in_one_request_as_one_by_one(client: Client) -> None:
    given, how = texts(100), {"echo": True, "logprobs": 1, "max_tokens": 1}
    found = post(client, "completions", prompt=given, **how)
    read = 0
    for n, together in enumerate(found["choices"]):
        alone = post(client, "completions", prompt=given[n], **how)
        (one,) = alone["choices"]
        assert (together["index"], together["text"]) == (n, one["text"])
        for told, expected in zip(
            together["logprobs"]["token_logprobs"], one["logprobs"]["token_logprobs"], strict=True
        ):
            assert told == (None if expected is None else pytest.approx(expected, abs=1e-4))
        read += alone["usage"]["prompt_tokens"]
    assert found["usage"]["prompt_tokens"] == read and found["usage"]["completion_tokens"] == 100


def test_copies_of_many_prompts_stand_in_their_order_and_are_read_once(client: Client) -> None:
    given = texts(20)
    once = post(client, "completions", prompt=given, max_tokens=3)
    twice = post(client, "completions", prompt=given, max_tokens=3, n=2)
    assert [one["text"] for one in twice["choices"]] == [one["text"] for one in once["choices"] for _ in "ab"]
    assert twice["usage"]["prompt_tokens"] == once["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("bound", "path", "given"),
    [
        ("INPUTS_TOKENS", "embeddings", {"input": ["a"] * 100}),
        ("PROMPTS_TOKENS", "completions", {"prompt": ["a", "b"], "max_tokens": 50, "n": 2}),
    ],
)
def test_more_tokens_than_one_request_may_ask_for_are_refused_before_any_is_read(
    client: Client, monkeypatch: pytest.MonkeyPatch, bound: str, path: str, given: dict[str, Any]
) -> None:
    monkeypatch.setattr(limits, bound, 99)
    with client.open() as http:
        refused = http.post(f"/v1/{path}", json={"model": "guard", **given})
    assert refused.status_code == 400 and "more than 99 tokens" in refused.json()["error"]["message"]
    assert refused.json()["error"]["param"] in given


def streamed(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def test_who_leaves_in_the_middle_leaves_nothing_behind_and_pays_for_what_was_begun(
    world: World, tmp_path: Path
) -> None:
    own = copy_home(world, tmp_path / "home")
    before = len(own.store.requests())  # what other tests asked of the home that was copied
    with threaded(own.store, own.home, limits=Limits(active=2, waiting=4, grace_s=0.0)) as client:
        many = {"model": "guard", "prompt": texts(500), "max_tokens": 20, "stream": True}
        with client.open() as http, http.stream("POST", "/v1/completions", json=many) as growing:
            told = streamed(growing.iter_lines())
            ended: set[int] = set()
            while len(ended) < 5:
                choice = next(told)["choices"][0]
                ended |= {choice["index"]} if choice["finish_reason"] else set()
                assert choice["index"] < 10  # and no other was begun yet
        inputs = json.dumps({"model": "guard", "input": ["as long as it is allowed to be " * 6] * 1000})
        place = urlsplit(client.url)
        head = f"Host: x\r\nAuthorization: Bearer {client.key}\r\nContent-Length: {len(inputs)}\r\n\r\n"
        with socket.create_connection((place.hostname, place.port), timeout=30) as wire:
            wire.sendall(b"POST /v1/embeddings HTTP/1.1\r\n" + (head + inputs).encode())
            filled = gauge(client, "luthier_blocks_filled")
            until(lambda: gauge(client, "luthier_blocks_filled") > filled)
            assert gauge(client, "luthier_queue") <= 2
        until(lambda: gauge(client, "luthier_in_flight") + gauge(client, "luthier_queue") == 0)
        until(lambda: gauge(client, "luthier_blocks_held") == 0)
        until(lambda: len(own.store.requests()) == before + 2)
        assert client.ask(body(PROMPTS[0], max_tokens=TOKENS)).status_code == 200
    left = [record for record in own.store.requests()[before:] if record.status != 200]
    assert [record.status for record in left] == [499, 499]
    assert all(record.prompt_tokens > 0 for record in left)
    assert min(record.prompt_tokens for record in left) < 10 * 80  # of 500 prompts
    assert max(record.prompt_tokens for record in left) < 100_000  # of 1000 inputs, each of more than 150


def test_others_are_answered_while_a_request_of_hundreds_is(world: World, tmp_path: Path) -> None:
    own = copy_home(world, tmp_path / "home")
    share(own.store, "guard", actor="test")
    rival = keys.create(own.store, "rival", [keys.Scope.INFER])[1]
    many = {"model": "guard", "prompt": texts(120), "max_tokens": 100, "stream": True}
    with (
        threaded(own.store, own.home, limits=Limits(active=4, waiting=4, grace_s=0.0)) as client,
        client.open() as http,
        http.stream("POST", "/v1/completions", json=many) as growing,
    ):
        told = streamed(growing.iter_lines())
        found = [next(told)]
        for secret in (rival, client.key):
            answer = Client(client.url, secret).ask(body(PROMPTS[0], max_tokens=TOKENS))
            assert answer.status_code == 200
        assert gauge(client, "luthier_in_flight") > 0
        found += told
    ends = [one["choices"][0]["index"] for one in found if one["choices"][0]["finish_reason"]]
    assert sorted(ends) == list(range(120))


def test_an_answer_that_gave_its_place_to_another_tenant_comes_in_again(world: World, tmp_path: Path) -> None:
    own = copy_home(world, tmp_path / "home")
    share(own.store, "guard", actor="test")
    names = ("holder", "many", "third", "fourth")
    made = {name: keys.create(own.store, name, [keys.Scope.INFER]) for name in names}
    mine, many_key = {name: secret for name, (_, secret) in made.items()}, made["many"][0]
    long = body(PROMPTS[0], stream=True, max_tokens=1900)
    many = {"model": "guard", "prompt": texts(6), "max_tokens": 300, "stream": True}
    chosen = Limits(active=3, waiting=3, first_s=1e6, grace_s=0.0)
    with threaded(own.store, own.home, limits=chosen) as client, ExitStack() as stack:

        def stream(name: str, path: str, given: object) -> Iterator[str]:
            http = stack.enter_context(Client(client.url, mine[name]).open())
            return stack.enter_context(http.stream("POST", path, json=given)).iter_lines()

        held = [stream("holder", "/v1/chat/completions", long) for _ in range(2)]
        for lines in held:
            next(lines)
        told = streamed(stream("many", "/v1/completions", many))
        found = [next(told)]
        until(lambda: gauge(client, "luthier_queue") == 2)
        with ThreadPoolExecutor(2) as pool:
            short = body(PROMPTS[1], max_tokens=TOKENS)
            guests = [pool.submit(Client(client.url, mine[name]).ask, short) for name in names[2:]]
            found += told
            assert [guest.result(60).status_code for guest in guests] == [200, 200]
    ends = [one["choices"][0]["index"] for one in found if one["choices"][0]["finish_reason"]]
    assert sorted(ends) == list(range(6))
    (record,) = [one for one in own.store.requests() if one.key_id == many_key.id]
    assert (record.status, record.error) == (200, None)
