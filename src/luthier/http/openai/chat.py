"""POST /v1/chat/completions: the shapes of its answers, whole or in a stream, and its route.

Source: https://platform.openai.com/docs/api-reference/chat. A call is told in a stream once it is whole, as
two deltas: its id and name, then its arguments.
It does not know what a request may say (`http/chat.py`), nor how answers grow.
"""

from __future__ import annotations

import time
import uuid
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from starlette.responses import JSONResponse

from luthier.http import chat
from luthier.http.chat import Asked, ChatRequest
from luthier.http.exchange import Exchange
from luthier.http.openai.answering import Note, Telling, Usage, respond
from luthier.rows import Call
from luthier.serving.router import Target
from luthier.serving.service import Service, Voice
from luthier.serving.worker import Ask, End, Heard, Read, Said
from luthier.tool_calls import Listener

SCHEMA = ChatRequest.model_json_schema()
BODY = {"requestBody": {"required": True, "content": {"application/json": {"schema": SCHEMA}}}}


def routes(service: Service, note: Note) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions", openapi_extra=BODY, response_class=JSONResponse)
    async def completions(request: Request) -> Response:
        """Go on with a conversation. Differs from OpenAI: greedy (temperature 0) unless a temperature is
        given; audio, predictions and web search are refused."""

        async def begin(exchange: Exchange) -> Telling:
            asked = chat.parse(await exchange.body(service.limits.body_bytes))
            target = await exchange.find(service, asked.model, asked.user)

            def prepare(target: Target) -> Ask:
                return service.prepare(target, asked.messages, asked.options, exchange.turn)

            ask = await run_in_threadpool(prepare, target)
            voice = await run_in_threadpool(service.voice, target)
            exchange.begin(service, [ask], asked.n, prepare if asked.n == 1 else None)
            return Answers(asked, target.release_digest, voice, ask.prompt_ids)

        return await respond(request, note, begin)

    return router


class Choice:
    """One answer as it grows."""

    def __init__(self, asked: Asked, voice: Voice) -> None:
        self._asked, self._voice = asked, voice
        tools = asked.options.tools
        names = [tool["function"]["name"] for tool in tools]
        self._listener = Listener(voice.convention, names, asked.must) if tools else None
        self._told: list[dict[str, Any]] = []  # log-probabilities that no chunk has told yet
        self._ids: list[int] = []
        self._untold = 0
        self.text = ""
        self.calls: list[Call] = []
        self.logprobs: list[dict[str, Any]] = []
        self.reason = ""

    @property
    def ids(self) -> list[int]:
        return self._ids

    def hear(self, event: Heard) -> list[dict[str, Any]]:
        """The deltas that this event makes certain."""
        if isinstance(event, Said):
            self._ids.append(event.token)
            if event.logp is not None and event.token not in self._voice.stop_ids:
                entry = _entry(self._voice, event.token, event.logp)
                entry["top_logprobs"] = [_entry(self._voice, *one) for one in event.top]
                self._told.append(entry)
                self.logprobs.append(entry)
        if self._listener is None:
            parts: list[str | Call] = [event.text] if event.text else []
        else:
            parts = self._listener.hear(event.text)
            parts += self._listener.close() if isinstance(event, End) else []
        deltas = [delta for part in parts for delta in self._delta(part)]
        if isinstance(event, End):
            self.reason = "tool_calls" if self.calls and not self._asked.named else event.reason.value
        return deltas

    def _delta(self, part: str | Call) -> list[dict[str, Any]]:
        if isinstance(part, str):
            self.text += part
            return [{"content": part}]
        if self._asked.one and self.calls:
            return []
        self.calls.append(part)
        at = len(self.calls) - 1
        opened = {"index": at, "id": part.id, "type": "function"}
        return [
            {"tool_calls": [opened | {"function": {"name": part.name, "arguments": ""}}]},
            {"tool_calls": [{"index": at, "function": {"arguments": part.arguments}}]},
        ]

    def untold(self) -> tuple[dict[str, Any] | None, list[int]]:
        """Log-probabilities and tokens since the last chunk."""
        told, self._told = self._told, []
        ids, self._untold = self._ids[self._untold :], len(self._ids)
        return ({"content": told, "refusal": None} if told else None), ids

    def whole(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self.text, "refusal": None}
        if self.calls:
            message["content"] = self.text or None
            message["tool_calls"] = [
                {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
                for c in self.calls
            ]
        return message


class Answers:
    """All choices of one request (a `Telling`)."""

    def __init__(self, asked: Asked, release: str, voice: Voice, prompt_ids: tuple[int, ...]) -> None:
        self.stream, self.include_usage = asked.stream, asked.include_usage
        self._asked, self._release, self._prompt_ids = asked, release, prompt_ids
        self._choices = [Choice(asked, voice) for _ in range(asked.n)]
        self._id, self._created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())

    def opening(self) -> list[dict[str, Any]]:
        first = {"role": "assistant", "content": ""}
        chunks = [self._chunk(n, first) for n in range(len(self._choices))]
        if self._asked.token_ids:
            chunks[0]["prompt_token_ids"] = list(self._prompt_ids)
        return chunks

    def heard(self, n: int, event: Heard) -> list[dict[str, Any]]:
        if isinstance(event, Read):
            return []
        choice = self._choices[n]
        chunks = [self._chunk(n, delta) for delta in choice.hear(event)]
        if isinstance(event, End):
            chunks.append(self._chunk(n, {}, choice.reason))
        if chunks and self.stream:
            logprobs, ids = choice.untold()
            chunks[0]["choices"][0]["logprobs"] = logprobs
            if self._asked.token_ids:
                chunks[0]["choices"][0]["token_ids"] = ids
        return chunks

    def counts(self, usage: Usage) -> dict[str, Any]:
        return self._head("chat.completion.chunk") | {"choices": [], "usage": usage.as_dict()}

    def whole(self, usage: Usage) -> dict[str, Any]:
        choices = []
        for n, choice in enumerate(self._choices):
            asked = self._asked.options.logprobs is not None
            told = {"content": choice.logprobs, "refusal": None} if asked else None
            body: dict[str, Any] = {"index": n, "message": choice.whole(), "logprobs": told}
            body["finish_reason"] = choice.reason
            choices.append(body | ({"token_ids": choice.ids} if self._asked.token_ids else {}))
        body = self._head("chat.completion") | {"choices": choices, "usage": usage.as_dict()}
        return body | ({"prompt_token_ids": list(self._prompt_ids)} if self._asked.token_ids else {})

    def _chunk(self, n: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": n, "delta": delta, "logprobs": None, "finish_reason": reason}
        body = self._head("chat.completion.chunk") | {"choices": [choice]}
        return body | {"usage": None} if self.include_usage else body

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._asked.model,
            "system_fingerprint": f"luthier-{self._release[:12]}",
        }


def _entry(voice: Voice, token: int, logp: float) -> dict[str, Any]:
    text, held = voice.spelt(token)
    return {"token": text, "logprob": max(logp, -9999.0), "bytes": held}
