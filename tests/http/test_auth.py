"""The gate: each route against each scope, keys of other tenants, budgets, the audit log, and TLS."""

from __future__ import annotations

import logging
import re
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from luthier import audit, budgets, keys
from luthier.errors import ServeError
from luthier.http import Secure, auth
from luthier.http.app import create_app
from luthier.http.auth import OPEN, ROUTES
from luthier.http.server import Door, serve
from luthier.keys import Budget, Scope
from luthier.serving.service import Service
from luthier.uploads import Uploads
from tests.http.running import Client, threaded
from tests.serving.make_home import World

TENANTS = ("acme", "rival")


@pytest.fixture(scope="module")
def server(world: World) -> Iterator[Client]:
    with threaded(world.store, world.home) as client:
        yield client


@pytest.fixture(scope="module")
def secrets_by(world: World) -> dict[tuple[str, Scope], str]:
    return {(t, scope): keys.create(world.store, t, [scope])[1] for t in TENANTS for scope in Scope}


def ask(client: Client, method: str, path: str, secret: str, **more: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {secret}"}
    return httpx.request(method, client.url + path, headers=headers, timeout=60, **more)


def concrete(route: str) -> tuple[str, str]:
    """A route's method and a path that nothing stands at."""
    method, path = route.split()
    steps = ["nothing-here" if step.startswith("{") else step for step in path.split("/")]
    return method, "/".join(steps)


def test_every_route_of_the_app_stands_in_the_table(world: World) -> None:
    app = create_app(Service(world.store, world.home), "a test key", Uploads(world.store, world.home))
    named = {(route.split()[0], concrete(route)[1]) for route in ROUTES}
    for path, methods in app.openapi()["paths"].items():
        for method in methods:
            assert (method.upper(), concrete(f"x {path}")[1]) in named, (method, path)


@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_a_route_opens_to_the_scopes_of_the_table_and_to_no_other(
    route: str, server: Client, secrets_by: dict[tuple[str, Scope], str]
) -> None:
    need, (method, path) = ROUTES[route], concrete(route)
    for scope in Scope:
        code = ask(server, method, path, secrets_by["acme", scope]).status_code
        if need is OPEN:
            assert code == 200
            continue
        allowed = scope in need.any_of or (scope is Scope.ADMIN and not need.operator)
        assert (code != 403) == allowed, (route, scope, code)
        assert code < 500
    if need is not OPEN:
        for wrong in ("lt-wrong", secrets_by["acme", Scope.ADMIN][:-1]):
            assert ask(server, method, path, wrong).status_code == 401


def test_a_path_that_no_line_names_reaches_nothing(server: Client) -> None:
    assert ask(server, "GET", "/v1/secrets", server.key).status_code == 404
    assert ask(server, "PATCH", "/v1/models", server.key).status_code == 405
    assert ask(server, "GET", "/v1/secrets", "lt-wrong").status_code == 401


def test_what_one_tenant_made_no_other_can_see_or_touch(
    server: Client, secrets_by: dict[tuple[str, Scope], str]
) -> None:
    line = b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}\n'
    mine = secrets_by["acme", Scope.TRAIN]
    made = ask(
        server,
        "POST",
        "/v1/files",
        mine,
        files={"file": ("rows.jsonl", line * 12)},
        data={"purpose": "fine-tune"},
    )
    assert made.status_code == 200, made.text
    file = made.json()["id"]
    job = ask(server, "POST", "/v1/fine_tuning/jobs", mine, json={"model": "x", "training_file": file})
    assert job.status_code in (400, 404)  # there is no such base, and that is said only after the key
    for scope in Scope:
        theirs = secrets_by["rival", scope]
        for method, end in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
            assert ask(server, method, f"/v1/files/{file}{end}", theirs).status_code in (403, 404)
        listed = ask(server, "GET", "/v1/files", theirs)
        assert listed.status_code == 403 or listed.json()["data"] == []
    assert ask(server, "GET", f"/v1/files/{file}", mine).status_code == 200


def test_a_body_that_no_route_takes_is_not_read_to_its_end(
    server: Client, secrets_by: dict[tuple[str, Scope], str]
) -> None:
    body = b'{"purpose": "' + b"x" * (2 * 1024 * 1024) + b'"}'
    found = ask(server, "POST", "/v1/uploads", secrets_by["acme", Scope.TRAIN], content=body)
    assert (found.status_code, found.json()["error"]["code"]) == (413, "body_too_large")


