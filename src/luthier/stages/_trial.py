"""A few real micro-batches on the real model, before training: what time and memory they take.

What closed forms cannot know is measured here, in the process that plans: what Python and its libraries
take, what the matrix library keeps of each shape it met (`resident_bytes`), and the peak of these few, below
which no training will stay. The largest of the whole training is among them.

It does not know what hundreds of steps do to glibc's heap; `forecast.footprint` has a share for that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from luthier.engine import base as bases
from luthier.engine import batch, fused, head, heap, memory, native
from luthier.forecast import fit, flops, footprint, layout
from luthier.forecast.layout import Layout
from luthier.objectives import Batch
from luthier.stages import Inputs
from luthier.stages._elsewhere import Work
from luthier.template import Encoded

FIRST = 3  # steps of which micro-batches are tried, beside the one with the most tokens
Timed = tuple[float, float]  # operations, seconds


@dataclass(frozen=True)
class Trial:
    """timed:  of training; looked: without a way back; gap: how far packing is from plain.

    loaded_bytes, peak_bytes, resident_bytes: before the first micro-batch, at the most, and when all is gone;
        0 where the kernel does not tell. met: the micro-batches, as the matrix library met them.
    """

    timed: tuple[Timed, ...]
    looked: Timed
    gap: float
    loaded_bytes: int
    peak_bytes: int
    resident_bytes: int
    met: tuple[Layout, ...]

    def as_dict(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("loaded_bytes", "peak_bytes", "resident_bytes")}

    def settled(self, work: Work, chosen: fit.Choice) -> footprint.Forecast:
        """The forecast with what was measured in place of what was assumed."""
        if not self.resident_bytes:
            return chosen.forecast
        shape, how = work.need.shape, work.need.how
        left = chosen.forecast.products - footprint.products_bytes(shape, how, self.met)
        resident = self.resident_bytes + how.sampling_bytes
        return footprint.settled(chosen.forecast, resident, max(0, left), self.peak_bytes)


def run(phase: Any, inputs: Inputs, work: Work, chosen: fit.Choice) -> Trial:
    tried = _micros(phase, inputs, work, chosen)
    heap.release()
    return replace(tried, resident_bytes=memory.rss_bytes())


def _micros(phase: Any, inputs: Inputs, work: Work, chosen: fit.Choice) -> Trial:
    """All but what is resident when what was made for it is gone, as it is afterwards."""
    shape, need = work.need.shape, work.need
    dtype = "bfloat16" if shape.weight_bytes == 2 else "float32"
    model = bases.load(inputs.artefacts["model"] / "base", dtype)
    first = need.steps[0]
    gap = bases.prove(model, sorted(first, key=lambda row: len(row.ids))[:: max(1, len(first) - 1)][:2])
    model = phase.method.module.attach(model, phase.method.params, inputs.seed)
    formulas = native.kernels(need.how.compiled)
    fused.fuse(model, formulas, chosen.checkpointing.value)
    warm, *made = [
        (_taught(batch.collate(rows), phase.objective), layout.of(rows)) for rows in _few(work, chosen)
    ]
    params = phase.objective.params

    def descend(micro: Batch) -> None:
        model.zero_grad(set_to_none=True)  # as every step begins
        logp_N = head.batch_logps(model, micro, head.TILE, formulas)
        phase.objective.module.loss(logp_N, micro.reference_N, micro, params).total.backward()

    @torch.no_grad()
    def look(micro: Batch) -> None:
        head.batch_logps(model, micro, head.TILE, formulas)

    model.train()
    heap.release()
    loaded = memory.rss_bytes()
    told = memory.forget_peak()
    descend(warm[0])  # the first one makes what all others use again
    timed = tuple(
        (flops.training(shape, at, chosen.checkpointing).total, _seconds(descend, micro))
        for micro, at in made
    )
    peak = memory.peak_rss_bytes() if told else 0
    model.eval()
    micro, at = made[len(made) // 2]
    look(warm[0])
    looked = flops.validation(shape, at).total, _seconds(look, micro)
    met = tuple(at for _, at in (warm, *made))
    return Trial(timed, looked, gap, loaded, peak, resident_bytes=0, met=met)


def _taught(micro: Batch, objective: Any) -> Batch:
    """With what an objective reads beside the tokens: an answer as good as any, a reference of no opinion."""
    if "reference" in objective.module.NEEDS:
        micro = replace(micro, reference_N=torch.zeros(len(micro.targets_N)))
    if "rollouts" not in objective.module.NEEDS:
        return micro
    return replace(micro, advantages_D=torch.ones(len(micro.lengths_D)))


def _few(work: Work, chosen: fit.Choice) -> list[list[Encoded]]:
    """One to warm up with; then the smallest, the middle and the largest, of those with something to learn.

    Steps seldom have the size of those just before them, and a new size has its products compiled first. So
    the one to warm up with is of another size than those that are timed, if there is one.
    """
    need = work.need
    fullest = max(need.steps, key=lambda step: sum(len(row.ids) for row in step))
    micros = [
        [step[row] for row in members]
        for step in (*need.steps[:FIRST], fullest)
        for members in batch.bins(step, chosen.micro_tokens)
    ]
    learnt = [rows for rows in micros if any(any(row.mask[1:]) for row in rows)] or micros
    ordered = sorted(learnt, key=_tokens)
    timed = [ordered[at] for at in sorted({0, len(ordered) // 2, len(ordered) - 1})]
    sizes = {_tokens(rows) for rows in timed}
    warm = next((rows for rows in ordered if _tokens(rows) not in sizes), ordered[0])
    return [warm, *timed]


def _tokens(rows: Sequence[Encoded]) -> int:
    return sum(len(row.ids) for row in rows)


def _seconds(work: Callable[[Batch], object], micro: Batch) -> float:
    began = time.perf_counter()
    work(micro)
    return time.perf_counter() - began
