"""What the model says before it is trained: log-probabilities of every token to be learnt, computed once.

A freshly attached adapter adds nothing (a method says so with `STARTS_AS_BASE`), so the reference is the very
model that trains, through the same layers, before its first step: at that step policy and reference agree to
the bit, and no second copy of the weights is ever held. They do not change, so they are computed once, in
float32, and kept in `scratch` under a name made of what they follow from. It does not know losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier import artifacts
from luthier.engine import batch, checkpoint
from luthier.engine.placement import Placement
from luthier.errors import Interrupted, StoreError, TrainError
from luthier.objectives import Batch
from luthier.stages import Event, Inputs
from luthier.stages._descent import Work

Name = tuple[str, int]  # a document: its row's id, its place there


def ready(work: Work, plan: Any, inputs: Inputs) -> Work:
    """The work with reference log-probabilities in every batch. Call it before weights are restored."""
    method = work.phase.method
    if not getattr(method.module, "STARTS_AS_BASE", False):
        raise TrainError(
            f"{method.name} does not start as its base, so what the base would say is not at hand",
            where="train.0.method",
            hint="an objective with a reference needs a method such as lora",
        )
    rows = batch.flat(work.loader.rows[row] for row in sorted(work.loader.rows))
    known = _known(work, [*batch.micro_batches(rows, work.loader.micro_tokens), *work.held_out], plan, inputs)
    loader = Loader(**vars(work.loader), known=known)
    return replace(work, loader=loader, held_out=tuple(_with(micro, known) for micro in work.held_out))


@dataclass(frozen=True)
class Loader(batch.Loader):
    """Batches with what the reference says of their targets; `known`: of each document's, in order."""

    known: dict[Name, Tensor]

    def __call__(self, step: int) -> tuple[Batch, ...]:
        return tuple(_with(micro, self.known) for micro in super().__call__(step))


def _with(micro: Batch, known: dict[Name, Tensor]) -> Batch:
    return replace(micro, reference_N=torch.cat([known[name] for name in _names(micro)]))


def _names(micro: Batch) -> list[Name]:
    return list(zip(micro.rows, micro.parts_D or (0,) * len(micro.rows), strict=True))


def _known(work: Work, micros: Sequence[Batch], plan: Any, inputs: Inputs) -> dict[Name, Tensor]:
    """From `scratch` where they are whole and of this very training, else computed."""
    asked = {"training": work.identity, "plan": {name: plan[name] for name in ("micro_tokens", "compiled")}}
    name = artifacts.digest_of(asked)[:16]
    place = inputs.scratch / "reference" / f"{name}.safetensors"
    found = _read(place)
    if not all(work.place.each(found is not None)):
        found = _compute(work, micros, inputs)
        if work.place.leads:
            _write(place, found)
    assert found is not None
    kept: dict[Name, Tensor] = {}
    parts = torch.split(found, [len(micro.targets_N) for micro in micros])
    for micro, logp_N in zip(micros, parts, strict=True):
        counts = torch.bincount(micro.rows_N.cpu(), minlength=len(micro.rows)).tolist()
        kept.update(zip(_names(micro), torch.split(logp_N, counts), strict=True))
    return kept


@torch.no_grad()
def _compute(work: Work, micros: Sequence[Batch], inputs: Inputs) -> Tensor:
    """logp of all targets, batch after batch; each rank computes its share, and all hold the whole."""
    place: Placement = work.place
    logps = [torch.zeros(len(micro.targets_N)) for micro in micros]
    work.model.eval()
    shares = place.share([len(micro.ids_T) for micro in micros])
    for done, (number, weight) in enumerate(shares, 1):
        if work.stopping() if place.in_step else inputs.stopping() and place.world == 1:
            raise Interrupted("stopped while asking the reference", hint="the same command asks again")
        scored = place.scores(
            work.model, place.put(micros[number]), work.settings.tile, work.settings.formulas
        )
        if weight:
            logps[number] = scored.logp_N.cpu()
        work.tell(Event("train", "asking the reference", done, len(shares)))
    return place.total(torch.cat(logps))


def _write(place: Path, logps: Tensor) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_tensors(place, {"logps": logps})
    artifacts.write_bytes(place.with_suffix(".sha256"), artifacts.file_digest(place).encode())


def _read(place: Path) -> Tensor | None:
    """None where there is none, or it was damaged: then they are computed again, to the same bits."""
    digest = place.with_suffix(".sha256")
    if not place.is_file() or not digest.is_file():
        return None
    if digest.read_bytes() != artifacts.file_digest(place).encode():
        return None
    try:
        return checkpoint.read_tensors(place)["logps"]
    except StoreError:
        return None
