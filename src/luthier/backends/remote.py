"""Remote: a server elsewhere. As an engine, one that takes token ids and tells them; as a judge, any.

Source: OpenAI's chat and completions API; vLLM's `return_token_ids`, which luthier's own server has too, so
a luthier without weights in memory can stand before one with them. A release is asked for by its name and
digest, so what answers is what the router chose, or nobody. `ask` gives a judge or a teacher from any chat
endpoint: `metrics/score_model` takes it.

The key stands in a variable of the environment; the recipe, the log and the errors name only the variable.
One host is spoken to, over https beyond this machine, and no redirect is followed. A chat endpoint that
takes no token ids is no engine here: its text would pass for a release that did not write it.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from pydantic import Field, field_validator

from luthier import plugins
from luthier.backends import _relay
from luthier.backends._http import Door, Reply, Unreachable, checked
from luthier.backends._relay import COMPLETIONS, Piece, Place, Relay, Unsupported
from luthier.errors import GraderError, ServeError
from luthier.home import Home
from luthier.metrics import Question
from luthier.serving.desk import Engine
from luthier.serving.limits import Limits
from luthier.serving.router import Target
from luthier.serving.worker import Ask

CHAT = "/v1/chat/completions"
PATHS = frozenset({COMPLETIONS, CHAT})
TRIES, PAUSE_S = 3, 30.0
AGAIN = {429, 503}


class Params(plugins.Params):
    url: str = Field(description="https://host, with or without /v1")
    key_env: str | None = Field(
        default=None, pattern=r"[A-Za-z_][A-Za-z0-9_]*", description="the variable that holds its key"
    )
    model: str | None = Field(default=None, description="the judge's name; an engine's models have their own")
    timeout_s: float = Field(default=120.0, gt=0, description="how long it may say nothing")

    @field_validator("url")
    @classmethod
    def _names_one_host(cls, url: str) -> str:
        return checked(url).removesuffix("/v1")


class NotAsked(GraderError):
    """The judge gave no answer at all."""

    flag = "model_grader_server_error"


def engine(params: Params, limits: Limits, home: Home) -> Engine:
    return Relay(Remote(params), limits, "remote")


def ask(params: Params) -> Callable[[Question], str]:
    """What puts a question to the endpoint's model and gives back its text; `NotAsked` says why not."""
    door = _door(params)

    def answer(question: Question) -> str:
        body: dict[str, Any] = {
            "model": params.model or question.model,
            "messages": [{"role": role, "content": text} for role, text in question.turns],
            "max_tokens": question.max_new_tokens,
            "temperature": question.temperature,
            "top_p": question.top_p,
        } | ({} if question.seed is None else {"seed": question.seed})
        try:
            return _text(_asked(door, body, question.within_s))
        except ServeError as error:
            raise NotAsked(error.what, where=error.where, hint=error.hint) from error

    return answer


class Remote:
    """Another server that has the same releases, and keeps them itself."""

    def __init__(self, params: Params) -> None:
        self._door = _door(params)

    @contextmanager
    def held(self, target: Target) -> Iterator[Place]:
        bare = target.adapter_digest is None
        yield Place(self._door, target.name if bare else f"{target.name}@{target.release_digest}")

    def asked(self, ask: Ask) -> dict[str, Any]:
        if ask.sampling.logprobs is not None:
            raise Unsupported(
                "the backend remote cannot tell log-probabilities", hint="embedded and vllm can"
            )
        return _relay.asked(ask) | {"ignore_eos": not ask.stop_ids}

    def told(self, reply: Reply, ask: Ask) -> Iterator[Piece]:
        return _relay.told(reply, ask.sampling.logprobs)

    def forget(self) -> None:
        """Nothing was brought there."""

    def close(self) -> None:
        """It has its own life."""


def _asked(door: Door, body: dict[str, Any], within_s: float | None) -> dict[str, Any]:
    """The answer, asked for again where the server is busy and says so; cut off after `within_s`."""
    until_s = time.monotonic() + within_s if within_s is not None else math.inf
    for last_try in (False,) * (TRIES - 1) + (True,):
        left_s = max(0.001, until_s - time.monotonic())
        with (
            _cut(left_s) as cut,
            replace(door, timeout_s=min(door.timeout_s, left_s)).call(CHAT, body, cut) as reply,
        ):
            if reply.status == 200:
                return reply.json()
            problem, wait_s = reply.problem(), min(PAUSE_S, reply.wait_s)
        if last_try or reply.status not in AGAIN or time.monotonic() + wait_s >= until_s:
            break
        time.sleep(wait_s)
    raise Unreachable(f"it does not answer ({problem})", where=door.url)


@contextmanager
def _cut(after_s: float) -> Iterator[Callable[[Callable[[], None]], None] | None]:
    """What a call is given so that it ends then, however it trickles; None where it need not end."""
    timers: list[threading.Timer] = []

    def begin(cut: Callable[[], None]) -> None:
        timers.append(threading.Timer(after_s, cut))
        timers[-1].daemon = True
        timers[-1].start()

    try:
        yield None if math.isinf(after_s) else begin
    finally:
        for timer in timers:
            timer.cancel()


def _text(answer: dict[str, Any]) -> str:
    choices = answer.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    message = first.get("message") if isinstance(first, dict) else None
    text = message.get("content") if isinstance(message, dict) else None
    if not isinstance(text, str):
        raise Unreachable("its answer holds no text")
    return text


def _door(params: Params) -> Door:
    key = None if params.key_env is None else os.environ.get(params.key_env)
    if params.key_env is not None and not key:
        raise ServeError(f"{params.key_env} is not set", hint=f"export {params.key_env}=… before starting")
    return Door(params.url, PATHS, key, params.timeout_s)
