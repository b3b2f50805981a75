"""Canary, shadow and known answers through the real commands: two shells, one server, its HTTP clients."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.e2e.world import LUTHIER
from tests.http.running import ROOT, Client, body
from tests.serving.make_home import PROMPTS, TOKENS, World, make_home

USERS = 200
WAIT_S = 60


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_home(tmp_path_factory.mktemp("traffic"))


@pytest.fixture(scope="module")
def client(world: World) -> Iterator[Client]:
    words = ["serve", "--home", str(world.home.path), "--port", "0", "--workers", "0", "--cache", "64"]
    with open(world.home.path / "server.stderr", "w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [*LUTHIER, *words, "--json"], cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
    assert process.stdout is not None
    ready = json.loads(process.stdout.readline())
    yield Client(ready["url"], ready["key"])
    process.terminate()
    assert process.wait(WAIT_S) == 0


def luthier(world: World, *words: str) -> Any:
    command = [*LUTHIER, *words, "--home", str(world.home.path), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def ask(world: World, http: httpx.Client, prompt: str, user: str) -> tuple[str, str]:
    """Which release answered, and whether it was known; the answer is that release's own."""
    response = http.post("/v1/chat/completions", json=body(prompt, max_tokens=TOKENS, user=user))
    assert response.status_code == 200, response.text
    release = response.headers["x-luthier-release"]
    said = response.json()["choices"][0]["message"]["content"]
    assert said == world.answers[release, prompt].text
    return release, response.headers["x-luthier-cache"]


def test_a_canary_meets_its_share_of_users_is_promoted_and_a_shadow_is_never_seen(
    world: World, client: Client
) -> None:
    champion, challenger, third = world.releases
    users = [f"user {n}" for n in range(USERS)]
    with client.open() as http:
        assert [ask(world, http, PROMPTS[1], "x") for _ in range(2)] == [
            (champion, "miss"),
            (champion, "hit"),
        ]
        luthier(world, "canary", "guard", "--to", challenger, "--percent", "25")
        met = {user: ask(world, http, PROMPTS[0], user)[0] for user in users}
        share = sum(release == challenger for release in met.values()) / USERS
        assert set(met.values()) == {champion, challenger} and 0.13 < share < 0.37
        assert all(ask(world, http, PROMPTS[0], user) == (met[user], "hit") for user in users)
        luthier(world, "canary", "guard", "--finish")
        assert [ask(world, http, PROMPTS[1], "x") for _ in range(2)] == [
            (challenger, "miss"),
            (challenger, "hit"),
        ]
        luthier(world, "shadow", "guard", "--to", third, "--percent", "100")
        assert ask(world, http, PROMPTS[2], "x") == (challenger, "miss")
        assert {ask(world, http, PROMPTS[2], user) for user in users[:20]} == {(challenger, "hit")}
    deadline = time.monotonic() + WAIT_S
    while (figures := luthier(world, "shadow", "guard")["figures"])["answers"] != 1:
        assert time.monotonic() < deadline, figures
        time.sleep(0.2)
    same = world.answers[challenger, PROMPTS[2]].tokens == world.answers[third, PROMPTS[2]].tokens
    assert figures["same"] == int(same) and figures["errors"] == 0
    while challenger not in (seen := {record.release for record in world.store.requests()}):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert third not in seen
