"""Bodies without an end, from who shows a good key: told so, cut off, and nothing of them is left behind."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from functools import partial
from urllib.parse import urlsplit

import pytest

from luthier import assemblies, uploads
from luthier.http import patience, server
from tests.http.running import Client, threaded
from tests.http.test_files import stored
from tests.http.test_patience import answer
from tests.serving.make_home import World, copy_home

MIB = 1024 * 1024
PIECE = b" " * 65536
FORM = b'--b\r\ncontent-disposition: form-data; name="%s"; filename="x"\r\n\r\n'
JSON = "application/json"
FORMS = "multipart/form-data; boundary=b"
JOBS = "/v1/fine_tuning/jobs"
READ = {  # what its route reads at most, in bytes
    "/v1/chat/completions": 4 * MIB,
    "/v1/completions": 4 * MIB,
    "/v1/embeddings": 4 * MIB,
    "/v1/fine_tuning/alpha/graders/run": 4 * MIB,
    "/v1/uploads": MIB,
    JOBS: MIB,
    "/v1/files": MIB,
    "PART": MIB,
}
UNREAD = {f"POST {JOBS}/ftjob-none/cancel": b" 404 ", "GET /v1/models": b" 200 ", "POST /v1/models": b" 405 "}


@pytest.fixture(scope="module")
def here(world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    return copy_home(world, tmp_path_factory.mktemp("endless") / "home")


@pytest.fixture(scope="module")
def client(here: World) -> Iterator[Client]:
    with pytest.MonkeyPatch.context() as patch:
        small = partial(uploads.Uploads, limits=uploads.Limits(file_bytes=MIB))
        patch.setattr(server, "Uploads", small)
        patch.setattr(assemblies, "PART_BYTES", MIB)
        with threaded(here.store, here.home) as client:
            yield client


class Wire:
    """A request whose body is sent by hand, in chunks or as part of a length that never comes to be."""

    def __init__(self, client: Client, line: str, kind: str, chunked: bool) -> None:
        place = urlsplit(client.url)
        self.socket = socket.create_connection((place.hostname, place.port), timeout=30)
        self._chunked = chunked
        length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {1 << 40}"
        head = f"{line} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {client.key}\r\n"
        self.socket.sendall(f"{head}Content-Type: {kind}\r\n{length}\r\n\r\n".encode())

    def send(self, data: bytes) -> None:
        self.socket.sendall(b"%x\r\n%s\r\n" % (len(data), data) if self._chunked else data)

    def cut_off_within(self, most: int) -> None:
        """Nobody reads for ever: in the end the connection is gone."""
        with self.socket, pytest.raises(ConnectionError):
            for _ in range(most // len(PIECE)):
                self.send(PIECE)


@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "length"])
@pytest.mark.parametrize("path", READ)
def test_a_body_without_end_is_a_413_to_who_sends_first_and_reads_then_and_is_cut_off(
    client: Client, here: World, path: str, chunked: bool
) -> None:
    place, kind, opening = path, JSON, b'{"model": '
    if path == "/v1/files":
        kind, opening = FORMS, FORM % b"file"
    if path == "PART":
        asked = {"filename": "a", "purpose": "batch", "bytes": 64 * MIB, "mime_type": "text/plain"}
        with client.open() as http:
            place = f"/v1/uploads/{http.post('/v1/uploads', json=asked).json()['id']}/parts"
        kind, opening = FORMS, FORM % b"data"
    before = stored(here)
    wire = Wire(client, f"POST {place}", kind, chunked)
    wire.send(opening)
    for _ in range(READ[path] // len(PIECE) + 4):
        wire.send(PIECE)
    assert answer(wire.socket).startswith(b"HTTP/1.1 413 ")
    assert stored(here) == before
    wire.cut_off_within(patience.REST_BYTES + 16 * MIB)  # what the kernel holds of it is sent, too


@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "length"])
@pytest.mark.parametrize("line", UNREAD)
def test_who_is_answered_before_the_body_was_read_may_not_send_it_for_ever(
    client: Client, line: str, chunked: bool
) -> None:
    wire = Wire(client, line, JSON, chunked)
    for _ in range(16):
        wire.send(PIECE)
    assert UNREAD[line] in answer(wire.socket)
    wire.cut_off_within(patience.REST_BYTES + 16 * MIB)


def test_a_body_that_was_too_large_but_ends_leaves_its_connection_to_the_next_request(client: Client) -> None:
    with client.open() as http:
        for _ in range(2):
            too_large = http.post("/v1/uploads", content=PIECE * 24)
            assert (too_large.status_code, too_large.json()["error"]["code"]) == (413, "body_too_large")
            assert "connection" not in too_large.headers
        assert http.get("/v1/models").status_code == 200
