"""The training loop: a generator of finished steps. Logging, checkpoints and stopping are the caller's `for`.

Sources: AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) through torch; warm-up and decay as in `rate`;
clipping by global norm (Pascanu et al. 2013, arXiv 1211.5063). Losses are sums over a whole optimiser
step divided by its loss units, so a step split into k micro-batches is the step in one batch.

A step is sick when no token of it has a loss, its loss or gradient is not a finite number, or its loss is a
spike: above `spike` times the median of the last `WINDOW` losses learnt from (judged from the `FIRST`th on,
and only while that median is above 0). It is never learnt from: it stops the training, or is skipped.

What step k does depends on the weights, the optimiser's moments, k and, if spikes are judged, those losses:
the rows come from `batches(k)`, dropout noise from a seed of (seed, k, micro-batch), on whatever rank and
device that is computed. An objective that raises leaves weights and moments as the step before left them.

It does not know files, validation, time limits, or who computes what (`placement`). Bits may differ between
thread counts, splits into micro-batches, numbers of ranks, and kinds of CPU.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor

from luthier.engine.head import TILE
from luthier.engine.kernels import PLAIN, Kernels
from luthier.engine.placement import ONE, Placement, part, whole
from luthier.errors import TrainError
from luthier.objectives import Batch, Loss

Objective = Callable[[Tensor, Tensor | None, Batch], Loss]
Batches = Callable[[int], Sequence[Batch]]

WINDOW = 32
FIRST = 8


class Sick(TrainError):
    """A step that must not be learnt from."""


class Asked(Exception):
    """Raised by an objective when someone asked to stop: all ranks drop the step, or the look."""


@dataclass(frozen=True)
class Settings:
    """How to descend. `steps` counts optimiser steps; `warmup` is the share of them with a rising rate.

    `metrics` are the names of what the objective tells beside its loss.
    """

    steps: int
    lr: float
    seed: int
    warmup: float = 0.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = 0.0
    clip: float = 1.0
    on_sick: Literal["stop", "skip"] = "stop"
    spike: float | None = None
    metrics: tuple[str, ...] = ()
    tile: int = TILE
    formulas: Kernels = PLAIN
    place: Placement = ONE


PLAINLY = Settings(steps=0, lr=0.0, seed=0)  # for a look: nothing descends


@dataclass(frozen=True)
class Sums:
    """What micro-batches came to: loss and metrics over `count` units, `right` of `tokens` foreseen."""

    total: float
    count: int
    right: int
    tokens: int
    metrics: tuple[float, ...] = ()

    @property
    def loss(self) -> float:
        return self.total / self.count

    @property
    def accuracy(self) -> float:
        """The share of tokens to be learnt that no other token outdid."""
        return self.right / self.tokens

    def means(self, names: Sequence[str]) -> dict[str, float]:
        return {name: value / self.count for name, value in zip(names, self.metrics, strict=True)}


@dataclass(frozen=True)
class Past:
    """What a restart follows: how many steps are done, and the last `WINDOW` losses learnt from."""

    step: int = 0
    losses: tuple[float, ...] = ()


@dataclass(frozen=True)
class Step:
    """One finished optimiser step. `loss` is the mean over its loss units, `grad_norm` is before clipping.

    `accuracy` is over the tokens to be learnt, `metrics` are means as the loss is.
    `sick` says why nothing was learnt from a step that was skipped; its loss and norm mean nothing then.
    `tokens` are the rows' own, `computed_tokens` those left where rows share their beginning.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    computed_tokens: int
    loss_tokens: int
    seconds: float
    rows: tuple[str, ...]
    accuracy: float = math.nan
    metrics: Mapping[str, float] = field(default_factory=dict)
    sick: str | None = None


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
    past: Past = Past(),
) -> Iterator[Step]:
    """Do the steps after `past`, yielding each when the weights have moved, or were left as they are."""
    losses, learner = deque(past.losses, maxlen=WINDOW), _Learner.of(model)
    for step in range(past.step + 1, settings.steps + 1):
        began = time.perf_counter()
        micros = batches(step)
        rows = tuple(row for micro in micros for row in _rows(micro))
        found, norm = Sums(math.nan, 1, 0, 1, (math.nan,) * len(settings.metrics)), math.nan
        sick: str | None = None
        try:
            found, norm = _gradients(learner, micros, objective, (step, rows, losses), settings)
        except Sick as error:
            if settings.on_sick == "stop":
                raise
            sick = error.what
        else:
            losses.append(found.loss)
            for group in adam.param_groups:
                group["lr"] = rate(step, settings)
            adam.step()
        yield Step(
            step=step, loss=found.loss, lr=rate(step, settings), grad_norm=norm,
            tokens=sum(sum(micro.lengths_D) for micro in micros),
            computed_tokens=sum(len(micro.ids_T) for micro in micros),
            loss_tokens=sum(len(micro.targets_N) for micro in micros),
            seconds=time.perf_counter() - began, rows=rows, accuracy=found.accuracy,
            metrics=found.means(settings.metrics), sick=sick,
        )  # fmt: skip


