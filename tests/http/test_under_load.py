"""Many at once against a server of its own process: aliases that move, clients that leave."""

from __future__ import annotations

import json
import random
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from tests.http.running import ROOT, Client, body, command, spawn
from tests.serving.make_home import PROMPTS, TOKENS, Answer, World, copy_home, reference

LONG_PROMPT = "Tell me, and leave nothing out, what the third clause means. " * 6
WAIT_S = 60


@dataclass(frozen=True)
class Served:
    world: World
    client: Client
    answers: dict[tuple[str, str], Answer]


@pytest.fixture(scope="module")
def served(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    mine = copy_home(world, tmp_path_factory.mktemp("loaded") / "home")
    answers = dict(mine.answers)
    for digest in mine.releases:
        found = reference(mine.home, mine.model, digest, (LONG_PROMPT,))
        answers |= {(digest, prompt): answer for prompt, answer in found.items()}
    process, client = spawn(mine.home.path)
    yield Served(mine, client, answers)
    process.kill()
    process.wait()


def metrics(client: Client) -> dict[str, float]:
    with client.open() as http:
        page = http.get("/metrics").text
    return {name: float(value) for name, value in re.findall(r"^(luthier_\w+) (\S+)$", page, re.M)}


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def settled(client: Client) -> bool:
    now = metrics(client)
    held = ("luthier_in_flight", "luthier_queue", "luthier_blocks_held")
    return now["luthier_blocks"] > 0 and not any(now[name] for name in held)


Seen = tuple[float, float, str, httpx.Response]


def load(client: Client, done: threading.Event, seen: list[Seen]) -> None:
    prompts, n = (LONG_PROMPT, *PROMPTS), 0
    with client.open() as http:
        while not done.is_set():
            prompt = prompts[n % len(prompts)]
            began = time.monotonic()
            response = http.post("/v1/chat/completions", json=body(prompt, max_tokens=TOKENS))
            seen.append((began, time.monotonic(), prompt, response))
            n += 1


@pytest.mark.parametrize("count", [40, pytest.param(200, marks=pytest.mark.long)])
def test_aliases_flip_under_load_and_every_answer_is_whole_and_its_own_releases(
    served: Served, tmp_path: Path, count: int
) -> None:
    client, world = served.client, served.world
    before = metrics(client)
    flips = [(0.0, 0.0, world.store.resolve("guard", "production"))]
    seen: list[Seen] = []
    done = threading.Event()
    threads = [threading.Thread(target=load, args=(client, done, seen)) for _ in range(4)]
    for thread in threads:
        thread.start()
    stop = tmp_path / "stop"
    words = command("flip", world.home.path, stop)
    moving = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert moving.stdout is not None
    for line in moving.stdout:
        flips.append(tuple(json.loads(line)))
        if len(flips) > count and len(seen) >= 5 * count:
            stop.touch()
    assert moving.wait() == 0
    done.set()
    for thread in threads:
        thread.join()

    assert len(flips) > count and len(seen) >= 5 * count
    answered_by = set()
    for began, ended, prompt, response in seen:
        assert response.status_code == 200, response.text
        release = response.headers["x-luthier-release"]
        answer, said = served.answers[release, prompt], response.json()
        assert said["choices"][0]["message"]["content"] == answer.text
        assert said["choices"][0]["finish_reason"] == answer.reason
        assert said["usage"]["completion_tokens"] == len(answer.tokens)
        assert release in stood(flips, began, ended)  # not within a second: from the next request on
        answered_by.add(release)
    assert answered_by == set(world.releases)
    now = metrics(client)  # what was said before was found again, and never another release's
    assert now["luthier_blocks_found"] - before.get("luthier_blocks_found", 0.0) > len(seen)
    until(lambda: settled(client))


def stood(flips: list[tuple[float, float, str]], began: float, ended: float) -> set[str]:
    """The releases that production named at some moment of a request's life."""
    ends = [*(after for _, after, _ in flips[1:]), float("inf")]
    return {
        digest for (start, _, digest), end in zip(flips, ends, strict=True) if start <= ended and began <= end
    }


@pytest.mark.parametrize("count", [150, pytest.param(2000, marks=pytest.mark.long)])
def test_clients_that_leave_at_any_token_leave_no_block_and_no_place_held(served: Served, count: int) -> None:
    client = served.client
    draw = random.Random(7)
    fates = [(draw.randrange(0, 60), draw.random() < 0.2) for _ in range(count)]
    failures: list[str] = []

    def leave_all() -> None:
        while fates:
            try:
                lines, whole = fates.pop()
            except IndexError:
                return
            try:
                _leave(client, draw, lines, whole)
            except (OSError, AssertionError) as error:
                failures.append(repr(error))

    threads = [threading.Thread(target=leave_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    until(lambda: settled(client))
    prompt = PROMPTS[0]
    response = client.ask(body(prompt, max_tokens=TOKENS))
    answer = served.answers[response.headers["x-luthier-release"], prompt]
    assert response.json()["choices"][0]["message"]["content"] == answer.text


def _leave(client: Client, draw: random.Random, lines: int, whole: bool) -> None:
    """Ask for more than anyone waits for, hear so many lines, hang up; where `whole`, hear nothing at all."""
    place = urlsplit(client.url)
    prompt = draw.choice((LONG_PROMPT, *PROMPTS))
    sent = json.dumps(body(prompt, max_tokens=1400, stream=not whole)).encode()
    head = f"Host: x\r\nAuthorization: Bearer {client.key}\r\nContent-Length: {len(sent)}\r\n\r\n"
    with socket.create_connection((place.hostname, place.port), timeout=WAIT_S) as wire:
        wire.sendall(b"POST /v1/chat/completions HTTP/1.1\r\n" + head.encode() + sent)
        if whole:
            time.sleep(lines / 1000)
            return
        heard = b""
        while heard.count(b"data: ") < lines:
            piece = wire.recv(4096)
            assert piece, heard[-200:]
            heard += piece
