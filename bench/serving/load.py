"""The load: chat requests in OpenAI's form against one server on this machine, and when every token came.

    python bench/serving/load.py JOB.json

JOB says {"url", "key", "requests": [{"model", "prompt", "max_tokens", "at_s", "more"}], "streams"}. With
`streams` so many clients each ask for the next request as soon as their last one is answered (closed loop);
without it every request is sent at its own `at_s`, answered or not (open loop), so a slow server cannot slow
its load down. Answers go on to `max_tokens` (`ignore_eos`). One JSON line comes out: for each request its
seconds to the first token, between tokens and in all, and its token counts as the server states them.

Standard library only, one process, bounded by the number of requests; it refuses any address but loopback.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

LOOPBACK = ("127.0.0.1", "localhost", "::1")
LIMIT_S = 600.0  # for one request


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    if urlsplit(job["url"]).hostname not in LOOPBACK:
        raise SystemExit("this load is for a server on this machine")
    print(json.dumps(asyncio.run(drive(job))))


async def drive(job: dict[str, Any]) -> dict[str, Any]:
    """All requests; the seconds from the first one's beginning to the last one's end."""
    began = time.perf_counter()
    requests = list(enumerate(job["requests"]))
    found: list[dict[str, Any]] = [{} for _ in requests]

    async def one(number: int, request: dict[str, Any]) -> None:
        try:
            found[number] = await asyncio.wait_for(ask(job, request), LIMIT_S)
        except (OSError, ValueError, TimeoutError, asyncio.IncompleteReadError) as error:
            found[number] = {"failed": f"{type(error).__name__}: {error}"}

    async def client() -> None:
        while requests:
            await one(*requests.pop(0))

    async def timed(number: int, request: dict[str, Any]) -> None:
        await asyncio.sleep(max(0.0, began + request["at_s"] - time.perf_counter()))
        await one(number, request)

    if job.get("streams"):
        await asyncio.gather(*(client() for _ in range(job["streams"])))
    else:
        await asyncio.gather(*(timed(*entry) for entry in requests))
    return {"seconds": time.perf_counter() - began, "requests": found}


async def ask(job: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    place = urlsplit(job["url"])
    body = json.dumps(
        {
            "model": request["model"], "messages": [{"role": "user", "content": request["prompt"]}],
            "max_tokens": request["max_tokens"], "temperature": 0, "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True}, **request.get("more", {}),
        }
    ).encode()  # fmt: skip
    head = (
        f"POST {place.path}/v1/chat/completions HTTP/1.1\r\nhost: {place.netloc}\r\n"
        f"authorization: Bearer {job['key']}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    try:
        writer.write(head.encode() + body)
        return await _answer(reader, began)
    finally:
        writer.close()


async def _answer(reader: asyncio.StreamReader, began: float) -> dict[str, Any]:
    times: list[float] = []
    usage: dict[str, Any] = {}
    async for event in _events(reader):
        usage = event.get("usage") or usage
        choices = event.get("choices") or [{}]
        delta = choices[0].get("delta") or {}
        if delta.get("content"):
            times.append(time.perf_counter() - began)
    if not usage:
        raise ValueError("the stream ended without its token counts")
    return {
        "first_s": times[0] if times else None,
        "gaps_s": [round(b - a, 5) for a, b in pairwise(times)],
        "total_s": time.perf_counter() - began,
        "prompt_tokens": usage["prompt_tokens"],
        "completion_tokens": usage["completion_tokens"],
    }


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """The JSON of each server-sent event (RFC 9112 chunks taken apart first)."""
    status = (await reader.readline()).split(b" ", 2)
    chunked = False
    while (line := await reader.readline()).strip():
        chunked = chunked or line.lower().startswith(b"transfer-encoding: chunked")
    if status[1] != b"200":
        raise ValueError(f"status {status[1].decode()}: {(await reader.read(500)).decode(errors='replace')}")
    rest = b""
    async for piece in _pieces(reader, chunked):
        *lines, rest = (rest + piece).split(b"\n")
        for data in (line[5:].strip() for line in lines if line.startswith(b"data:")):
            if data == b"[DONE]":
                return
            event = json.loads(data)
            if "error" in event:
                raise ValueError(f"error in the stream: {event['error']}")
            yield event


async def _pieces(reader: asyncio.StreamReader, chunked: bool) -> AsyncIterator[bytes]:
    while not chunked:
        piece = await reader.read(65536)
        if not piece:
            return
        yield piece
    while size := int((await reader.readline()).split(b";")[0], 16):
        yield await reader.readexactly(size)
        await reader.readline()


if __name__ == "__main__":
    main()
