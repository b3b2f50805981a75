"""Files over HTTP: by the official client, unmodified, and by clients that mean no good."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from luthier.assemblies import Assemblies
from luthier.uploads import Label, Uploads
from tests.http.running import Client, threaded
from tests.serving.make_home import World, copy_home

ROW = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
DATA = (json.dumps(ROW) + "\n").encode() * 3
FILE = {"file": ("train.jsonl", DATA)}
TUNE = {"purpose": "fine-tune"}


@pytest.fixture(scope="module")
def here(world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    return copy_home(world, tmp_path_factory.mktemp("files") / "home")


@pytest.fixture(scope="module")
def server(here: World) -> Iterator[Client]:
    with threaded(here.store, here.home) as client:
        yield client


@pytest.fixture
def client(server: Client) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key=server.key, max_retries=0) as client:
        yield client


def stored(here: World) -> int:
    return len(list((here.home.path / "uploads").iterdir()))


def refused(response: httpx.Response, status: int, words: str = "") -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and words in error["message"], error
    return error


def test_the_official_client_uploads_lists_reads_and_deletes(client: openai.OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "train ü.jsonl"
    path.write_bytes(DATA)
    made = client.files.create(file=path, purpose="fine-tune")
    assert (made.object, made.bytes, made.filename, made.purpose) == (
        "file",
        len(DATA),
        path.name,
        "fine-tune",
    )
    assert made.status == "processed" and abs(made.created_at - time.time()) < 60
    assert client.files.retrieve(made.id) == made
    assert client.files.wait_for_processing(made.id) == made
    assert client.files.content(made.id).read() == DATA
    others = [client.files.create(file=io.BytesIO(DATA), purpose="batch") for _ in range(2)]
    assert [file.id for file in client.files.list(limit=1)] == [others[1].id, others[0].id, made.id]
    assert [file.id for file in client.files.list(purpose="fine-tune")] == [made.id]
    assert next(iter(client.files.list(order="asc", limit=2))).id == made.id
    for file in (made, *others):
        deleted = client.files.delete(file.id)
        assert (deleted.id, deleted.deleted, deleted.object) == (file.id, True, "file")
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(made.id)
    assert list(client.files.list()) == []


def test_expires_after_is_honoured_as_the_official_client_writes_it(client: openai.OpenAI) -> None:
    made = client.files.create(
        file=DATA, purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 7200}
    )
    assert made.expires_at == made.created_at + 7200
    with pytest.raises(openai.BadRequestError) as short:
        client.files.create(
            file=DATA, purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 60}
        )
    assert short.value.param == "expires_after"
    client.files.delete(made.id)


def test_a_bad_training_line_is_told_by_its_number_at_upload(client: openai.OpenAI, here: World) -> None:
    before = stored(here)
    with pytest.raises(openai.BadRequestError, match="line 4: not JSON") as bad:
        client.files.create(file=DATA + b"{oops}\n" + DATA, purpose="fine-tune")
    assert (bad.value.param, bad.value.code) == ("file", "invalid_training_file")
    with pytest.raises(openai.BadRequestError, match="line 1: this is a gzip file"):
        client.files.create(file=gzip.compress(b"0" * 1_000_000), purpose="fine-tune")
    assert stored(here) == before
    kept = client.files.create(file=b"any,thing\n", purpose="fine-tune-results")  # not rows to learn from
    client.files.delete(kept.id)


def test_forms_that_are_wrong_are_refused_by_name_and_leave_nothing(server: Client, here: World) -> None:
    before = stored(here)
    with server.open() as http:
        post = lambda **form: http.post("/v1/files", **form)  # noqa: E731
        assert refused(post(files=FILE), 400, "`purpose` is missing")["param"] == "purpose"
        assert refused(post(files=FILE, data={"purpose": "vision"}), 400, "'vision'")["param"] == "purpose"
        assert refused(post(files={"fyle": DATA}, data=TUNE), 400, "`file` is missing")["param"] == "file"
        refused(post(files=[("file", DATA), ("file", DATA)], data=TUNE), 400, "stands twice")
        refused(post(files={"file": b""}, data=TUNE), 400, "empty")
        refused(post(files=FILE, data=TUNE | {"x": "y" * 20_000}), 400, "`x` is too long")
        refused(post(files=FILE, data={f"f{n}": "x" for n in range(20)}), 400, "too many fields")
        refused(post(json={"purpose": "fine-tune"}), 400, "multipart/form-data")
        kind = {"content-type": "multipart/form-data; boundary=b"}
        refused(post(content=b"--x\r\n", headers=kind), 400, "cannot be read")
        half = b'--b\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\nabc'
        refused(post(content=half, headers=kind), 400, "before its last boundary")
        coded = half.replace(b"\r\n\r\n", b"\r\ncontent-transfer-encoding: base64\r\n\r\n")
        refused(post(content=coded, headers=kind), 400, "transfer encoding")
        packed = {**kind, "content-encoding": "gzip"}
        refused(post(content=gzip.compress(half * 1000), headers=packed), 415, "compressed")
        refused(http.get("/v1/files", params={"limit": 0}), 400, "limit")
        refused(http.get("/v1/files", params={"order": "up"}), 400, "order")
    assert stored(here) == before


def test_what_stands_beside_the_file_in_a_form_is_bounded(server: Client, here: World) -> None:
    before = stored(here)
    whole = (
        b'--b\r\ncontent-disposition: form-data; name="file"; filename="x"\r\n\r\n' + DATA + b"\r\n--b--\r\n"
    )
    for form in (b"\r\n" * 400_000 + whole, whole + b"\r\n" * 400_000):
        response = httpx.post(
            server.url + "/v1/files",
            content=form,
            headers={
                "authorization": f"Bearer {server.key}",
                "content-type": "multipart/form-data; boundary=b",
            },
        )
        assert refused(response, 413)["code"] == "form_too_large"
    assert stored(here) == before


def head(server: Client, length: int) -> bytes:
    """A request by hand, up to the first byte of its file."""
    return (
        f"POST /v1/files HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {server.key}\r\n"
        f"content-type: multipart/form-data; boundary=b\r\ncontent-length: {length}\r\n\r\n"
        '--b\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'
    ).encode()


def wire(server: Client) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def test_a_file_that_says_it_is_beyond_the_bound_is_refused_unread(server: Client, here: World) -> None:
    before = stored(here)
    with wire(server) as line:
        line.sendall(head(server, 1 << 40))
        answer = line.recv(4096)
    assert answer.startswith(b"HTTP/1.1 413") and stored(here) == before


def test_a_client_that_leaves_in_the_middle_leaves_nothing(server: Client, here: World) -> None:
    before = stored(here)
    with wire(server) as line:
        line.sendall(head(server, 9_000_000) + bytes(3_000_000))
        deadline = time.monotonic() + 20
        while stored(here) == before and time.monotonic() < deadline:
            time.sleep(0.02)
        assert stored(here) == before + 1  # it is on its way
    while stored(here) > before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert stored(here) == before


STEPS = (
    "../",
    "..%2f",
    "..%2F",
    "%2e%2e%2f",
    "..%252f",
    "..\\",
    "..%5c",
    "..%c0%af",
    "\uff0e\uff0e\uff0f",
    ".../",
)
TARGETS = ("luthier.db", "etc/passwd", "uploads/secret", "artifacts", "%00", "secret%00.jsonl", "~", "*")
TRAVERSALS = [
    before + step * n + target
    for before in ("", "file-")
    for step in STEPS
    for n in (1, 5)
    for target in TARGETS
]
TRAVERSALS += [
    "%00",
    ".",
    "..",
    "/etc/passwd",
    "%2fetc%2fpasswd",
    "%5c%5cserver%5cshare",
    "C:%5cwindows",
    "file:///etc/passwd",
]
TRAVERSALS += [
    "secret",
    ".incoming-" + "0" * 24,
    "file-" + "0" * 24 + "%2f..",
    "file-" + "A" * 24,
    "part_" + "0" * 24,
]
ROUTES = [
    ("GET", "/v1/files/{}"), ("GET", "/v1/files/{}/content"), ("DELETE", "/v1/files/{}"),
    ("GET", "/v1/files?after={}"), ("POST", "/v1/uploads/{}/cancel"), ("GET", "/v1/models/{}"),
    ("GET", "/v1/fine_tuning/jobs/{}"), ("GET", "/v1/fine_tuning/jobs/{}/checkpoints"),
]  # fmt: skip


def test_no_id_reaches_the_file_system_unchecked(server: Client, here: World) -> None:
    """Every spelling through every route: the server, which runs in this process, opens no file for any."""
    secret = here.home.path / "uploads" / "secret"
    secret.write_text("secret")
    opened: list[str] = []
    watching = True

    def watch(event: str, given: tuple[Any, ...]) -> None:
        if watching and event in ("open", "os.remove", "os.rename", "os.listdir", "os.scandir"):
            opened.extend(str(one) for one in given[:1] if not isinstance(one, int))  # not a descriptor

    sys.addaudithook(watch)  # it stays for the life of this process, and does nothing after this test
    assert len(TRAVERSALS) >= 300
    made = Uploads(here.store, here.home).put("local", Label("x", "batch"), io.BytesIO(DATA))
    with server.open() as http:
        opened.clear()
        assert http.get(f"/v1/files/{made.id}/content").content == DATA
        assert opened == [str(here.home.path / "uploads" / made.id)]  # the watch sees what is read
        http.delete(f"/v1/files/{made.id}")
        opened.clear()
        for number, spelt in enumerate(TRAVERSALS):
            routes = ROUTES if number % 16 == 0 else [ROUTES[number % len(ROUTES)]]
            for method, path in routes:
                response = http.request(method, path.format(spelt))
                assert response.status_code in (200, 400, 404, 405), (method, path, spelt, response.text)
                if response.status_code == 200:  # the client itself made the path shorter: an empty list
                    assert response.json().get("data") in ([], None) or "models" in path
    watching = False
    ours = (".py", ".pyc", "audit.head", "audit.lock")  # refusals and deletions are noted
    touched = [path for path in opened if not path.endswith(ours) and ".luthier-audit.head" not in path]
    touched = [path for path in touched if path != str(here.home.path)]
    assert not touched, touched[:5]
    assert secret.read_text() == "secret"
    secret.unlink()


def test_bytes_that_were_replaced_by_a_link_are_not_followed(server: Client, here: World) -> None:
    files = Uploads(here.store, here.home)
    made = files.put("local", Label("x", "batch"), io.BytesIO(DATA))
    files.path(made).unlink()
    files.path(made).symlink_to("/etc/passwd")
    with server.open() as http:
        response = http.get(f"/v1/files/{made.id}/content")
        assert response.status_code == 503 and "root" not in response.text
    files.delete("local", made.id)
    assert Path("/etc/passwd").exists() and not files.path(made).is_symlink()


def test_names_of_uploaded_files_never_become_paths(client: openai.OpenAI, here: World) -> None:
    for name in ("../../x.jsonl", "/etc/x.jsonl", "a\0b.jsonl", "..\\..\\x.jsonl", "nul", "x" * 1000):
        made = client.files.create(file=(name, DATA), purpose="batch")
        assert not set("/\\\0") & set(made.filename) and len(made.filename) <= 255
        response = client.files.content(made.id)
        assert response.read() == DATA
        client.files.delete(made.id)
    assert not list(here.home.path.rglob("*x.jsonl"))


def test_a_tenant_sees_none_of_anothers_files(client: openai.OpenAI, server: Client, here: World) -> None:
    files = Uploads(here.store, here.home)
    foreign = files.put("someone", Label("x", "batch"), io.BytesIO(DATA))
    never = "file-" + "0" * 24
    assert list(client.files.list()) == []
    with server.open() as http:
        for method, path in (("GET", "{}"), ("GET", "{}/content"), ("DELETE", "{}")):
            theirs = http.request(method, f"/v1/files/{path.format(foreign.id)}")
            nobodys = http.request(method, f"/v1/files/{path.format(never)}")
            assert theirs.status_code == nobodys.status_code == 404
            assert theirs.text.replace(foreign.id, never) == nobodys.text
        assert http.get("/v1/files", params={"after": foreign.id}).status_code == 404
    assert files.get("someone", foreign.id) == foreign
    files.delete("someone", foreign.id)


def test_the_official_client_uploads_a_file_in_parts(
    client: openai.OpenAI, here: World, tmp_path: Path
) -> None:
    before = stored(here)
    path = tmp_path / "train.jsonl"
    path.write_bytes(DATA * 1000)
    digest = hashlib.md5(path.read_bytes()).hexdigest()
    made = client.uploads.upload_file_chunked(
        file=path, mime_type="text/jsonl", purpose="fine-tune", part_size=100_000, md5=digest
    )
    assert made.status == "completed" and made.file is not None
    assert client.files.retrieve(made.file.id) == made.file
    assert client.files.content(made.file.id).read() == path.read_bytes()
    assert stored(here) == before + 1  # the parts are gone
    client.files.delete(made.file.id)


def test_parts_are_put_together_in_the_order_named_and_only_if_they_are_as_promised(
    client: openai.OpenAI, server: Client, here: World
) -> None:
    before = stored(here)
    size = len(DATA) * 2
    begun = client.uploads.create(bytes=size, filename="x", mime_type="text/jsonl", purpose="fine-tune")
    assert begun.status == "pending" and begun.expires_at == begun.created_at + 3600
    first = client.uploads.parts.create(begun.id, data=DATA[:100])
    rest = client.uploads.parts.create(begun.id, data=DATA[100:])
    complete = lambda *ids, **more: client.uploads.complete(begun.id, part_ids=list(ids), **more)  # noqa: E731
    with pytest.raises(openai.BadRequestError, match="were promised"):
        complete(first.id, rest.id)
    last = client.uploads.parts.create(begun.id, data=DATA)
    with pytest.raises(openai.BadRequestError, match="more than the"):
        client.uploads.parts.create(begun.id, data=b"x")
    for ids, words in (
        ((first.id, last.id, "part_" + "0" * 24), "no such part"),
        ((first.id, first.id, rest.id, last.id), "stands twice"),
        ((rest.id, first.id, last.id), "line 1: not JSON"),
    ):
        with pytest.raises(openai.BadRequestError, match=words):
            complete(*ids)
    with pytest.raises(openai.BadRequestError, match="md5"):
        complete(first.id, rest.id, last.id, md5="0" * 32)
    done = complete(last.id, first.id, rest.id)
    assert done.file is not None and done.file.bytes == size
    with pytest.raises(openai.BadRequestError, match="is completed"):
        client.uploads.parts.create(begun.id, data=b"x")
    given_up = client.uploads.create(bytes=9, filename="x", mime_type="x", purpose="batch")
    client.uploads.parts.create(given_up.id, data=b"123")
    assert client.uploads.cancel(given_up.id).status == "cancelled"
    client.files.delete(done.file.id)
    assert stored(here) == before
    with pytest.raises(openai.BadRequestError, match="between 1 and"):
        client.uploads.create(bytes=9 << 30, filename="x", mime_type="x", purpose="batch")


def test_a_tenant_adds_nothing_to_anothers_upload(client: openai.OpenAI, server: Client, here: World) -> None:
    theirs = Assemblies(here.store, Uploads(here.store, here.home)).begin("someone", Label("x", "batch"), 9)
    with server.open() as http:
        bodies = {"parts": {"files": {"data": b"x"}}, "complete": {"json": {"part_ids": ["x"]}}, "cancel": {}}
        for end, body in bodies.items():
            foreign = http.post(f"/v1/uploads/{theirs.id}/{end}", **body)
            never = "upload_" + "0" * 24
            nobodys = http.post(f"/v1/uploads/{never}/{end}", **body)
            assert foreign.status_code == nobodys.status_code == 404
            assert foreign.text.replace(theirs.id, never) == nobodys.text