def test_a_release_of_the_command_line_is_not_another_tenants(
    server: Client, secrets_by: dict[tuple[str, Scope], str]
) -> None:
    body = {"model": "guard", "messages": [{"role": "user", "content": "hello there"}], "max_tokens": 2}
    assert ask(server, "POST", "/v1/chat/completions", server.key, json=body).status_code == 200
    refused = ask(server, "POST", "/v1/chat/completions", secrets_by["acme", Scope.INFER], json=body)
    assert refused.status_code == 404
    assert ask(server, "GET", "/v1/models", secrets_by["acme", Scope.READ]).json()["data"] == []


def test_revoked_and_expired_keys_open_nothing_from_the_next_request_on(server: Client, world: World) -> None:
    key, secret = keys.create(world.store, "acme", [Scope.READ])
    assert ask(server, "GET", "/v1/models", secret).status_code == 200
    keys.revoke(world.store, key.id)
    refused = ask(server, "GET", "/v1/models", secret)
    assert refused.status_code == 401 and "revoked" in refused.json()["error"]["message"]
    _, late = keys.create(world.store, "acme", [Scope.READ], lives=timedelta(seconds=-1))
    assert "expired" in ask(server, "GET", "/v1/models", late).json()["error"]["message"]


def test_a_revoked_key_opens_nothing_though_the_door_remembers_whose_it_was(
    server: Client, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "LATELY_S", 3600.0)
    body = {"model": "guard", "messages": [{"role": "user", "content": "hello there"}], "max_tokens": 2}
    key, secret = keys.create(world.store, "local", [Scope.INFER])
    assert ask(server, "POST", "/v1/chat/completions", secret, json=body).status_code == 200
    keys.revoke(world.store, key.id)
    refused = ask(server, "POST", "/v1/chat/completions", secret, json=body)
    assert refused.status_code == 401 and "revoked" in refused.json()["error"]["message"]


def test_budgets_are_kept_and_told_in_openais_headers(server: Client, world: World) -> None:
    _, secret = keys.create(world.store, "local", [Scope.READ], budget=Budget(requests_per_minute=3))
    found = [ask(server, "GET", "/v1/models", secret) for _ in range(4)]
    assert [one.status_code for one in found] == [200, 200, 200, 429]
    assert [one.headers["x-ratelimit-remaining-requests"] for one in found] == ["2", "1", "0", "0"]
    assert (
        found[3].json()["error"]["code"] == "rate_limit_exceeded" and int(found[3].headers["retry-after"]) > 0
    )
    _, small = keys.create(world.store, "local", [Scope.INFER], budget=Budget(tokens_per_day=5))
    body = {"model": "guard", "messages": [{"role": "user", "content": "hello there"}], "max_tokens": 4}
    codes = []
    for _ in range(50):  # the answer's tokens are counted by the log's writer, a moment later
        codes.append(ask(server, "POST", "/v1/chat/completions", small, json=body).status_code)
        if codes[-1] == 429:
            break
    assert codes[0] == 200 and codes[-1] == 429


