"""Who may do what, over every route that the app has: each scope, and each thing of another tenant."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from sqlalchemy import func, select

from luthier import keys, tuned
from luthier.http.auth import OPEN, OPERATOR, ROUTES, Guard, Need
from luthier.keys import Scope
from luthier.schema.jobs import JOBS
from luthier.schema.uploads import UPLOADS
from luthier.tuned import Tuned
from tests.http.routes import PARAM, every
from tests.http.running import Client, threaded
from tests.jobs.place import World, chats, jsonl, make_world, wait

SCOPES = tuple(Scope)
LINE = httpx.Client(timeout=60, verify=False)  # plain HTTP; one connection for hundreds of questions
UNKNOWN = {
    "file": "file-" + "0" * 24,
    "upload": "upload_" + "0" * 24,
    "job": "ftjob-" + "0" * 24,
    "model": "ft:tiny:ada:mine:0",
}
MODEL = "ft:tiny:ada:mine:1"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("roles"))


@pytest.fixture(scope="module")
def server(here: World) -> Iterator[Client]:
    with threaded(here.store, here.home) as client:
        yield client


@pytest.fixture(scope="module")
def routes(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    return every(tmp_path_factory.mktemp("routes"))


@pytest.fixture(scope="module")
def secrets(here: World) -> dict[tuple[str, Scope], str]:
    """A key of every scope for two tenants and the local one."""
    return {
        (tenant, scope): keys.create(here.store, tenant, {scope})[1]
        for tenant in ("ada", "bob", "local")
        for scope in SCOPES
    }


@pytest.fixture(scope="module")
def things(server: Client, here: World, secrets: dict[tuple[str, Scope], str]) -> dict[str, str]:
    """What Ada has: a file, an upload in parts, a job, a tuned model."""
    with openai.OpenAI(
        base_url=server.url + "/v1", api_key=secrets["ada", Scope.TRAIN], max_retries=0
    ) as ada:
        data = jsonl(chats(12, "ada"))
        file = ada.files.create(file=("ada.jsonl", io.BytesIO(data)), purpose="fine-tune")
        upload = ada.uploads.create(
            bytes=len(data), filename="more.jsonl", mime_type="text/jsonl", purpose="fine-tune"
        )
        job = ada.fine_tuning.jobs.create(model="tiny", training_file=file.id)
    with here.store.writing() as connection:
        tuned.add(connection, [Tuned(MODEL, "ada", job.id, "tiny", job.id, "0" * 64)])
    return {"file": file.id, "upload": upload.id, "job": job.id, "model": MODEL}


def need(method: str, path: str) -> Need | None:
    """The table's line for a route, found by shape and not by the gate's own code."""
    shape = PARAM.sub("{}", path)
    lines = [value for line, value in ROUTES.items() if PARAM.sub("{}", line) == f"{method} {shape}"]
    assert len(lines) == 1, f"{method} {path} has {len(lines)} lines in the table"
    return lines[0]


def ask(server: Client, secret: str | None, method: str, path: str) -> httpx.Response:
    headers = {"authorization": f"Bearer {secret}"} if secret else {}
    body = None if method in {"GET", "DELETE"} else {}
    return LINE.request(method, server.url + path, json=body, headers=headers)


def test_every_route_has_its_line_and_answers_exactly_the_scopes_it_names(
    server: Client, routes: list[tuple[str, str]], secrets: dict[tuple[str, Scope], str]
) -> None:
    assert len(routes) >= 27
    wrong = []
    for method, template in routes:
        wanted, path = need(method, template), PARAM.sub("none-of-that-name", template)
        for (tenant, scope), secret in secrets.items():
            if wanted is OPEN:
                may = True
            elif wanted is OPERATOR:
                may = (tenant, scope) == ("local", Scope.ADMIN)
            else:
                assert wanted is not None
                may = scope == Scope.ADMIN or scope in wanted.any_of
            status = ask(server, secret, method, path).status_code
            if (status not in {401, 403, 405}) != may or status >= 500:
                wrong.append((method, template, tenant, scope, status))
        status = ask(server, None, method, path).status_code
        if (status == 200) != (wanted is OPEN) or (wanted is not OPEN and status != 401):
            wrong.append((method, template, "nobody", "", status))
    assert not wrong


def test_a_route_without_a_line_never_reaches_its_handler(here: World) -> None:
    reached: list[str] = []

    async def handler(scope: object, receive: object, send: object) -> None:
        reached.append("handler")

    said: list[dict[str, object]] = []

    async def send(message: dict[str, object]) -> None:
        said.append(message)

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": b"", "more_body": False}

    guard = Guard(handler, store=here.store, served="the admin's key", full=lambda who: None)  # type: ignore[arg-type]
    headers = [(b"authorization", b"Bearer the admin's key")]
    for method, path in (
        ("GET", "/v1/new"),
        ("POST", "/health"),
        ("GET", "/v1/files/a/b"),
        ("PUT", "/v1/files"),
    ):
        scope = {"type": "http", "method": method, "path": path, "headers": headers}
        asyncio.run(guard(scope, receive, send))  # type: ignore[arg-type]
    assert not reached
    assert [m["status"] for m in said if m["type"] == "http.response.start"] == [404, 405, 404, 405]


def test_what_is_anothers_answers_as_what_never_was(
    server: Client,
    here: World,
    routes: list[tuple[str, str]],
    secrets: dict[tuple[str, Scope], str],
    things: dict[str, str],
) -> None:
    before = state(here)
    told = []
    for method, template in routes:
        if not PARAM.search(template):
            continue
        for kind, thing in things.items():
            for tenant, scope in (*(("bob", scope) for scope in SCOPES), ("local", Scope.ADMIN)):
                secret = secrets[tenant, scope]
                foreign = ask(server, secret, method, PARAM.sub(thing, template))
                never = ask(server, secret, method, PARAM.sub(UNKNOWN[kind], template))
                same = foreign.text.replace(thing, "X") == never.text.replace(UNKNOWN[kind], "X")
                if foreign.status_code != never.status_code or not same or foreign.status_code < 400:
                    told.append((method, template, kind, scope, foreign.text, never.text))
    assert not told
    assert state(here) == before
    for path in ("/v1/files", "/v1/fine_tuning/jobs", "/v1/models"):
        listed = ask(server, secrets["bob", Scope.ADMIN], "GET", path).text
        assert not any(thing in listed for thing in things.values())


def test_the_owner_reads_what_others_cannot(
    server: Client, secrets: dict[tuple[str, Scope], str], things: dict[str, str]
) -> None:
    for path in (f"/v1/files/{things['file']}/content", f"/v1/fine_tuning/jobs/{things['job']}"):
        assert ask(server, secrets["ada", Scope.READ], "GET", path).status_code == 200


def test_a_foreign_name_in_a_body_is_one_that_never_was(
    server: Client, secrets: dict[tuple[str, Scope], str], things: dict[str, str]
) -> None:
    told = []
    for path, field, kind, more in (
        ("/v1/chat/completions", "model", "model", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/completions", "model", "model", {"prompt": "hi"}),
        ("/v1/embeddings", "model", "model", {"input": "hi"}),
        ("/v1/fine_tuning/jobs", "model", "model", {"training_file": things["file"]}),
        ("/v1/fine_tuning/jobs", "training_file", "file", {"model": "tiny"}),
        ("/v1/fine_tuning/quotes", "training_file", "file", {"model": "tiny"}),
    ):
        answers = []
        for name in (things[kind], UNKNOWN[kind]):
            headers = {"authorization": f"Bearer {secrets['bob', Scope.ADMIN]}"}
            found = LINE.post(server.url + path, json={field: name, **more}, headers=headers)
            answers.append((found.status_code, found.text.replace(name, "X")))
        if answers[0] != answers[1] or answers[0][0] not in (400, 404):
            told.append((path, field, answers))
    assert not told


def test_where_lines_overlap_all_of_them_must_allow(
    here: World, secrets: dict[tuple[str, Scope], str]
) -> None:
    reached: list[str] = []

    async def handler(scope: object, receive: object, send: object) -> None:
        reached.append("handler")

    async def ignore(*message: object) -> dict[str, object]:
        return {"type": "http.request", "body": b"", "more_body": False}

    lines = {"GET /v1/x/{any:path}": Need(frozenset({Scope.READ})), "GET /v1/x/secret": OPERATOR}
    guard = Guard(handler, store=here.store, served="-", full=lambda who: None, routes=lines)  # type: ignore[arg-type]
    for path, expected in (("/v1/x/other", 1), ("/v1/x/secret", 1)):
        headers = [(b"authorization", b"Bearer " + secrets["bob", Scope.READ].encode())]
        scope = {"type": "http", "method": "GET", "path": path, "headers": headers}
        asyncio.run(guard(scope, ignore, ignore))  # type: ignore[arg-type]
        assert len(reached) == expected, path


def test_a_body_nested_beyond_reason_is_one_clear_400_on_every_route(
    server: Client, here: World, routes: list[tuple[str, str]], secrets: dict[tuple[str, Scope], str]
) -> None:
    headers = {
        "authorization": f"Bearer {secrets['local', Scope.ADMIN]}", "content-type": "application/json"
    }  # fmt: skip
    told = []
    for method, template in routes:
        if method != "POST" or template.endswith(("/cancel", "/pause", "/resume", "/files", "/parts")):
            continue
        for body in (b'{"a":' * 90_000, b'{"model":' + b"[" * 90_000 + b"]" * 90_000 + b"}"):
            path = server.url + PARAM.sub("none", template)
            found = LINE.post(path, content=body, headers=headers)
            said = found.json()["error"]["message"]
            if found.status_code != 400 or "no such path" in said or not said:
                told.append((template, found.status_code, said[:200]))
    assert not told


def test_a_revoked_key_is_refused_from_the_next_request_on(server: Client, here: World) -> None:
    key, secret = keys.create(here.store, "ada", {Scope.READ})
    assert ask(server, secret, "GET", "/v1/files").status_code == 200
    keys.revoke(here.store, key.id)
    refused = ask(server, secret, "GET", "/v1/files")
    assert refused.status_code == 401 and "revoked" in refused.text
    assert refused.headers["www-authenticate"] == "Bearer"


def test_a_request_is_logged_with_its_key_and_tenant(
    server: Client, here: World, secrets: dict[tuple[str, Scope], str]
) -> None:
    key, secret = keys.create(here.store, "ada", {Scope.INFER})
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    with httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {secret}"}) as client:
        assert client.post("/v1/chat/completions", json=body, timeout=60).status_code == 200
    found = wait(lambda: [record for record in here.store.requests() if record.key_id == key.id], 30)
    assert [record.tenant for record in found] == ["ada"]


def state(here: World) -> tuple[object, ...]:
    files = sorted(path.name for path in Path(here.home.path / "uploads").rglob("*"))
    rows = here.store.rows(select(func.count()).select_from(UPLOADS).where(UPLOADS.c.deleted_at.is_(None)))
    jobs = here.store.rows(select(func.count()).select_from(JOBS).where(JOBS.c.status == "queued"))
    return tuple(files), *rows[0].values(), *jobs[0].values()
