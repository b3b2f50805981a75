"""A server process that a backend starts: on the leash, on a free port, with little of our environment.

Source: `_leash`, which ends it however we end. It does not know what is started.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from luthier.backends import _leash

KEPT = ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
LAST_S = 30.0


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
