"""Servers for tests: one in a process of its own, one in a thread; and a second process that moves aliases.

python -m tests.http.running serve HOME PORT    announces itself as `luthier serve --json` does
python -m tests.http.running flip HOME STOP     until STOP exists; a line a move: before, after, digest
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[2]
PAUSE_S = 0.25


@dataclass(frozen=True)
class Client:
    """How to talk to a running server."""

    url: str
    key: str

    def open(self, timeout: float = 60) -> httpx.Client:
        headers = {"authorization": f"Bearer {self.key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=timeout, verify=False)  # plain HTTP

    def ask(self, body: object) -> httpx.Response:
        with self.open() as client:
            return client.post("/v1/chat/completions", json=body)


def body(prompt: str, **more: Any) -> dict[str, Any]:
    return {"model": "guard", "messages": [{"role": "user", "content": prompt}], **more}


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "tests.http.running", *map(str, words)]


def spawn(home: Path, port: int = 0) -> tuple[subprocess.Popen[str], Client]:
    """A server in its own process, ready to answer."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    said = home / "server.stderr"
    with open(said, "a", encoding="utf-8") as errors:
        process = subprocess.Popen(
            command("serve", home, port),
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise AssertionError(said.read_text("utf-8")[-3000:])
    ready = json.loads(line)
    return process, Client(ready["url"], ready["key"])


@contextmanager
def threaded(store: Any, home: Any, **door: Any) -> Iterator[Client]:
    """A server in a thread of this process; stopped at the end."""
    from luthier.http.server import Door, serve

    chosen = Door(port=0, key="a test key", threads=1, **door)
    ready: list[dict[str, Any]] = []
    announced = threading.Event()

    def announce(said: dict[str, Any]) -> None:
        ready.append(said)
        announced.set()

    thread = threading.Thread(target=serve, args=(store, home, chosen, announce))
    thread.start()
    assert announced.wait(30)
    try:
        yield Client(ready[0]["url"], ready[0]["key"])
    finally:
        chosen.stop.set()
        thread.join(30)
        assert not thread.is_alive()


def _serve(home: str, port: str) -> None:
    from luthier import http

    key = "the same key after a restart"
    http.serve(home=home, port=int(port), key=key, announce=lambda said: print(json.dumps(said), flush=True))


def _flip(home: str, stop: str) -> None:
    from luthier.store import Store

    store = Store.open(Path(home))
    digests = sorted(record.digest for record in store.releases("guard"))
    others = itertools.cycle(digests)
    while not Path(stop).exists():
        now = store.resolve("guard", "production")
        digest = next(one for one in others if one != now)
        before = time.monotonic()
        store.move_ref("guard", "production", digest, expected=now, actor="flip", reason="test")
        print(json.dumps([before, time.monotonic(), digest]), flush=True)
        time.sleep(PAUSE_S)


if __name__ == "__main__":
    {"serve": _serve, "flip": _flip}[sys.argv[1]](*sys.argv[2:])
