"""Trainings and saves to be killed, in processes forked from a server that has torch loaded already."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from luthier import artifacts
from luthier.engine import checkpoint
from luthier.errors import Interrupted
from luthier.pipeline import Stop
from luthier.stages import Inputs, train
from tests.faults.failing_disk import Disk, die, failing
from tests.stages.training import SEED, phase

STEPS = {"steps": 24, "checkpoint_every": 2}
SAID, DIGEST = "said.txt", "digest.txt"
ASKED = 75

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["tests.faults.train_victim"])


def inputs(folder: Path) -> Inputs:
    artefacts = {name: folder / name for name in ("data", "model", "plan")}

    def tell(event: Any) -> None:
        with open(folder / SAID, "a", encoding="utf-8") as file:
            file.write(f"{event.done} {event.message}\n")

    return Inputs(
        name="toy",
        artefacts=artefacts,
        digests={name: artifacts.verify(path, deep=False) for name, path in artefacts.items()},
        root=folder,
        cache=folder / "cache",
        scratch=folder / "scratch",
        seed=SEED,
        tell=tell,
    )


def training(folder: Path, operations: int | None = None) -> None:
    """The train stage in `folder`, a planned world; the digest of what it leaves goes to a file.

    With `operations` it dies of SIGKILL at that file operation, nearly all of which belong to saves.
    """
    torch.set_num_threads(1)
    (folder / "scratch").mkdir(exist_ok=True)
    (folder / "out").mkdir(exist_ok=True)
    given = inputs(folder)
    with failing(Disk(sys.maxsize if operations is None else operations, die)):
        train.run((phase(**STEPS),), given, folder / "out")
    digest = artifacts.seal(folder / "out")
    (folder / DIGEST).write_text(digest)


def stoppable(folder: Path) -> None:
    """The train stage under the signal handler of the command line; leaves with code 75 when asked."""
    stop = Stop(saving=True)
    signal.signal(signal.SIGTERM, lambda *_: stop.request())
    torch.set_num_threads(1)
    (folder / "scratch").mkdir(exist_ok=True)
    (folder / "out").mkdir(exist_ok=True)
    try:
        train.run((phase(**STEPS),), replace(inputs(folder), stopping=lambda: stop.requested), folder / "out")
    except Interrupted:
        sys.exit(ASKED)


def made(step: int) -> checkpoint.Checkpoint:
    lines = b"".join(b'{"step":%d}\n' % n for n in range(1, step + 1))
    return checkpoint.Checkpoint(
        step, {"weight:a": torch.full((999,), float(step))}, {"identity": "me"}, {"curve.jsonl": lines}
    )


def saving(folder: Path, operations: int) -> None:
    """Save step 1, then step 2, and die of SIGKILL at one file operation of the second."""
    checkpoint.save(folder, made(1))
    with failing(Disk(operations, die)):
        checkpoint.save(folder, made(2))