def test_who_has_spent_its_tokens_may_still_look_and_is_told_when_there_are_more(
    server: Client, world: World
) -> None:
    budget = Budget(requests_per_minute=60, tokens_per_day=1_000_000, tokens_per_month=10)
    key, secret = keys.create(world.store, "acme", [Scope.ADMIN], budget=budget)
    budgets.spend(world.store, key.id, 10)
    free = [ask(server, "GET", path, secret) for path in ("/v1/models", "/v1/files", "/v1/fine_tuning/jobs")]
    assert [one.status_code for one in free] == [200] * 3
    told = free[0].headers
    assert (told["x-ratelimit-limit-tokens"], told["x-ratelimit-remaining-tokens"]) == ("10", "0")
    assert re.fullmatch(r"(\d+h)?(\d+m)?[\d.]+s", told["x-ratelimit-reset-tokens"])
    assert re.fullmatch(r"[\d.]+m?s", told["x-ratelimit-reset-requests"])
    body = {"model": "guard", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    run = {"grader": {}, "model_sample": "x"}
    for path, given in (("chat/completions", body), ("completions", body), ("embeddings", body),
                        ("fine_tuning/alpha/graders/run", run)):  # fmt: skip
        refused = ask(server, "POST", f"/v1/{path}", secret, json=given)
        error = refused.json()["error"]
        assert (refused.status_code, error["code"]) == (429, "rate_limit_exceeded"), path
        assert "tokens per month" in error["message"] and int(refused.headers["retry-after"]) > 0


def test_a_keys_requests_at_once_are_bounded_and_no_other_keys(server: Client, world: World) -> None:
    _, secret = keys.create(world.store, "local", [Scope.INFER], budget=Budget(concurrent_requests=2))
    _, other = keys.create(world.store, "local", [Scope.INFER])
    long = {
        "model": "guard",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 1900,
        "stream": True,
    }

    def models(with_key: str) -> int:
        return ask(server, "GET", "/v1/models", with_key).status_code

    with ExitStack() as growing:
        for _ in range(2):
            http = growing.enter_context(Client(server.url, secret).open())
            answer = growing.enter_context(http.stream("POST", "/v1/chat/completions", json=long))
            assert answer.status_code == 200
        refused = ask(server, "GET", "/v1/models", secret)
        assert refused.status_code == 429 and "2 requests at once" in refused.json()["error"]["message"]
        assert int(refused.headers["retry-after"]) == 1 and models(other) == 200
    end = time.monotonic() + 30
    while models(secret) != 200:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_changes_and_refusals_stand_in_the_audit_log_without_a_secret(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    with threaded(world.store, world.home) as server:
        _leaves_no_secret(server, world, caplog)


def _leaves_no_secret(server: Client, world: World, caplog: pytest.LogCaptureFixture) -> None:
    key, secret = keys.create(world.store, "acme", [Scope.TRAIN])
    planted = [f"lt-planted-{n:03}-{'x' * 32}" for n in range(20)]
    before = audit.verify(world.store)["entries"]
    with caplog.at_level(logging.DEBUG):
        ask(server, "POST", "/v1/uploads", secret, json={
            "purpose": "fine-tune", "filename": "a.jsonl", "bytes": 10, "mime_type": "text/jsonl",
        })  # fmt: skip
        for one in planted:
            ask(server, "GET", "/v1/models", one)
            ask(server, "POST", "/v1/chat/completions", server.key, content=one.encode())
    found = list(audit.entries(world.store, before))
    done = [entry for entry in found if entry.action == "POST /v1/uploads"]
    assert len(done) == 1 and (done[0].actor, done[0].tenant) == (key.id, "acme")
    assert 0 < sum(entry.action == "refused" for entry in found) <= 30
    assert audit.verify(world.store)["entries"] == before + len(found)
    everything = str(found) + caplog.text + ask(server, "GET", "/metrics", server.key).text
    assert not [one for one in (*planted, secret, server.key) if one in everything]
    stored = b"".join(path.read_bytes() for path in world.home.path.glob("luthier.db*"))
    assert not [one for one in (*planted, secret) if one.encode() in stored]


def certificate(folder: Path) -> Secure:
    made = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(made[1]), "-out", str(made[0])],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    return Secure(*made)


def test_a_server_with_a_certificate_speaks_https_and_nothing_else(world: World, tmp_path: Path) -> None:
    secure = certificate(tmp_path)
    with threaded(world.store, world.home, secure=secure) as client:
        assert client.url.startswith("https://")
        trusting = ssl.create_default_context(cafile=str(secure.cert))
        assert httpx.get(client.url + "/health", verify=trusting, timeout=30).status_code == 200
        with pytest.raises(httpx.HTTPError):
            httpx.get(client.url.replace("https", "http") + "/health", timeout=10)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_nothing_beyond_this_machine_is_listened_to_in_the_clear(host: str, world: World) -> None:
    with pytest.raises(ServeError, match="in the clear"):
        serve(world.store, world.home, Door(host=host, port=0), print)


def test_a_certificate_without_its_key_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(ServeError, match="a certificate and its key"):
        serve(world.store, world.home, Door(port=0, secure=Secure(cert=tmp_path / "x")), print)
    with pytest.raises(ServeError, match="cannot be read"):
        serve(world.store, world.home, Door(port=0, secure=Secure(tmp_path / "x", tmp_path / "y")), print)
