"""Ten times too much for a minute: what becomes of those let in, of those refused, and of the server.

    python bench/overload.py RESULT.json --base FOLDER [--seconds 60] [--normal 0.7] [--factor 10]

Starts `luthier serve` over the base on loopback, then, each request a stream with a prompt of its own:

    capacity   as many clients as answers grow at once, each asking again when answered: requests a second
    normal     requests arrive by a Poisson process at `--normal` times that rate, answered or not
    overload   the same at `--factor` times that rate
    recovery   from the end of the overload's last arrival on, one request after another until one is let in
               and is as quick as 99 of 100 normal ones are

The result has the phases' first-token times, what refused requests got and after how long, the memory of
the server and of its engine at the start and end of each phase, and the processor time that server, engine
and load took in it. Load and server share the machine, so the load is one process on bare sockets, and its
own lateness is told beside its figures. Bounded: `MOST` requests, `LIMIT_S` each; no address but loopback.
It does not judge: the thresholds belong to whoever reads the result.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from run import keep, machine

LOOPBACK = ("127.0.0.1", "localhost", "::1")
CLIENTS = 16
MOST, LIMIT_S, READY_S = 12_000, 120.0, 300.0

Job = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--normal-seconds", type=float, default=None, help="default: as long as the overload")
    parser.add_argument("--normal", type=float, default=0.7)
    parser.add_argument("--factor", type=float, default=10.0)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="overload-") as scratch:
        process = start(asked.base.absolute(), Path(scratch), asked.threads)
        try:
            assert process.stdout is not None
            job = json.loads(process.stdout.readline())
            if urlsplit(job["url"]).hostname not in LOOPBACK:
                raise SystemExit("this load is for a server on this machine")
            found = asyncio.run(phases(job, asked, process.pid))
        finally:
            process.terminate()
            process.wait(60)
    settings = {name: value for name, value in vars(asked).items() if name not in ("result", "base")}
    settings |= {"model": job["model"]}
    keep(asked.result, {"settings": settings, "machine": machine(), **found})
    print(json.dumps(found, indent=1))


def start(base: Path, scratch: Path, threads: int) -> subprocess.Popen[str]:
    words = ["serve", "--base", str(base), "--home", str(scratch / "home"), "--port", "0", "--workers", "0"]
    with open(scratch / "log", "w", encoding="utf-8") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "luthier.cli", *words, "--json"],
            stdout=subprocess.PIPE, stderr=log, text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip


async def phases(job: Job, asked: argparse.Namespace, pid: int) -> dict[str, Any]:
    await ask(job, "warm up", 8)
    await capacity(job, asked.tokens, 3.0)  # what is made ready at the first use is made ready here
    rate = await capacity(job, asked.tokens, min(15.0, asked.seconds))
    if rate * asked.factor * asked.seconds > MOST:
        raise SystemExit(f"{rate:.1f} answers a second are too many for {MOST} requests: raise --tokens")
    await quiet(job)
    spans = [Span.now(pid)]
    normal = await arrive(job, rate * asked.normal, asked.normal_seconds or asked.seconds, asked.tokens)
    spans.append(Span.now(pid))
    await quiet(job)
    first_p99_s = spread(firsts(normal))["p99"]
    spans.append(Span.now(pid))
    sent = time.perf_counter()
    requests = asyncio.create_task(arrive(job, rate * asked.factor, asked.seconds, asked.tokens))
    await asyncio.sleep(max(0.0, sent + asked.seconds - time.perf_counter()))
    spans.append(Span.now(pid))
    recovery_s = await recovery(job, first_p99_s)
    overload = await requests
    await quiet(job)
    return {
        "capacity_per_s": round(rate, 3),
        "normal": summary(normal) | spans[0].until(spans[1]),
        "overload": summary(overload) | spans[2].until(spans[3]),
        "recovery_s": recovery_s,
        "first_p99_ratio": ratio(spread(firsts(overload))["p99"], first_p99_s),
        "rss_bytes_after": Span.now(pid).rss_bytes,
    }


@dataclass(frozen=True)
class Span:
    """A moment: memory, and processor seconds so far, of server, engine and load."""

    at_s: float
    rss_bytes: dict[str, int]
    cpu_s: dict[str, float]

    @classmethod
    def now(cls, pid: int) -> Span:
        places = {"server": pid, "engine": children(pid)[0], "load": os.getpid()}
        memory = {name: rss_bytes(place) for name, place in places.items() if name != "load"}
        return cls(time.perf_counter(), memory, {name: cpu_s(place) for name, place in places.items()})

    def until(self, end: Span) -> dict[str, Any]:
        seconds = end.at_s - self.at_s
        shares = {name: round((end.cpu_s[name] - was) / seconds, 4) for name, was in self.cpu_s.items()}
        return {
            "seconds": round(seconds, 2), "cores_used": shares,
            "rss_bytes": {"start": self.rss_bytes, "end": end.rss_bytes},
        }  # fmt: skip


async def capacity(job: Job, tokens: int, seconds: float) -> float:
    """Answers a second with every place taken."""
    began, done = time.perf_counter(), 0

    async def client() -> None:
        nonlocal done
        while time.perf_counter() - began < seconds:
            found = await ask(job, prompt(), tokens)
            done += found["status"] == 200  # never across an await: others count meanwhile
            if found["status"] != 200:
                await asyncio.sleep(0.05)

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return done / (time.perf_counter() - began)


async def arrive(job: Job, rate_per_s: float, seconds: float, tokens: int) -> list[dict[str, Any]]:
    """Requests by a Poisson process, each sent at its own time whatever became of the others."""
    draw, at_s, began = random.Random(11), 0.0, time.perf_counter()

    async def one(at_s: float) -> dict[str, Any]:
        await asyncio.sleep(max(0.0, began + at_s - time.perf_counter()))
        late_s = time.perf_counter() - began - at_s
        return {**await ask(job, prompt(), tokens), "late_s": late_s}

    times = []
    while (at_s := at_s + draw.expovariate(rate_per_s)) < seconds and len(times) < MOST:
        times.append(at_s)
    return await asyncio.gather(*map(one, times))


async def recovery(job: Job, first_s: float | None) -> float | None:
    """Seconds until a request is let in and is as quick as the normal ones were; None if never."""
    began = time.perf_counter()
    while time.perf_counter() - began < LIMIT_S:
        found = await ask(job, prompt(), 4)
        if found["status"] == 200 and found["first_s"] <= (first_s or 0.0):
            return round(time.perf_counter() - began, 3)
        await asyncio.sleep(0.1)
    return None


async def quiet(job: Job) -> None:
    """Wait until nothing is under way."""
    for _ in range(int(LIMIT_S)):
        page = (await ask(job, "", 0, path="/metrics"))["text"]
        if "luthier_in_flight 0.0" in page and "luthier_queue 0.0" in page:
            return
        await asyncio.sleep(1.0)


def prompt() -> str:
    """Never the same: no answer is owed to a prefix that is known."""
    return f"{random.getrandbits(64):x} Say what a luthier does, from the wood to the last string."


async def ask(job: Job, said: str, tokens: int, path: str = "/v1/chat/completions") -> dict[str, Any]:
    """One request, to its end: status, seconds to the first token and in all, Retry-After, the text."""
    began = time.perf_counter()
    found: dict[str, Any] = {"status": 0, "first_s": None, "retry_after": None, "text": "", "ended": False}
    try:
        async with asyncio.timeout(LIMIT_S):
            await _ask(job, said, tokens, path, found, began)
    except (OSError, ValueError, TimeoutError) as error:
        found |= {"status": 0, "failed": f"{type(error).__name__}: {error}"}
    return found | {"total_s": time.perf_counter() - began}


async def _ask(job: Job, said: str, tokens: int, path: str, found: dict[str, Any], began: float) -> None:
    place = urlsplit(job["url"])
    plain = {
        "model": job["model"], "messages": [{"role": "user", "content": said}], "max_tokens": tokens,
        "stream": True, **job.get("more", {"ignore_eos": True}),
    }  # fmt: skip
    body = json.dumps(plain).encode() if tokens else b""
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    try:
        head = (
            f"{'POST' if tokens else 'GET'} {path} HTTP/1.1\r\nhost: {place.netloc}\r\n"
            f"authorization: Bearer {job['key']}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        writer.write(head.encode() + body)
        found["status"] = int((await reader.readline()).split(b" ")[1])
        while line := (await reader.readline()).strip().lower():
            if line.startswith(b"retry-after:"):
                found["retry_after"] = line.split(b":")[1].strip().decode()
        if found["status"] != 200:
            return
        async for line in reader:
            if not tokens:
                found["text"] += line.decode()
            elif line.startswith(b"data: ") and found["status"] == 200:
                _hear(line[6:].strip(), found, began)
    finally:
        writer.close()


def _hear(data: bytes, found: dict[str, Any], began: float) -> None:
    if data == b"[DONE]":
        found["ended"] = True
        return
    event = json.loads(data)
    if "error" in event:
        raise ValueError(f"error in the stream: {event['error']['message']}")
    for choice in event["choices"]:
        text = choice["delta"].get("content")
        if text and found["first_s"] is None:
            found["first_s"] = time.perf_counter() - began
        found["text"] += text or ""


def firsts(requests: list[dict[str, Any]]) -> list[float]:
    """Seconds to the first token of those that were answered to their end."""
    whole = [found for found in requests if found["status"] == 200 and found["ended"]]
    return [found["first_s"] for found in whole if found["first_s"] is not None]


def summary(requests: list[dict[str, Any]]) -> dict[str, Any]:
    accepted = [found for found in requests if found["status"] == 200 and found["ended"]]
    refused = [found for found in requests if found["status"] == 429]
    statuses: dict[str, int] = {}
    for found in requests:
        name = str(found["status"]) if "failed" not in found else found["failed"].split(":")[0]
        statuses[name] = statuses.get(name, 0) + 1
    waits = [int(found["retry_after"]) for found in refused if found["retry_after"] is not None]
    return {
        "requests": len(requests), "statuses": statuses,
        "first_s": spread(firsts(requests)),
        "total_s": spread([found["total_s"] for found in accepted]),
        "refused_s": spread([found["total_s"] for found in refused]),
        "refused_without_retry_after": len(refused) - len(waits),
        "retry_after_s": {"least": min(waits, default=None), "most": max(waits, default=None)},
        "load_late_s": spread([found["late_s"] for found in requests]),
    }  # fmt: skip


def spread(seconds: list[float]) -> dict[str, float | None]:
    ordered = sorted(seconds)
    at = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "most": 1.0}
    return {
        name: round(ordered[min(len(ordered) - 1, int(part * len(ordered)))], 4) if ordered else None
        for name, part in at.items()
    }


def ratio(a: float | None, b: float | None) -> float | None:
    return round(a / b, 3) if a is not None and b else None


def rss_bytes(pid: int) -> int:
    """The memory of a process now."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cpu_s(pid: int) -> float:
    """Processor seconds of a process so far, by its `utime` and `stime` (proc_pid_stat(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


if __name__ == "__main__":
    main()
