"""POST /v1/embeddings: a vector for each text, the mean of a model's last hidden states at unit length.

Source: https://platform.openai.com/docs/api-reference/embeddings. The models here are trained to go on, not
to embed: their vectors rank likeness of wording more than of sense. Their first values alone mean nothing, so
`dimensions` may only be the vector's own length. It does not know how hidden states are read.
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import Field
from starlette.responses import JSONResponse

from luthier.http.chat import Given, read
from luthier.http.exchange import Exchange
from luthier.http.openai.answering import Note, Telling, Usage, respond, within
from luthier.http.problems import RequestError
from luthier.serving import limits
from luthier.serving.service import Options, Service
from luthier.serving.worker import Ask, Heard, Pooled

Ids = Annotated[list[int], Field(min_length=1)]
Texts = Annotated[list[str], Field(min_length=1, max_length=limits.INPUTS)]
Many = Annotated[list[Ids], Field(min_length=1, max_length=limits.INPUTS)]


class EmbeddingRequest(Given):
    """Ask for the vectors of texts, given as such or as token ids."""

    model: str = Field(min_length=1, max_length=256)
    input: str | Texts | Ids | Many
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(default=None, ge=1, description="only the vector's own length")
    user: str | None = Field(default=None, max_length=256, description="stays on one side of a canary")

    @property
    def inputs(self) -> list[str | list[int]]:
        given: Any = self.input
        if isinstance(given, str) or isinstance(given[0], int):
            return [given]
        return list(given)


SCHEMA = EmbeddingRequest.model_json_schema()
BODY = {"requestBody": {"required": True, "content": {"application/json": {"schema": SCHEMA}}}}


def routes(service: Service, note: Note) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/embeddings", openapi_extra=BODY, response_class=JSONResponse)
    async def embeddings(request: Request) -> Response:
        """The vectors of texts: mean hidden states of the model, at unit length."""

        async def begin(exchange: Exchange) -> Telling:
            given = read(EmbeddingRequest, await exchange.body(service.limits.body_bytes), {})
            if any(not text for text in given.inputs):
                raise RequestError("an input is empty", param="input")
            target = await exchange.find(service, given.model, given.user)

            def prepare() -> list[Ask]:
                turn = exchange.turn
                asks = (service.prepare_text(target, text, EMBED, turn) for text in given.inputs)
                return within(limits.INPUTS_TOKENS, asks, "input")

            exchange.feed(service, await run_in_threadpool(prepare))
            return Vectors(given)

        return await respond(request, note, begin)

    return router


EMBED = Options(max_tokens=0, embed=True)


class Vectors:
    """All vectors of one request (a `Telling` that is never streamed)."""

    stream = include_usage = False

    def __init__(self, given: EmbeddingRequest) -> None:
        self._given = given
        self._found: dict[int, list[float] | str] = {}

    def opening(self) -> list[dict[str, Any]]:
        return []

    def counts(self, usage: Usage) -> dict[str, Any]:
        return {}

    def heard(self, n: int, event: Heard) -> list[dict[str, Any]]:
        if isinstance(event, Pooled):
            size = len(event.values)
            if self._given.dimensions not in (None, size):
                raise RequestError(f"this model's vectors have {size} dimensions", param="dimensions")
            self._found[n] = self._written(_unit(event.values))
        return []

    def whole(self, usage: Usage) -> dict[str, Any]:
        data = [
            {"object": "embedding", "index": n, "embedding": vector}
            for n, vector in sorted(self._found.items())
        ]
        read = {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.prompt_tokens}
        return {"object": "list", "data": data, "model": self._given.model, "usage": read}

    def _written(self, vector: list[float]) -> list[float] | str:
        if self._given.encoding_format == "base64":  # little-endian float32, as OpenAI's client reads it
            return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode("ascii")
        return vector


def _unit(values: Sequence[float]) -> list[float]:
    length = math.sqrt(sum(value * value for value in values)) or 1.0
    return [value / length for value in values]
