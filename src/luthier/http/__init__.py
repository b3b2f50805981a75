"""The HTTP door: OpenAI's chat API over the service, bound to this machine and closed by keys.

This module is what the command line calls; nothing heavy is imported before it serves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def _quiet(ready: dict[str, Any]) -> None:
    del ready


@dataclass(frozen=True)
class Secure:
    """TLS by these PEM files, or none; without it only this machine is listened to, unless `insecure`."""

    cert: Path | None = None
    key: Path | None = None
    insecure: bool = False


PLAIN = Secure()


def serve(  # noqa: PLR0913 - each is an option of the command
    *,
    home: str | Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8321,
    key: str | None = None,
    workers: int = 0,
    cached: int = 0,
    first_token_s: float = 0.4,
    backend: str | None = None,
    judge: str | None = None,
    log_prompts: bool = False,
    secure: Secure = PLAIN,
    announce: Callable[[dict[str, Any]], None] = _quiet,
) -> None:
    """Serve the releases of a home until SIGTERM or Ctrl-C, following alias moves at once.

    `announce({"url", "key", "models"})` is called when requests will be answered. Port 0 takes a free one;
    without a `key` a new one is made, and known to nobody but who hears the announcement. The official
    client's `base_url` is the url followed by `/v1`.
    `workers` processes carry out fine-tuning jobs meanwhile; `cached` deterministic answers are kept.
    In a rush, which begins at half a queue, only those are taken on whose first token can be expected within
    `first_token_s`, or a few times as long as one alone takes; who can wait sets it high, and is queued.
    `backend` says what computes them, as `{name: vllm, its: settings}`; by default our own engine.
    `judge` names a model elsewhere that graders may ask, as `{name: remote, url: …, model: …, key_env: …}`.
    With `log_prompts` what is asked and answered is written to a file below the home, which the announcement
    names as `prompt_log`.
    """
    from luthier import backends
    from luthier.home import Home
    from luthier.http import server
    from luthier.serving.limits import Limits
    from luthier.store import Store

    opened = Home.at(home)
    limits = Limits(cached=cached, first_s=first_token_s)
    chosen = None if backend is None else backends.read(backend)
    asked = None if judge is None else backends.read(judge)
    door = server.Door(
        host,
        port,
        key,
        limits,
        apart=True,
        workers=workers,
        backend=chosen,
        judge=asked,
        log_prompts=log_prompts,
        secure=secure,
    )
    server.serve(Store.open(opened.database), opened, door, announce)
