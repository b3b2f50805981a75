"""Ranks for tests: real processes that meet over gloo, forked from a server that has torch loaded already."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from luthier.engine import base, batch, loop, placement
from luthier.engine.placement import Placement
from luthier.errors import TrainError
from luthier.methods import lora
from luthier.objectives import Batch, Loss, sft
from tests.engine.test_attention import rows

WAIT_S = 60.0
ROWS = rows((14, 11, 9, 9, 7, 5, 5, 4, 12, 6), seed=4)
SETTINGS = loop.Settings(steps=6, lr=1e-2, seed=3, warmup=0.2)
OBJECTIVE: Any = partial(sft.loss, params=sft.Params())

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["tests.engine.ranks"])


def gang(world: int, kind: str, folder: Path, target: Any, *given: Any) -> list[Any]:
    """What `target(place, folder, *given)` returned on each rank, as JSON."""
    folder.mkdir(exist_ok=True)
    ranks = [
        server.Process(target=_rank, args=(rank, world, kind, folder, target, given)) for rank in range(world)
    ]
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join(2 * WAIT_S)
        assert [process.exitcode for process in ranks] == [0] * world
    finally:
        for process in ranks:
            process.kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


def _rank(rank: int, world: int, kind: str, folder: Path, target: Any, given: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    signal.alarm(int(2 * WAIT_S))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), GLOO_SOCKET_IFNAME="lo")
    place = placement.join(kind, WAIT_S, f"file://{folder / 'meeting'}") if world > 1 else Placement()  # type: ignore[arg-type]
    found = target(place, folder, *given)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    place.leave()


def loader(micro_tokens: int = 14) -> batch.Loader:
    return batch.Loader(
        tuple(row.id for row in ROWS), {n: (row,) for n, row in enumerate(ROWS)}, 5, micro_tokens, 3
    )


def model_of(tiny: Path, dropout: float = 0.0, dtype: str = "float32") -> Any:
    return lora.attach(base.load(tiny, dtype), lora.Params(r=4, dropout=dropout), 1)


def bytes_held(tensors: list[torch.Tensor]) -> int:
    """What these take in this process."""
    mine = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in mine)


def descend(place: Placement, folder: Path, tiny: Path, **how: Any) -> dict[str, Any]:
    """Train from step `past` (of the checkpoint in `start`) to `steps`; rank 0 leaves the checkpoint."""
    model = model_of(tiny, how.get("dropout", 0.0), how.get("dtype", "float32"))
    place.settle(model)
    settings = loop.Settings(steps=6, lr=1e-2, seed=3, warmup=0.2, place=place)
    adam = loop.optimiser(model, settings)
    if start := how.get("start"):
        loop.restore(model, adam, load_file(start))
    past = loop.Past(how.get("past", 0))
    micros = loader(how.get("micro_tokens", 14))
    trace = []
    for step in loop.train(model, micros, OBJECTIVE, adam, settings, past):
        trace.append((step.step, step.loss, step.grad_norm, step.accuracy))
        if step.step == how.get("steps", 6):
            break
    seen = loop.look(model, micros(1), OBJECTIVE, settings)
    look = [seen.total, seen.count, seen.right]
    held = bytes_held([*model.parameters(), *loop.moving(model, adam).values()])
    tensors = {name: placement.whole(tensor) for name, tensor in loop.moving(model, adam).items()}
    if place.leads:
        save_file(tensors, folder / "end.safetensors")
    return {"trace": trace, "look": look, "held": held, "largest": max(len(m.ids_T) for m in micros(1))}


def descending(place: Placement, folder: Path, tiny: Path, how: dict[str, Any]) -> dict[str, Any]:
    return descend(place, folder, tiny, **how)


def sums_that_miss(place: Placement, folder: Path) -> Any:
    """A gradient that only rank 1 has, and one that nobody has."""
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    weights[0].grad = torch.full((3,), 1.0 + place.rank)
    if place.rank == 1:
        weights[1].grad = torch.full((3,), 5.0)
    place.add_up(weights)
    return [None if weight.grad is None else weight.grad.tolist() for weight in weights]


def poisoned(place: Placement, folder: Path, tiny: Path, what: str) -> Any:
    """In step 2 a micro-batch is sick or someone asks to stop: what a rank says, and if its weights stay."""
    model = model_of(tiny)
    place.settle(model)
    settings = loop.Settings(steps=6, lr=1e-2, seed=3, place=place)
    adam = loop.optimiser(model, settings)
    bad = loader()(2)[1].rows

    def objective(policy: torch.Tensor, reference: torch.Tensor | None, micro: Batch) -> Loss:
        loss = sft.loss(policy, reference, micro, sft.Params())
        met = micro.rows == bad
        if what == "asked" and (place.any(met) if place.in_step else met):
            raise loop.Asked
        return Loss(loss.total * float("nan"), loss.count) if what == "sick" and met else loss

    said = ""
    before = loop.snapshot(model, adam)
    try:
        for _ in loop.train(model, loader(), objective, adam, settings):
            before = loop.snapshot(model, adam)
    except (TrainError, loop.Asked) as error:
        said = f"{type(error).__name__}: {error}"
    after = loop.snapshot(model, adam)
    same = all(torch.equal(placement.whole(after[name]), placement.whole(before[name])) for name in after)
    return [said, same]
