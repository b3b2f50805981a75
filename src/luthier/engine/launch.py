"""Several processes for one job: torchrun starts them, one speaks for all, and none outlives the caller.

Source: torchrun, `python -m torch.distributed.run`, whose agent ends all ranks when one dies. The caller and
the ranks are joined by two pipes. On the ranks' standard input a byte means "save and stop", which each sees
as none takes it out; its end means that the caller is gone, and a rank leaves at once. On standard output
come lines of JSON from `Line.say`; whatever else ranks print is led to standard error, and kept in a file.

It starts processes of this machine only. It does not know what they do; ranks on several machines are
torchrun's own business.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, Popen, TimeoutExpired
from typing import Any

from luthier import artifacts, errors
from luthier.errors import Interrupted, LuthierError, TrainError

GRACE_S = 8.0  # for the other ranks to end, once one has said its last word
LOOK_S = 0.1
LOG = "ranks.log"
_FAILED = re.compile(rb"rank +: (\d+) .*\n.*exitcode +: (-?\d+)")


@dataclass(frozen=True)
class Crew:
    """How many processes, how many threads each, and a folder for the job's description and the log."""

    processes: int
    threads: int
    folder: Path


def launch(
    module: str,
    job: Mapping[str, Any],
    crew: Crew,
    tell: Callable[[Mapping[str, Any]], None],
    stopping: Callable[[], bool],
) -> Any:
    """Run `python -m module JOB` in every rank; return what one says is the result, or raise its error."""
    description, log = crew.folder / "job.json", crew.folder / LOG
    artifacts.write_json(description, job)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command = [*torchrun, f"--nproc-per-node={crew.processes}", "-m", module, str(description)]
    loopback = socket.if_nameindex()[0][1]
    always = {"OMP_NUM_THREADS": str(crew.threads), "PYTHONSAFEPATH": "1"}
    env = {"GLOO_SOCKET_IFNAME": loopback, **os.environ, **always}
    with (
        open(log, "wb") as noise,
        Popen(command, stdin=PIPE, stdout=PIPE, stderr=noise, start_new_session=True, env=env) as agent,
    ):
        try:
            words = _listen(agent, tell, stopping)
        finally:
            _dismiss(agent)
    if "result" in words:
        return words["result"]
    if "error" in words:
        raise _error(words["error"])
    raise _silent(crew, log.read_bytes(), agent.returncode)


def _listen(agent: Popen[bytes], tell: Any, stopping: Callable[[], bool]) -> dict[str, Any]:
    """Pass on what ranks say, and the request to stop, until the agent is gone; return the last words."""
    assert agent.stdin is not None and agent.stdout is not None
    words: dict[str, Any] = {}
    heard, asked, rest, until = False, False, b"", float("inf")
    while time.monotonic() < until:
        gone = agent.poll() is not None
        if stopping() and not asked and not gone:
            if not heard:
                raise Interrupted("stopped before it began", hint="run the same command again")
            asked = True
            os.write(agent.stdin.fileno(), b"!")
        if not select.select([agent.stdout], [], [], 0 if gone else LOOK_S)[0]:
            if gone:
                break
            continue
        if not (read := os.read(agent.stdout.fileno(), 1 << 16)):
            break
        heard = True
        *lines, rest = (rest + read).split(b"\n")
        for kind, said in (json.loads(line).popitem() for line in lines):
            if kind == "event":
                tell(said)
            elif words.setdefault(kind, said) is said:
                until = min(until, time.monotonic() + GRACE_S)
    return words


def _dismiss(agent: Popen[bytes]) -> None:
    """See off whoever is still there: the agent ends its ranks, and so does the end of the pipe."""
    assert agent.stdin is not None
    agent.stdin.close()
    if agent.poll() is None:
        agent.terminate()
    try:
        agent.wait(GRACE_S)
    except TimeoutExpired:
        os.killpg(agent.pid, signal.SIGKILL)


def _error(said: Mapping[str, Any]) -> LuthierError:
    """The error of a rank, as it was raised there."""
    kind: type[LuthierError] = getattr(errors, said["kind"])
    return kind(said["what"], where=said["where"], hint=said["hint"])


def _silent(crew: Crew, log: bytes, code: int) -> TrainError:
    """Nobody said why it ended: torchrun's summary names who was the first to go, and how."""
    found = [(int(rank), int(exit_)) for rank, exit_ in _FAILED.findall(log)]
    by_signal = [(rank, exit_) for rank, exit_ in found if exit_ < 0 and -exit_ != signal.SIGTERM]
    last = (by_signal or found)[-1:]  # torchrun puts the first to go at the end
    what = f"the {crew.processes} processes of this training ended with code {code}"
    for rank, exit_ in last:
        how = f"was killed by {signal.Signals(-exit_).name}" if exit_ < 0 else f"ended with code {exit_}"
        what = f"rank {rank} of {crew.processes} {how}, so the others were stopped"
    hint = "run the same command again: it goes on from the last checkpoint"
    return TrainError(what, where=str(crew.folder / LOG), hint=hint)


class Line:
    """A rank's end of the two pipes."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._asked = select.poll()
        self._asked.register(0, select.POLLIN)
        threading.Thread(target=_leave_with_caller, daemon=True).start()

    def asked(self) -> bool:
        """Whether the caller wants this job saved and stopped."""
        return bool(self._asked.poll(0))

    def say(self, kind: str, what: Any) -> None:
        self._out.write(json.dumps({kind: what}) + "\n")
        self._out.flush()

    @contextmanager
    def last_words(self) -> Iterator[None]:
        """Send an error of ours to the caller, who raises it."""
        try:
            yield
        except LuthierError as error:
            known = next(kind.__name__ for kind in type(error).__mro__ if hasattr(errors, kind.__name__))
            self.say("error", {"kind": known, "what": error.what, "where": error.where, "hint": error.hint})


def _leave_with_caller() -> None:
    gone = select.poll()
    gone.register(0, 0)
    gone.poll()
    os._exit(1)