def _rows(micro: Batch) -> tuple[str, ...]:
    """The ids of its rows, each once however many documents it has."""
    parts = micro.parts_D or (0,) * len(micro.rows)
    return tuple(row for row, part in zip(micro.rows, parts, strict=True) if not part)


@dataclass(frozen=True)
class _Learner:
    """A model and what every step asks of it, found once: to walk through it takes 4 % of a small step."""

    model: Any
    modules: tuple[torch.nn.Module, ...]
    weights: list[torch.nn.Parameter]

    @staticmethod
    def of(model: Any) -> _Learner:
        return _Learner(model, tuple(model.modules()), list(trained(model).values()))


def _gradients(
    learner: _Learner,
    micros: Sequence[Batch],
    objective: Objective,
    at: tuple[int, tuple[str, ...], Sequence[float]],
    settings: Settings,
) -> tuple[Sums, float]:
    """Accumulate the clipped gradient of the step's mean loss; return its sums and the norm before."""
    model, weights, (step, rows, losses) = learner.model, learner.weights, at
    taught = [micro for micro in micros if len(micro.targets_N)]
    if not taught:
        raise _sick(f"no token of step {step} has a loss, so there is nothing to learn", rows)
    for weight in weights:
        weight.grad = None
    if not all(module.training for module in learner.modules):
        model.train()
    place = settings.place
    with torch.random.fork_rng(devices=[place.device] if place.device.type == "cuda" else []):
        how = (place, settings.metrics, settings.tile, settings.formulas)
        found = _sums(model, taught, objective, how, (settings.seed, step))
    for each, micro in zip(found, taught, strict=True):
        if not math.isfinite(each.total):
            raise _sick(f"the loss of step {step} is {each.total}", micro.rows)
    sums = _added(found)
    usual = median(losses) if settings.spike and len(losses) >= FIRST else 0.0
    if settings.spike and usual > 0 and sums.loss > settings.spike * usual:
        raise _sick(f"the loss of step {step} is {sums.loss:.4g}, of those before it {usual:.4g}", rows)
    place.add_up(weights)
    for weight in weights:
        if weight.grad is not None:
            weight.grad.div_(sums.count)
    norm = float(whole(torch.nn.utils.clip_grad_norm_(weights, settings.clip)))
    if not math.isfinite(norm):
        raise _sick(f"the gradient of step {step} is {norm}", rows)
    return sums, norm


