"""The training loop: a generator of finished steps. Logging, checkpoints and stopping are the caller's `for`.

Sources: AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) through torch; warm-up and decay as in `rate`;
clipping by global norm (Pascanu et al. 2013, arXiv 1211.5063). Losses are sums over a whole optimiser
step divided by its loss units, so a step split into k micro-batches is the step in one batch.

What step k does depends on the weights, the optimiser's moments and k alone: the rows come from
`batches(k)`, dropout noise from a seed of (seed, k). It does not know files, validation or time limits.
Bits may differ between thread counts, between splits into micro-batches, and between kinds of CPU.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from luthier.engine.head import TILE, batch_logps
from luthier.errors import TrainError
from luthier.objectives import Batch, Loss

Objective = Callable[[Tensor, Tensor | None, Batch], Loss]
Batches = Callable[[int], Sequence[Batch]]


@dataclass(frozen=True)
class Settings:
    """How to descend. `steps` counts optimiser steps; `warmup` is the share of them with a rising rate."""

    steps: int
    lr: float
    seed: int
    warmup: float = 0.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = 0.0
    clip: float = 1.0
    tile: int = TILE


@dataclass(frozen=True)
class Step:
    """One finished optimiser step. `loss` is the mean over its loss units, `grad_norm` is before clipping."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    loss_tokens: int
    seconds: float
    rows: tuple[str, ...]


def rate(step: int, settings: Settings) -> float:
    """The learning rate of step 1 … steps: up to `lr` in a line, then down so that it is never quite 0."""
    warm = round(settings.warmup * settings.steps)
    if step <= warm:
        return settings.lr * step / warm
    share = (step - warm) / (settings.steps - warm + 1)
    if settings.schedule == "cosine":
        return settings.lr * 0.5 * (1.0 + math.cos(math.pi * share))
    return settings.lr * (1.0 - share) if settings.schedule == "linear" else settings.lr


def trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """What moves, by name, in the order of names."""
    return {name: weight for name, weight in sorted(model.named_parameters()) if weight.requires_grad}


def optimiser(model: torch.nn.Module, settings: Settings) -> torch.optim.AdamW:
    weights = list(trained(model).values())
    return torch.optim.AdamW(weights, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)


def train(
    model: Any,
    batches: Batches,
    objective: Objective,
    adam: torch.optim.AdamW,
    settings: Settings,
    start: int = 0,
) -> Iterator[Step]:
    """Do steps start + 1 … steps, yielding each when the weights have moved."""
    weights = list(trained(model).values())
    for step in range(start + 1, settings.steps + 1):
        began = time.perf_counter()
        micros = batches(step)
        rows = tuple(row for micro in micros for row in micro.rows)
        total, count = _gradients(model, micros, objective, (step, rows), settings)
        norm = float(torch.nn.utils.clip_grad_norm_(weights, settings.clip))
        if not math.isfinite(norm):
            raise _sick(f"the gradient of step {step} is {norm}", rows)
        for group in adam.param_groups:
            group["lr"] = rate(step, settings)
        adam.step()
        yield Step(
            step=step, loss=total / count, lr=rate(step, settings), grad_norm=norm,
            tokens=sum(len(micro.ids_T) for micro in micros),
            loss_tokens=sum(len(micro.targets_N) for micro in micros),
            seconds=time.perf_counter() - began, rows=rows,
        )  # fmt: skip


def _gradients(
    model: Any,
    micros: Sequence[Batch],
    objective: Objective,
    at: tuple[int, tuple[str, ...]],
    settings: Settings,
) -> tuple[float, int]:
    """Accumulate the gradient of the step's mean loss; return the loss sum and its count."""
    step, rows = at
    units = sum(len(micro.targets_N) for micro in micros)
    if units == 0:
        raise _sick(f"no token of step {step} has a loss, so there is nothing to learn", rows)
    for weight in model.parameters():
        weight.grad = None
    model.train()
    total, count = 0.0, 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(noise_seed(settings.seed, step))
        for micro in micros:
            if not len(micro.targets_N):
                continue
            loss = objective(batch_logps(model, micro, settings.tile), None, micro)
            if not math.isfinite(value := loss.total.item()):
                raise _sick(f"the loss of step {step} is {value}", micro.rows)
            loss.total.backward()  # type: ignore[no-untyped-call]
            total, count = total + value, count + loss.count
    for weight in trained(model).values():
        if weight.grad is not None:
            weight.grad.div_(count)
    return total, count


def _sick(what: str, rows: Sequence[str]) -> TrainError:
    shown = ", ".join(rows[:32]) + (f" and {len(rows) - 32} more" if len(rows) > 32 else "")
    return TrainError(
        f"{what}; nothing was learnt from it",
        where=f"rows {shown}",
        hint="look at these rows; if they are sound, lower `lr` or raise `warmup`",
    )


def noise_seed(seed: int, step: int) -> int:
    """The seed of one step's dropout noise: the same after a resume as without one."""
    return int.from_bytes(hashlib.sha256(f"noise:{seed}:{step}".encode()).digest()[:8], "big") >> 1


@torch.no_grad()
def mean_loss(
    model: Any, micros: Iterable[Batch], objective: Objective, tile: int = TILE
) -> Iterator[tuple[float, int]]:
    """Running (loss sum, count) after each micro-batch, without dropout or gradients."""
    total, count = 0.0, 0
    for micro in micros:
        model.eval()
        loss = objective(batch_logps(model, micro, tile), None, micro)
        total, count = total + loss.total.item(), count + loss.count
        yield total, count


def snapshot(model: torch.nn.Module, adam: torch.optim.AdamW) -> dict[str, Tensor]:
    """All that the next step depends on, except its number: weights that move, and their moments."""
    tensors: dict[str, Tensor] = {}
    for name, weight in trained(model).items():
        tensors[f"weight:{name}"] = weight.detach().clone()
        for kind in ("exp_avg", "exp_avg_sq"):
            moment = adam.state[weight].get(kind)
            tensors[f"{kind}:{name}"] = torch.zeros_like(weight) if moment is None else moment.clone()
    return tensors


def restore(model: torch.nn.Module, adam: torch.optim.AdamW, tensors: dict[str, Tensor], step: int) -> None:
    """Put a snapshot of finished step `step` back, bit for bit."""
    put_weights(model, tensors)
    for name, weight in trained(model).items():
        adam.state[weight] = {
            "step": torch.tensor(float(step)),
            "exp_avg": tensors[f"exp_avg:{name}"].clone(),
            "exp_avg_sq": tensors[f"exp_avg_sq:{name}"].clone(),
        }


def put_weights(model: torch.nn.Module, tensors: dict[str, Tensor]) -> None:
    """Set what moves to the `weight:` tensors; names and shapes must agree exactly."""
    weights = trained(model)
    given = {
        key.removeprefix("weight:"): tensor for key, tensor in tensors.items() if key.startswith("weight:")
    }
    if given.keys() != weights.keys() or any(given[name].shape != weights[name].shape for name in given):
        raise TrainError("the checkpoint is of other weights than the ones that train here")
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(given[name])
