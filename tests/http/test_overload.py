"""Far more than a server takes on: who is let in is answered right, who is not is told when to come back."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from uvicorn.protocols.http.h11_impl import RequestResponseCycle

from luthier import budgets, keys
from luthier.http import patience
from luthier.http.auth import REFUSALS
from luthier.http.exchange import Exchange
from luthier.owners import share
from luthier.serving.limits import Limits
from tests.http.running import Client, body, threaded
from tests.http.test_chat import gauge, until
from tests.serving.make_home import PROMPTS, TOKENS, World, copy_home

BENCH = Path(__file__).parents[2] / "bench"


def test_ten_times_too_much_is_answered_right_or_refused_with_a_time_to_come_back(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import overload

    own = copy_home(world, tmp_path / "home")
    before = len(own.store.requests())  # what other tests asked of the home that was copied
    with threaded(own.store, own.home, limits=Limits(active=2, waiting=2)) as client:
        job = {"url": client.url, "key": client.key, "model": "guard", "more": {}}
        prompts = [PROMPTS[n % len(PROMPTS)] for n in range(300)]

        async def all_at_once() -> list[dict[str, object]]:
            return await asyncio.gather(*(overload.ask(job, prompt, TOKENS) for prompt in prompts))

        found = asyncio.run(all_at_once())
        until(lambda: gauge(client, "luthier_in_flight") + gauge(client, "luthier_queue") == 0)
        until(lambda: gauge(client, "luthier_blocks_held") == 0)
        until(lambda: kept() < 10)  # nothing of a refused request is held on to
        assert client.ask(body(PROMPTS[0], max_tokens=TOKENS)).status_code == 200
        with client.open() as http:
            page = http.get("/metrics").text
        summary = overload.summary([{**one, "late_s": 0.0} for one in found])
    assert summary["statuses"].keys() == {"200", "429"} and summary["refused_without_retry_after"] == 0
    for prompt, one in zip(prompts, found, strict=True):
        if one["status"] == 200:
            assert one["ended"] and one["text"] == own.answers[own.releases[0], prompt].text
        else:
            assert isinstance(one["retry_after"], str) and int(one["retry_after"]) >= 1
    refused = summary["statuses"]["429"]
    assert refused > 200 and f'luthier_refused_total{{reason="Busy"}} {refused}.0' in page
    logged = [record.status for record in own.store.requests()[before:]]
    assert logged.count(200) == summary["statuses"]["200"] + 1
    assert logged.count(429) == len(logged) - logged.count(200) <= REFUSALS


def kept() -> int:
    """Requests that this process, in which the server runs too, still holds."""
    gc.collect()
    return sum(type(one) in (Exchange, RequestResponseCycle) for one in gc.get_objects())


def test_a_full_server_refuses_before_it_reads_and_takes_nothing_from_the_budget(
    world: World, tmp_path: Path
) -> None:
    own = copy_home(world, tmp_path / "home")
    budget = keys.Budget(requests_per_minute=3)
    _, secret = keys.create(own.store, "acme", [keys.Scope.INFER], budget=budget, lives=timedelta(hours=1))
    long = body(PROMPTS[0], stream=True, max_tokens=1900)
    with (
        threaded(own.store, own.home, limits=Limits(active=1, waiting=0, grace_s=0.0)) as client,
        client.open() as http,
    ):
        with http.stream("POST", "/v1/chat/completions", json=long) as growing:
            lines = growing.iter_lines()  # kept: letting it go would hang up
            next(lines)
            for _ in range(5):  # the body of a million bytes is announced, and never sent
                head = refused(client, secret, f"Content-Length: {1 << 20}\r\n\r\n")
                assert head.startswith("HTTP/1.1 429 ") and "connection: close" in head
        until(lambda: gauge(client, "luthier_in_flight") == 0)
        found = Client(client.url, secret).ask(body(PROMPTS[0]))
        assert found.headers["x-ratelimit-remaining-requests"] == "2"


def test_what_is_refused_for_room_costs_nothing_and_n_answers_begin_together_or_not_at_all(
    world: World, tmp_path: Path
) -> None:
    own = copy_home(world, tmp_path / "home")
    share(own.store, "guard", actor="test")
    key, secret = keys.create(own.store, "acme", [keys.Scope.INFER])
    rival = keys.create(own.store, "rival", [keys.Scope.INFER])[1]
    long = body(PROMPTS[0], stream=True, max_tokens=1900)
    with threaded(own.store, own.home, limits=Limits(active=1, waiting=3, grace_s=0.0)) as client:
        mine = Client(client.url, secret)
        with client.open() as http, ThreadPoolExecutor(2) as pool:
            with http.stream("POST", "/v1/chat/completions", json=long) as growing:
                lines = growing.iter_lines()
                next(lines)
                for n, status in ((4, 429), (5, 400)):  # 3 may wait now; 5 never find room
                    assert mine.ask(body(PROMPTS[0], n=n)).status_code == status
                    assert gauge(client, "luthier_queue") == 0
                waits = pool.submit(mine.ask, body(PROMPTS[0], n=3))
                until(lambda: gauge(client, "luthier_queue") == 3)
                theirs = pool.submit(Client(client.url, rival).ask, body(PROMPTS[1], max_tokens=TOKENS))
                assert waits.result(30).status_code == 429  # one of its answers gave its place to the rival
            assert theirs.result(30).status_code == 200
    found = [record for record in own.store.requests() if record.key_id == key.id]
    assert sorted(record.status for record in found) == [400, 429, 429]
    assert not any(record.prompt_tokens or record.completion_tokens for record in found)
    assert not budgets.spent_today(own.store, key.id)


def refused(client: Client, secret: str, rest: str) -> str:
    """What the server says to a request of which it gets the head only."""
    place = urlsplit(client.url)
    with socket.create_connection((place.hostname, place.port), timeout=30) as wire:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {secret}\r\n"
        wire.sendall((head + rest).encode())
        return wire.makefile("rb").read().decode().lower().replace("http/1.1", "HTTP/1.1")


def test_one_connection_too_many_is_a_429_and_not_a_broken_server(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "CONNECTIONS", 3)
    own = copy_home(world, tmp_path / "home")
    with threaded(own.store, own.home) as client:
        place = urlsplit(client.url)
        idle = [socket.create_connection((place.hostname, place.port)) for _ in range(3)]
        found = client.ask(body(PROMPTS[0], max_tokens=TOKENS))
        assert found.status_code == 429 and int(found.headers["retry-after"]) >= 1
        assert json.loads(found.text)["error"]["code"] == "rate_limit_exceeded"
        for wire in idle:
            wire.close()
        until(lambda: client.ask(body(PROMPTS[0], max_tokens=TOKENS)).status_code == 200)
