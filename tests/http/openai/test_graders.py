"""Graders over the wire, asked by OpenAI's own client."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from luthier import backends, budgets, keys, metrics
from luthier.errors import ServeError
from luthier.http.judging import Judges, NotAsked
from luthier.http.openai import graders as routes
from luthier.keys import Budget, Caller, Scope
from luthier.serving.limits import Limits
from luthier.serving.service import Service
from tests.http.running import Client, threaded
from tests.metrics.test_graders import BOTH, CHECK, CLOSE, JUDGE
from tests.serving.make_home import NAME, World


@pytest.fixture(scope="module")
def client(world: World) -> Iterator[Client]:
    with threaded(world.store, world.home, limits=Limits(default_tokens=4, grace_s=1.0)) as client:
        yield client


@pytest.fixture
def graders(client: Client) -> Any:
    with openai.OpenAI(base_url=f"{client.url}/v1", api_key=client.key, max_retries=0) as made:
        yield made.fine_tuning.alpha.graders


@pytest.mark.parametrize("grader", [CHECK, CLOSE, JUDGE, BOTH])
def test_a_grader_comes_back_validated(graders: Any, grader: dict[str, Any]) -> None:
    found = graders.validate(grader=grader).grader.model_dump()
    assert (found["type"], found["name"]) == (grader["type"], grader["name"])


@pytest.mark.parametrize(
    ("grader", "words"),
    [
        ({"type": "python", "name": "x", "source": "import os"}, "runs no code"),
        ({"type": "string_check", "name": "x"}, "reference"),
        ({**BOTH, "calculate_output": "same +"}, "calculate_output"),
        ({}, "type"),
    ],
)
def test_what_is_no_grader_is_a_400_that_says_why(graders: Any, grader: dict[str, Any], words: str) -> None:
    for call in (graders.validate, lambda **asked: graders.run(model_sample="x", **asked)):
        with pytest.raises(openai.BadRequestError, match=words) as caught:
            call(grader=grader)
        assert caught.value.param == "grader" and caught.value.code == "invalid_grader"


def test_an_answer_is_scored(graders: Any) -> None:
    found = graders.run(grader=BOTH, model_sample="the cat", item={"answer": "the cat sat down"})
    assert found.reward == pytest.approx(0.75 * 4 / 6)
    assert found.sub_rewards == {"same": 0.0, "near": pytest.approx(4 / 6)}
    assert (found.metadata.type, found.metadata.name) == ("multi", "both")
    errors = found.metadata.errors.model_dump()
    assert len(errors) >= 14 and not any(errors.values())


@pytest.mark.parametrize(
    ("changes", "sample", "flag"),
    [
        ({"reference": "{{ item.none }}"}, "x", "invalid_variable_error"),
        ({"input": "{{ sample.output_json.a }}"}, "not json", "sample_parse_error"),
    ],
)
def test_an_answer_that_cannot_be_scored_earns_nothing_and_says_why(
    graders: Any, changes: dict[str, Any], sample: str, flag: str
) -> None:
    found = graders.run(grader={**CHECK, **changes}, model_sample=sample, item={"answer": "x"})
    errors = found.metadata.errors.model_dump()
    assert found.reward == 0.0 and [name for name, raised in errors.items() if raised] == [flag]


def test_a_judge_is_a_model_of_this_server(graders: Any) -> None:
    judge = {**JUDGE, "model": f"{NAME}@production"}
    errors = graders.run(grader=judge, model_sample="x").metadata.errors
    assert errors.api_model_grader_parse_error  # a random model gives no number, but it was asked
    scored = graders.run(grader={**judge, "failure_score": 2.5}, model_sample="x")
    assert scored.reward == 2.5 and scored.metadata.sampled_model_name == judge["model"]
    stranger = graders.run(grader={**JUDGE, "model": "gpt-4o"}, model_sample="x").metadata.errors
    assert stranger.api_model_grader_server_error and stranger.api_model_grader_server_error_details


@pytest.mark.parametrize(("model", "reward", "details"), [(NAME, 0.25, None), ("nobody", 0.0, "404")])
def test_a_judge_that_the_operator_named_is_asked_where_it_is(
    world: World,
    client: Client,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    reward: float,
    details: str | None,
) -> None:
    """The other server answers as itself, or says why not; what it babbles is worth `failure_score`."""
    monkeypatch.setenv("TEST_JUDGE_KEY", client.key)
    judge = backends.read(f"{{name: remote, url: '{client.url}', model: {model}, key_env: TEST_JUDGE_KEY}}")
    grader = {**JUDGE, "model": model, "failure_score": 0.25, "range": [0, 1]}
    asked = {"grader": grader, "item": {"answer": "x", "question": "x"}, "model_sample": "x"}
    with (
        threaded(world.store, world.home, limits=Limits(grace_s=1.0), judge=judge) as server,
        server.open() as door,
    ):
        found = door.post("/v1/fine_tuning/alpha/graders/run", json=asked).json()
    errors = found["metadata"]["errors"]
    assert found["reward"] == reward
    assert errors["model_grader_server_error"] is (details is not None)
    assert details is None or f"it does not answer ({details}" in errors["model_grader_server_error_details"]


def test_a_backend_that_cannot_judge_is_refused() -> None:
    with pytest.raises(ServeError, match="no judge"):
        backends.judges(backends.read("embedded"))


def test_a_judge_is_asked_as_the_caller_and_another_tenants_model_is_none(world: World) -> None:
    with Service(world.store, world.home, Limits(default_tokens=4, grace_s=1.0)) as service:
        question = metrics.Question(f"{NAME}@production", (("user", "hello"),), 4)

        def judges(tenant: str, left_s: float = 60.0) -> Judges:
            who = Caller(f"key-{tenant}", tenant, frozenset({Scope.INFER}))
            return Judges(service, {}, who, lambda record, tenant: None, time.monotonic() + left_s)

        assert isinstance(judges("local")(question), str)
        with pytest.raises(NotAsked, match="unknown model"):
            judges("someone")(question)
        with pytest.raises(NotAsked, match="longer than one run"):
            judges("local", 0.0)(question)


RUN = "/v1/fine_tuning/alpha/graders/run"
ASKED = {"grader": {**JUDGE, "model": f"{NAME}@production", "failure_score": 1.0}, "model_sample": "x"}


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


def test_a_judges_tokens_are_the_callers_and_end_with_its_budget(client: Client, world: World) -> None:
    key, secret = keys.create(world.store, "local", [Scope.INFER], budget=Budget(tokens_per_day=400))
    codes, told = [], [0]
    for _ in range(60):
        found = httpx.post(client.url + RUN, json=ASKED, headers=bearer(secret), timeout=60)
        codes.append(found.status_code)
        if codes[-1] == 429:
            break
        told.append(found.json()["metadata"]["token_usage"])
        _until(lambda: budgets.spent_today(world.store, key.id) == sum(told))
    assert codes[0] == 200 and codes[-1] == 429 and sum(told) >= 400
    left = [record for record in world.store.requests() if record.key_id == key.id]
    assert len(left) == len(codes) - 1 and {record.model for record in left} == {f"{NAME}@production"}
    assert sum(record.prompt_tokens + record.completion_tokens for record in left) == sum(told)
    assert all(record.release and record.status == 200 for record in left)


def _until(look: Any) -> None:
    end = time.monotonic() + 30
    while not look():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_tenant_whose_judges_say_nothing_keeps_no_other_tenant_waiting(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty graders of one tenant wait for a judge that never answers; another's are scored meanwhile."""
    monkeypatch.setattr(routes, "RUN_S", 4.0)
    monkeypatch.setattr(routes, "WAITS", routes.Line(length=2, wait_s=1.0))
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent, ThreadPoolExecutor(20) as pool:
        judge = backends.read(
            f"{{name: remote, url: 'http://127.0.0.1:{silent.getsockname()[1]}', model: x}}"
        )
        hung = {"grader": {**JUDGE, "model": "x"}, "model_sample": "x"}
        with threaded(world.store, world.home, limits=Limits(grace_s=1.0), judge=judge) as server:
            secrets = [keys.create(world.store, tenant, [Scope.INFER])[1] for tenant in ("loud", "quiet")]
            began = threading.Barrier(21)

            def run() -> httpx.Response:
                began.wait()
                return httpx.post(server.url + RUN, json=hung, headers=bearer(secrets[0]), timeout=60)

            loud = [pool.submit(run) for _ in range(20)]
            began.wait()
            _until(lambda: any(one.done() for one in loud))  # the places are taken and its line is full
            check = {"grader": CHECK, "model_sample": "x", "item": {"answer": "x"}}
            mine = httpx.post(server.url + RUN, json=check, headers=bearer(secrets[1]), timeout=60)
            assert mine.json()["reward"] == 1.0 and not all(one.done() for one in loud)
            found = [one.result() for one in loud]
    codes = [one.status_code for one in found]
    assert codes.count(200) == 2 and codes.count(429) == 18
    for one in found:
        if one.status_code == 200:  # its time was over
            assert one.json()["metadata"]["errors"]["model_grader_server_error"]
        else:
            assert one.json()["error"]["code"] == "rate_limit_exceeded" and int(one.headers["retry-after"])
