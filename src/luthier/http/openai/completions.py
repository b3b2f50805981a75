"""POST /v1/completions: a document goes on, or is only scored; as text or as tokens, one or many at once.

Source: https://platform.openai.com/docs/api-reference/completions. With `echo` the document comes back before
the answer, and with `logprobs` its own log-probabilities, which is what lm-evaluation-harness measures with
(`local-completions`); `max_tokens` 0 then asks for nothing more. Text never holds control tokens here, as in
a chat; who wants them gives token ids. `best_of` and `suffix` are refused. It does not know conversations.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import Field
from starlette.responses import JSONResponse

from luthier.http.chat import Spoken, read
from luthier.http.exchange import Exchange
from luthier.http.openai.answering import Note, Telling, Usage, respond, within
from luthier.http.problems import RequestError
from luthier.serving import limits
from luthier.serving.service import Service, Voice
from luthier.serving.worker import Ask, End, Heard, Read, Said

UNSUPPORTED: dict[str, tuple[object, ...]] = {"best_of": (1,), "suffix": ("",)}
DEFAULT_TOKENS = 16
Ids = Annotated[list[int], Field(min_length=1)]
Texts = Annotated[list[str], Field(min_length=1, max_length=limits.PROMPTS)]
Many = Annotated[list[Ids], Field(min_length=1, max_length=limits.PROMPTS)]


class CompletionRequest(Spoken):
    """Ask a model to go on with a document. Greedy (temperature 0) unless a temperature is given."""

    prompt: str | Texts | Ids | Many
    max_tokens: int | None = Field(default=None, ge=0, description="default 16; 0 only with `echo`")
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=5, description="how many of the likeliest tokens")

    @property
    def prompts(self) -> list[str | list[int]]:
        given: Any = self.prompt
        if isinstance(given, str) or isinstance(given[0], int):
            return [given]
        return list(given)


SCHEMA = CompletionRequest.model_json_schema()
BODY = {"requestBody": {"required": True, "content": {"application/json": {"schema": SCHEMA}}}}


def routes(service: Service, note: Note) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions", openapi_extra=BODY, response_class=JSONResponse)
    async def completions(request: Request) -> Response:
        """Go on with a document, or score it. Differs from OpenAI: greedy unless a temperature is given."""

        async def begin(exchange: Exchange) -> Telling:
            given = parse(await exchange.body(service.limits.body_bytes))
            target = await exchange.find(service, given.model, given.user)
            options = given.options(DEFAULT_TOKENS if given.max_tokens is None else given.max_tokens)
            scored = bool(given.echo) and given.logprobs is not None
            options = replace(options, logprobs=given.logprobs, score_prompt=scored)

            def prepare() -> list[Ask]:
                turn = exchange.turn
                asks = (service.prepare_text(target, prompt, options, turn) for prompt in given.prompts)
                return within(limits.PROMPTS_TOKENS, asks, "prompt", given.n or 1)

            asks = await run_in_threadpool(prepare)
            voice = await run_in_threadpool(service.voice, target)
            answers = await run_in_threadpool(Answers, given, target.release_digest, voice, asks)
            exchange.feed(service, asks, given.n or 1)
            return answers

        return await respond(request, note, begin)

    return router


def parse(data: bytes) -> CompletionRequest:
    given = read(CompletionRequest, data, UNSUPPORTED)
    if given.max_tokens == 0 and not given.echo:
        raise RequestError("`max_tokens` of 0 asks for nothing without `echo`", param="max_tokens")
    if len(given.prompts) * (given.n or 1) > limits.PROMPTS:
        raise RequestError(f"more than {limits.PROMPTS} answers", param="n")
    if any(not prompt for prompt in given.prompts):
        raise RequestError("a prompt is empty", param="prompt")
    return given


@dataclass
class Told:
    """Log-probabilities in this route's own form: lists side by side, and where each token's text begins."""

    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)

    def add(self, voice: Voice, token: int, logp: float | None, top: Sequence[tuple[int, float]]) -> None:
        text, _ = voice.spelt(token)
        last = self.text_offset[-1] + len(self.tokens[-1]) if self.tokens else 0
        self.tokens.append(text)
        self.token_logprobs.append(logp)
        likeliest: dict[str, float] = {}
        for one, its in top if logp is not None else ():
            likeliest.setdefault(voice.spelt(one)[0], its)  # two tokens may look alike; the likelier is told
        if logp is not None:
            likeliest.setdefault(text, logp)
        self.top_logprobs.append(None if logp is None else likeliest)
        self.text_offset.append(last)

    def since(self, start: int) -> dict[str, Any]:
        return {
            "tokens": self.tokens[start:],
            "token_logprobs": self.token_logprobs[start:],
            "top_logprobs": self.top_logprobs[start:],
            "text_offset": self.text_offset[start:],
        }


@dataclass
class Choice:
    """One answer as it grows, the echoed document before it."""

    text: str
    told: Told
    ids: list[int] = field(default_factory=list)
    reason: str = ""
    sent: int = 0  # log-probabilities that a chunk has told already
    told_ids: int = 0  # tokens that a chunk has told already


class Answers:
    """All choices of one request (a `Telling`), prompt by prompt."""

    def __init__(self, given: CompletionRequest, release: str, voice: Voice, asks: Sequence[Ask]) -> None:
        self.stream, self.include_usage = bool(given.stream), given.usage
        self._given, self._release, self._voice, self._asks = given, release, voice, asks
        self._scored = given.logprobs is not None
        self._copies = given.n or 1
        self._id, self._created = f"cmpl-{uuid.uuid4().hex}", int(time.time())
        echoes = [self._echo(n) for n in range(len(asks))]
        self._choices = [Choice(text, Told()) for text in echoes for _ in range(self._copies)]

    def _echo(self, n: int) -> str:
        if not self._given.echo:
            return ""
        prompt = self._given.prompts[n]
        if isinstance(prompt, str):
            return prompt
        held = b"".join(bytes(self._voice.spelt(token)[1]) for token in prompt)
        return held.decode("utf-8", "replace")

    def opening(self) -> list[dict[str, Any]]:
        if not self._given.echo:
            return []
        return [self._chunk(n, choice.text) for n, choice in enumerate(self._choices)]

    def heard(self, n: int, event: Heard) -> list[dict[str, Any]]:
        choice = self._choices[n]
        if isinstance(event, Read):
            ids = self._asks[n // self._copies].prompt_ids
            for at, (token, logp) in enumerate(zip(ids, event.logps, strict=True)):
                choice.told.add(self._voice, token, logp, event.tops[at] if event.tops else ())
            return []
        if isinstance(event, Said):
            choice.ids.append(event.token)
            if event.logp is not None:  # the stop token's too: a scorer counts on one token more
                choice.told.add(self._voice, event.token, event.logp, event.top)
        choice.text += event.text
        if isinstance(event, End):
            choice.reason = event.reason.value
            return [self._chunk(n, event.text, choice.reason)]
        return [self._chunk(n, event.text)] if event.text or self._given.return_token_ids else []

    def counts(self, usage: Usage) -> dict[str, Any]:
        return self._head() | {"choices": [], "usage": usage.as_dict()}

    def whole(self, usage: Usage) -> dict[str, Any]:
        choices = []
        for n, choice in enumerate(self._choices):
            told = choice.told.since(0) if self._scored else None
            body: dict[str, Any] = {"index": n, "text": choice.text, "logprobs": told}
            body["finish_reason"] = choice.reason
            if self._given.return_token_ids:
                body["prompt_token_ids"] = list(self._asks[n // self._copies].prompt_ids)
                body["token_ids"] = choice.ids
            choices.append(body)
        return self._head() | {"choices": choices, "usage": usage.as_dict()}

    def _chunk(self, n: int, text: str, reason: str | None = None) -> dict[str, Any]:
        choice = self._choices[n]
        told = choice.told.since(choice.sent) if self._scored else None
        choice.sent = len(choice.told.tokens)
        body = {"index": n, "text": text, "logprobs": told, "finish_reason": reason}
        if self._given.return_token_ids:
            body["token_ids"], choice.told_ids = choice.ids[choice.told_ids :], len(choice.ids)
        found = self._head() | {"choices": [body]}
        return found | {"usage": None} if self.include_usage else found

    def _head(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._given.model,
            "system_fingerprint": f"luthier-{self._release[:12]}",
        }
