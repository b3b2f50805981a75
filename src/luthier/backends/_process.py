"""A server that a backend starts, or is pointed at: which one, how long it is waited for, and its process.

One that we start is on the leash (`_leash`, which ends it however we end), on a free port, with little of our
environment; what could not be started is left alone for `OPEN_S`. It does not know what is started.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import Field, field_validator, model_validator

from luthier import plugins
from luthier.backends import _leash
from luthier.backends._http import checked
from luthier.serving.engine_process import Unavailable

KEPT = ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
LAST_S = 30.0
OPEN_S = 30.0


class Params(plugins.Params):
    """Of a backend that starts a server from an environment of its own, or uses one of this machine."""

    python: Path | None = Field(default=None, description="start one with this environment's python")
    url: str | None = Field(default=None, description="or use the one at this address of this machine")
    key_env: str | None = Field(default=None, description="the variable that holds the key of `url`")
    start_s: float = Field(default=600.0, gt=0, description="how long it may take to be ready")
    timeout_s: float = Field(default=120.0, gt=0, description="how long it may say nothing")

    @field_validator("url")
    @classmethod
    def _on_this_machine(cls, url: str | None) -> str | None:
        return None if url is None else checked(url, near=True)

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.python is None) == (self.url is None):
            raise ValueError("give `python` to start a server, or `url` to use one")
        return self

    @property
    def key(self) -> str | None:
        """The key of `url`."""
        return None if self.key_env is None else os.environ.get(self.key_env)


@dataclass(slots=True)
class Circuit:
    """Open for a while after a start that failed: nobody waits for another meanwhile. One that we are only
    pointed at costs nothing to ask again."""

    said: str
    _until_s: float = 0.0

    def require_closed(self) -> None:
        left_s = self._until_s - time.monotonic()
        if left_s > 0:
            error = Unavailable(self.said, hint=f"try again in {left_s:.0f} s")
            error.retry_after_s = max(1, int(left_s))
            raise error

    def open(self, params: Params) -> None:
        self._until_s = time.monotonic() + (OPEN_S if params.url is None else 0.0)


def environment(**more: str) -> dict[str, str]:
    """Little of ours goes there: no keys, no search path of modules."""
    return {name: os.environ[name] for name in KEPT if name in os.environ} | more


def started(command: Sequence[str], given: Mapping[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-I", str(Path(_leash.__file__)), *command],
        env=given,
        stdin=subprocess.PIPE,
        stdout=2,  # stdout belongs to whoever started the server
        start_new_session=True,
    )


def end(process: subprocess.Popen[bytes]) -> None:
    """Let go of the leash; what does not end then is killed."""
    if process.stdin is not None:
        process.stdin.close()
    try:
        process.wait(LAST_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
