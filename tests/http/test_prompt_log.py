"""`serve --log-prompts`: what is asked and answered is on record when the operator says so, and only then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.store import Store
from tests.http.running import Client, body, threaded
from tests.http.test_chat import gauge, until
from tests.serving.make_home import PROMPTS, World, copy_home

SECRET = "who asks for this is named nowhere"


@pytest.fixture
def own(world: World, tmp_path: Path) -> World:
    return copy_home(world, tmp_path / "home")


def lines(own: World) -> list[dict[str, Any]]:
    text = (own.home.path / "prompts" / "requests.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_by_default_no_file_of_the_home_holds_a_prompt(own: World) -> None:
    with threaded(own.store, own.home) as client:
        assert client.ask(body(SECRET, max_tokens=4)).status_code == 200
    assert not (own.home.path / "prompts").exists()
    assert not any(
        SECRET.encode() in path.read_bytes() for path in own.home.path.rglob("*") if path.is_file()
    )


def test_every_answered_request_is_one_line_and_the_rest_is_none(own: World) -> None:
    with threaded(own.store, own.home, log_prompts=True) as client, client.open() as http:
        assert http.get("/health").json() == {"status": "ok", "prompt_log": "on"}
        assert gauge(client, "luthier_prompt_log_lost") == 0
        whole = client.ask(body(PROMPTS[0], max_tokens=8, n=2, temperature=1, seed=3))
        with http.stream(
            "POST", "/v1/chat/completions", json=body(PROMPTS[1], max_tokens=8, stream=True)
        ) as it:
            streamed = [json.loads(line[6:]) for line in it.iter_lines() if line.startswith("data: {")]
            its_id = it.headers["x-request-id"]
        document = http.post(
            "/v1/completions", json={"model": "guard", "prompt": ["a", "b"], "max_tokens": 3}
        )
        vector = http.post("/v1/embeddings", json={"model": "guard", "input": [PROMPTS[2]]})
        assert client.ask(body(SECRET, max_tokens=0)).status_code == 400
        left(client)
        until(lambda: sum(record.status == 499 for record in own.store.requests()) == 1)
    said = {line["id"]: line for line in lines(own)}
    assert len(lines(own)) == len(said) == 5 and SECRET not in json.dumps(lines(own))
    chat = said[whole.headers["x-request-id"]]
    texts = [choice["message"]["content"] for choice in whole.json()["choices"]]
    assert [answer["text"] for answer in chat["answers"]] == texts
    assert chat["request"]["messages"][0]["content"] == PROMPTS[0]
    assert chat["release"] == own.releases[0]
    told = "".join(c["delta"].get("content") or "" for event in streamed for c in event["choices"])
    assert said[its_id]["answers"][0]["text"] == told
    assert len(said[document.headers["x-request-id"]]["answers"]) == 2
    assert said[vector.headers["x-request-id"]]["request"]["input"] == [PROMPTS[2]]
    assert said[vector.headers["x-request-id"]]["answers"] == []
    (cut,) = [line for line in lines(own) if line["status"] == 499]
    assert cut["answers"][0]["text"] and cut["answers"][0]["finish_reason"] is None


def left(client: Client) -> None:
    """A client that goes away in the middle of its stream."""
    with client.open() as http:
        asked = body("hello there", max_tokens=1900, stream=True, ignore_eos=True)
        with http.stream("POST", "/v1/chat/completions", json=asked) as response:
            pieces = response.iter_lines()
            while '"content":"' not in next(pieces) or '"content":""' in next(pieces):
                pass


def test_a_second_server_on_the_same_home_says_why_it_does_not_log(own: World) -> None:
    from luthier.errors import ServeError
    from luthier.http.server import Door, serve

    with threaded(own.store, own.home, log_prompts=True):
        other = Store.open(own.home.database)
        with pytest.raises(ServeError, match="another server logs its prompts"):
            serve(other, own.home, Door(port=0, log_prompts=True), print)
