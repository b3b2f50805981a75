"""Clients that ask and do not read: cut off in the end, and nobody else's trouble."""

from __future__ import annotations

import json
import select
import socket
from urllib.parse import urlsplit

import pytest

from luthier.http import patience
from luthier.serving.limits import Limits
from tests.http.running import Client, body, threaded
from tests.http.test_chat import gauge, until
from tests.serving.make_home import PROMPTS, TOKENS, World, copy_home

SECRET = "a slow reader's prompt"


def unread(client: Client) -> socket.socket:
    """A stream is asked for over a connection with hardly any room, and not read."""
    place = urlsplit(client.url)
    sent = json.dumps(body(SECRET, max_tokens=1900, stream=True)).encode()
    head = f"Host: x\r\nAuthorization: Bearer {client.key}\r\nContent-Length: {len(sent)}\r\n\r\n"
    wire = socket.socket()
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    wire.settimeout(30)
    wire.connect((place.hostname, place.port))
    wire.sendall(b"POST /v1/chat/completions HTTP/1.1\r\n" + head.encode() + sent)
    return wire


def test_who_does_not_read_or_a_byte_at_a_time_holds_its_own_place_until_it_is_cut_off(
    world: World, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "SEND_S", 2.0)
    monkeypatch.setattr(patience, "BUFFER_BYTES", 8192)
    own = copy_home(world, tmp_path_factory.mktemp("slow") / "home")
    with (
        threaded(own.store, own.home, limits=Limits(active=3, waiting=3)) as client,
        unread(client),
        unread(client) as trickling,
    ):
        for _ in range(6):
            response = client.ask(body(PROMPTS[0], max_tokens=TOKENS))
            answer = own.answers[own.releases[0], PROMPTS[0]]
            assert response.json()["choices"][0]["message"]["content"] == answer.text

        def settled() -> bool:
            trickling.recv(1)
            return gauge(client, "luthier_in_flight") + gauge(client, "luthier_queue") == 0

        until(settled)
        until(lambda: gauge(client, "luthier_blocks_held") == 0)  # freed by the step after
        until(lambda: sum(record.status == 499 for record in own.store.requests()) == 2)
    slow = [record for record in own.store.requests() if record.status == 499]
    assert len(slow) == 2 and all(0 < record.completion_tokens < 1900 for record in slow)


def place(client: Client) -> tuple[str, int]:
    found = urlsplit(client.url)
    return str(found.hostname), int(found.port or 0)


def told(wire: socket.socket) -> bytes:
    """All that the server says until it hangs up."""
    said = b""
    try:
        while piece := wire.recv(4096):
            said += piece
    except ConnectionError:
        pass
    return said


def answer(wire: socket.socket) -> bytes:
    """One whole answer on a connection that stays: its head and its body may come in pieces of their own."""
    said = b""
    while b"\r\n\r\n" not in said:
        said += heard(wire)
    head, _, body = said.partition(b"\r\n\r\n")
    fields = (line.partition(b":") for line in head.lower().split(b"\r\n"))
    length = next(int(value) for name, _, value in fields if name == b"content-length")
    while len(body) < length:
        body += heard(wire)
    return head


def heard(wire: socket.socket) -> bytes:
    piece = wire.recv(4096)
    assert piece, "the server hung up in the middle of an answer"
    return piece


def trickle(wire: socket.socket, data: bytes, gap_s: float = 0.2) -> bool:
    """Whether the server hung up before it had all of it."""
    for at in range(len(data)):
        try:
            wire.sendall(data[at : at + 1])
        except OSError:
            return True
        if select.select([wire], [], [], gap_s)[0]:
            return True
    return False


def test_who_sends_a_byte_at_a_time_is_cut_off_and_who_is_only_slow_is_not(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "HEAD_S", 1.0)
    monkeypatch.setattr(patience, "BODY_S", 1.0)
    with threaded(world.store, world.home) as client:
        head = f"POST /v1/uploads HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {client.key}\r\n".encode()
        long = b"Content-Type: application/json\r\nContent-Length: 100000\r\n\r\n"
        with socket.create_connection(place(client), timeout=30) as wire:
            assert trickle(wire, b"GET /health HTTP/1.1\r\nX-Long: " + b"x" * 200)
            assert told(wire).startswith(b"HTTP/1.1 408 ")
        with socket.create_connection(place(client), timeout=30) as wire:  # says nothing at all
            assert told(wire).startswith(b"HTTP/1.1 408 ")
        with socket.create_connection(place(client), timeout=30) as wire:
            wire.sendall(head + long)
            assert trickle(wire, b"{" + b" " * 200)
            assert told(wire).startswith(b"HTTP/1.1 408 ")
        with socket.create_connection(place(client), timeout=30) as wire:  # one good request, then a trickle
            wire.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert answer(wire).startswith(b"HTTP/1.1 200 ")
            assert trickle(wire, b"GET /health HTTP/1.1\r\nX-Long: " + b"x" * 200)
        with socket.create_connection(place(client), timeout=30) as wire:  # slow, but it moves
            wire.sendall(head + long)
            for _ in range(10):
                wire.sendall(b" " * 10_000)
                select.select([wire], [], [], 0.3)
            assert told(wire).startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 422 "))


def test_who_goes_on_sending_after_a_refusal_is_cut_off_and_who_ends_soon_may_ask_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "REST_BYTES", 256 * 1024)
    with threaded(world.store, world.home, limits=Limits()) as client:
        place = urlsplit(client.url)
        head = b"POST /v1/files HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        piece = b"10000\r\n" + b"a" * 65536 + b"\r\n"
        with socket.create_connection((place.hostname, place.port), timeout=30) as wire:
            wire.sendall(head)
            assert b" 401 " in answer(wire)
            sent = 0
            with pytest.raises(ConnectionError):
                while sent < 1 << 28:
                    wire.sendall(piece)
                    sent += len(piece)
        with socket.create_connection((place.hostname, place.port), timeout=30) as wire:
            for _ in range(2):
                wire.sendall(head)
                assert b" 401 " in answer(wire)
                wire.sendall(piece + b"0\r\n\r\n")
