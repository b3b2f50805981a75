"""Trainings and saves to be killed, in processes forked from a server that has torch loaded already."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from luthier import artifacts
from luthier.engine import checkpoint
from luthier.stages import Inputs, train
from tests.stages.training import SEED, phase

STEPS = {"steps": 24, "checkpoint_every": 2}
SAID, DIGEST = "said.txt", "digest.txt"

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


def training(folder: Path) -> None:
    """The train stage in `folder`, a planned world; the digest of what it leaves goes to a file."""
    torch.set_num_threads(1)
    (folder / "scratch").mkdir(exist_ok=True)
    (folder / "out").mkdir(exist_ok=True)
    train.run((phase(**STEPS),), inputs(folder), folder / "out")
    (folder / DIGEST).write_text(artifacts.seal(folder / "out"))


def save(folder: Path, step: int) -> None:
    weights = {"weight:a": torch.full((9,), float(step))}
    checkpoint.append(folder / "curve.jsonl", [{"step": step}])
    checkpoint.save_best(folder, step, weights)
    journals = {"curve.jsonl": checkpoint.mark(folder / "curve.jsonl")}
    checkpoint.save(folder, step, weights, {"identity": "me", "best": step, "journals": journals})


def saving(folder: Path, operations: int) -> None:
    """Save step 1, then step 2, and die of SIGKILL after so many file operations of the second."""
    save(folder, 1)
    left = [operations]

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*given, **named)

        return call

    for name in ("open", "fsync", "rename", "replace", "unlink", "rmdir"):
        setattr(os, name, dying(getattr(os, name)))
    save(folder, 2)
