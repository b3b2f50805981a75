"""The server as its users meet it: a process of its own on loopback, flipped, killed and stopped."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from luthier.errors import ServeError
from luthier.http.server import Door, serve
from tests.http.running import Client, body, spawn
from tests.serving.make_home import World, copy_home


class Server:
    """One process, started when first needed and again after it was killed."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.process: subprocess.Popen[str] | None = None
        self.client = Client("", "")

    def ensure(self) -> Client:
        if self.process is None or self.process.poll() is not None:
            port = int(self.client.url.rpartition(":")[2] or 0)
            self.process, self.client = spawn(self.world.home.path, port)
        return self.client


@pytest.fixture(scope="module")
def server(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(copy_home(world, tmp_path_factory.mktemp("server") / "home"))
    yield server
    if server.process is not None:
        server.process.kill()
        server.process.wait()


def test_a_killed_server_starts_again_on_the_same_port_and_answers(server: Server) -> None:
    client = server.ensure()
    assert server.process is not None
    with (
        client.open() as http,
        http.stream(
            "POST", "/v1/chat/completions", json=body("hello there", stream=True, max_tokens=1900)
        ) as response,
    ):
        pieces = response.iter_bytes()
        next(pieces)
        server.process.send_signal(signal.SIGKILL)
        with pytest.raises(httpx.HTTPError):
            list(pieces)
    server.process.wait()
    again = server.ensure()
    assert again == client
    response = again.ask(body("hello there", max_tokens=4))
    assert response.status_code == 200, response.text


def test_sigterm_finishes_what_is_under_way_refuses_the_rest_and_leaves_a_log(server: Server) -> None:
    client = server.ensure()
    assert server.process is not None
    with (
        client.open() as http,
        http.stream(
            "POST", "/v1/chat/completions", json=body("hello there", stream=True, max_tokens=200)
        ) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(15) == 0
    with pytest.raises(httpx.ConnectError):
        client.ask(body("hello there"))
    last = server.world.store.requests()[-1]
    assert (last.status, last.completion_tokens, last.error) == (200, 200, None)


def test_a_port_in_use_is_named_before_anything_is_loaded(world: World) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServeError, match=f"port {port} is in use") as refusal:
            serve(world.store, world.home, Door(port=port), lambda said: None)
        assert refusal.value.hint


@pytest.mark.parametrize("door", [Door(port=70000), Door(host="no such host", port=0), Door(key="short")])
def test_a_door_that_cannot_open_is_a_serve_error(world: World, door: Door) -> None:
    with pytest.raises(ServeError):
        serve(world.store, world.home, door, lambda said: None)


def test_a_killed_engine_ends_a_stream_in_an_error_and_the_server_answers_on(server: Server) -> None:
    client = server.ensure()
    assert server.process is not None
    with (
        client.open() as http,
        http.stream(
            "POST", "/v1/chat/completions", json=body("hello there", stream=True, max_tokens=1900)
        ) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        (engine,) = children(server.process.pid)
        os.kill(engine, signal.SIGKILL)
        rest = [json.loads(line.removeprefix("data: ")) for line in lines if line and "[DONE]" not in line]
    assert rest[-1]["error"]["type"] == "server_error"
    assert not any(choice["finish_reason"] for said in rest[:-1] for choice in said["choices"])
    assert client.ask(body("hello there", max_tokens=4)).status_code == 200
    assert httpx.get(f"{client.url}/health", verify=False).json() == {"status": "ok"}


def test_a_killed_server_leaves_no_engine_behind(server: Server) -> None:
    server.ensure()
    assert server.process is not None
    (engine,) = children(server.process.pid)
    server.process.send_signal(signal.SIGKILL)
    server.process.wait()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{engine}/stat").exists() and not _ended(engine):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def _ended(pid: int) -> bool:
    """A zombie has ended; whoever took it over has only not looked yet."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True
