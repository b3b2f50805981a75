"""What every system is measured with: the job it is given, the clock, and the one JSON line it answers with.

It runs inside each system's own environment, so it needs nothing but the standard library. A step lasts from
the end of the step before it (or from `start`) to its own end, so collating, logging and the optimiser all
count; keeping an adapter does not. Peak memory is the kernel's VmHWM (proc(5)) of this process: compilers
that it starts are not in it. It does not know models, tokens or what is trained.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """One training run. Rows are taken in the order of the file, `batch` a step.

    dtype:   of the weights and products, where a variant does not have its own.
    adapter: folder of the adapter to start from; none: the system's own start.
    looks:   steps after which the adapter is kept, for its held-out loss.
    scratch: a folder that is the run's alone.
    """

    base: str
    rows: str
    steps: int
    batch: int
    rank: int
    alpha: float
    lr: float
    seed: int
    threads: int
    variant: str
    dtype: str
    scratch: str
    adapter: str | None = None
    looks: tuple[int, ...] = ()

    @staticmethod
    def given() -> Job:
        """The job on the command line. From here on, what libraries print goes to stderr."""
        _answers.append(os.dup(1))
        os.dup2(2, 1)
        told = json.loads(sys.argv[1])
        return Job(**{**told, "looks": tuple(told.get("looks", ()))})

    def read(self) -> list[dict[str, Any]]:
        """The rows of steps 1 … `steps`, in order: `input_ids`, and `mask` (1 where a token is learnt)."""
        with open(self.rows, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        return [rows[n % len(rows)] for n in range(self.steps * self.batch)]


_answers: list[int] = []


@dataclass
class Meter:
    """Steps as they end. `tokens` holds the useful (non-padding) tokens of each step."""

    job: Job
    tokens: list[int]
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)
    last: float = 0.0

    @staticmethod
    def over(job: Job, rows: list[dict[str, Any]]) -> Meter:
        lengths = [len(row["input_ids"]) for row in rows]
        steps = range(0, job.steps * job.batch, job.batch)
        return Meter(job, [sum(lengths[at : at + job.batch]) for at in steps])

    def start(self) -> None:
        self.facts["load_seconds"] = round(time.perf_counter() - self.began, 2)
        self.last = time.perf_counter()

    def step(self, loss: float, keep: Callable[[str], object]) -> None:
        """A step has ended. `keep` writes the adapter into a folder, if this step is one to look at."""
        self.seconds.append(time.perf_counter() - self.last)
        self.losses.append(loss)
        if (done := len(self.losses)) in self.job.looks:
            folder = str(Path(self.job.scratch) / f"adapter-{done}")
            keep(folder)
            self.kept.append(folder)
        self.last = time.perf_counter()

    def answer(self, packages: tuple[str, ...]) -> None:
        """The run as one line of JSON on the real stdout."""
        line = {
            "losses": self.losses,
            "seconds": [round(value, 4) for value in self.seconds],
            "tokens": self.tokens[: len(self.seconds)],
            "peak_rss_bytes": peak_rss_bytes(),
            "versions": {name: metadata.version(name) for name in packages},
            "kept": self.kept,
            **self.facts,
        }
        os.write(_answers[-1], (json.dumps(line) + "\n").encode())


def peak_rss_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