def _sums(
    model: Any,
    micros: Sequence[Batch],
    objective: Objective,
    how: tuple[Placement, Sequence[str], int, Kernels],
    noise: tuple[int, int] | None = None,
) -> list[Sums]:
    """The sums of each micro-batch, whichever rank computes it; gradients too, if there is noise."""
    place, names, *rest = how
    table = torch.zeros(len(micros) + 1, 3 + len(names), dtype=torch.float64)  # last line: whether to stop
    try:
        for number, weight in place.share([len(micro.ids_T) for micro in micros]):
            micro = place.put(micros[number])
            if noise is not None:
                torch.manual_seed(noise_seed(*noise, number))
            scored = place.scores(model, micro, *rest)
            loss = objective(scored.logp_N, None, micro)
            line = [loss.total.item(), loss.count, scored.right_N.sum().item()]
            line += [loss.metrics[name] for name in names]
            table[number] += weight * torch.tensor(line, dtype=torch.float64)
            if noise is not None:
                (weight * loss.total).backward()  # type: ignore[no-untyped-call]
    except Asked:
        table[-1] = 1.0
    *lines, asked = place.total(table).tolist()
    if any(asked):
        raise Asked
    return [
        Sums(total, int(count), int(right), len(micro.targets_N), tuple(metrics))
        for (total, count, right, *metrics), micro in zip(lines, micros, strict=True)
    ]


def _added(found: Sequence[Sums]) -> Sums:
    return Sums(
        total=sum(each.total for each in found),
        count=sum(each.count for each in found),
        right=sum(each.right for each in found),
        tokens=sum(each.tokens for each in found),
        metrics=tuple(map(sum, zip(*(each.metrics for each in found), strict=True))),
    )


def _sick(what: str, rows: Sequence[str]) -> Sick:
    shown = ", ".join(rows[:32]) + (f" and {len(rows) - 32} more" if len(rows) > 32 else "")
    return Sick(
        f"{what}; nothing was learnt from it",
        where=f"rows {shown}",
        hint="look at these rows; if they are sound, lower `lr` or raise `warmup`, or set `on_sick: skip`",
    )


def noise_seed(seed: int, step: int, micro: int) -> int:
    """The seed of one micro-batch's dropout noise: the same after a resume and on whatever rank."""
    return int.from_bytes(hashlib.sha256(f"noise:{seed}:{step}:{micro}".encode()).digest()[:8], "big") >> 1


@torch.no_grad()
def look(
    model: Any,
    micros: Sequence[Batch],
    objective: Objective,
    settings: Settings = PLAINLY,
) -> Sums:
    """What these micro-batches come to, without dropout or gradients."""
    model.eval()
    how = (settings.place, settings.metrics, settings.tile, settings.formulas)
    return _added(_sums(model, micros, objective, how))


def moving(model: torch.nn.Module, adam: torch.optim.AdamW) -> dict[str, Tensor]:
    """All that the next step depends on, except its number: weights that move, moments, and their count.

    These are the tensors themselves, or this rank's part of them: the next step changes them.
    """
    tensors: dict[str, Tensor] = {}
    for name, weight in trained(model).items():
        state = adam.state.get(weight, {})
        tensors[f"weight:{name}"] = weight.detach()
        tensors[f"moves:{name}"] = state.get("step", torch.tensor(0.0))
        for kind in ("exp_avg", "exp_avg_sq"):
            moment = state.get(kind)
            tensors[f"{kind}:{name}"] = torch.zeros_like(weight) if moment is None else moment
    return tensors


def snapshot(model: torch.nn.Module, adam: torch.optim.AdamW) -> dict[str, Tensor]:
    """A copy of what moves."""
    return {name: tensor.detach().clone() for name, tensor in moving(model, adam).items()}


def restore(model: torch.nn.Module, adam: torch.optim.AdamW, tensors: Mapping[str, Tensor]) -> None:
    """Put a snapshot back, bit for bit."""
    put_weights(model, tensors)
    for name, weight in trained(model).items():
        adam.state[weight] = {
            "step": tensors[f"moves:{name}"].to(weight.device, copy=True),
            "exp_avg": part(tensors[f"exp_avg:{name}"], weight),
            "exp_avg_sq": part(tensors[f"exp_avg_sq:{name}"], weight),
        }


def put_weights(model: torch.nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Set what moves to the whole `weight:` tensors; names and shapes must agree exactly."""
    weights = trained(model)
    given = {
        key.removeprefix("weight:"): tensor for key, tensor in tensors.items() if key.startswith("weight:")
    }
    if given.keys() != weights.keys() or any(given[name].shape != weights[name].shape for name in given):
        raise TrainError("the checkpoint is of other weights than the ones that train here")
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(part(given[name], weight))
