"""Adapters kept on the way: which steps they are of, and where they lie until the stage leaves its artefact.

Each is written once, when its step is done, and named by its digest in every checkpoint that follows; so a
training that was killed goes on with those it has and makes the others again, bit for bit. It does not know
methods: an adapter here is the weights that move.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from luthier import artifacts
from luthier.engine import checkpoint
from luthier.errors import StoreError


def due(phase: Any, rows: int, steps: int) -> frozenset[int]:
    """The steps after which an adapter is kept; an epoch ends with the step that reads its last row."""
    if phase.keep is None:
        return frozenset()
    if phase.keep.at != "epochs":
        return frozenset(step for step in phase.keep.at if step <= steps)
    epochs = steps * phase.batch // rows
    return frozenset(math.ceil(epoch * rows / phase.batch) for epoch in range(1, epochs + 1))


def looks(phase: Any, rows: int, steps: int) -> tuple[int, ...]:
    """The steps after which held-out loss is looked at: every few, those that are kept, and the last."""
    return tuple(sorted({steps, *range(0, steps + 1, phase.validation.every)} | due(phase, rows, steps)))


def write(folder: Path, step: int, tensors: Mapping[str, Tensor]) -> str:
    """Bring the weights of a step to disk; the digest that `read` will ask for."""
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / f"{step}.safetensors"
    checkpoint.write_tensors(place, tensors)
    return artifacts.file_digest(place)


def read(folder: Path, step: int, digest: str) -> dict[str, Tensor]:
    place = folder / f"{step}.safetensors"
    if not place.is_file() or artifacts.file_digest(place) != digest:
        raise StoreError(
            f"the adapter kept after step {step} is damaged or gone",
            where=str(place),
            hint="remove the run's scratch folder; training begins afresh",
        )
    return checkpoint.read_tensors(place)


def drop(folder: Path, step: int) -> None:
    (folder / f"{step}.safetensors").unlink(missing_ok=True)
