"""What a recipe could change where nothing fits: each offer alone, forecast to fit before it is made.

Source: the closed forms of `forecast.footprint` over the micro-batches that will really come. It does not
know what the user would rather give up.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from luthier.errors import PlanError
from luthier.forecast import fit
from luthier.forecast.footprint import Checkpointing
from luthier.stages._elsewhere import Work, roomy

Kinds = tuple[Checkpointing, ...]


def too_big(work: Work, phase: Any, among: tuple[float, int], choice: tuple[Kinds, Kinds]) -> PlanError:
    """Each thing that would make it fit, alone; every one was forecast to fit before it is said.

    `among`: the bytes that all processes may use, and how many share them. Each forecast is of one.
    """
    (together, processes), (kinds, others) = among, choice
    allowed = together / processes
    need = replace(work.need, how=replace(work.need.how, checkpointing=kinds[-1]))
    least = need.forecast(need.longest).total
    offers = [f"plan.memory_gb: {math.ceil(processes * least / 1e8) / 10}"]
    for kind in others:
        other = replace(need, how=replace(need.how, checkpointing=kind))
        if other.forecast(need.longest).total <= allowed:
            offers.append(f"plan.checkpointing: {kind.value}")
            break
    sampled = need.how.sampling_bytes  # then the longest rows are what answers may become, and no row's own
    if not sampled and (length := fit.shorter(need, allowed)):
        longer = sum(max(len(one.ids) for one in row) > length for row in work.loader.rows.values())
        offers.append(f"plan.max_length: {length} ({longer} of {len(work.loader.rows)} rows are longer)")
    if rank := _smaller_rank(need, phase, allowed):
        offers.append(f"train.0.method.r: {rank}")
    if smaller := fit.fewer_layers(need, allowed):
        offers.append(f"a base of {smaller.parameters / 1e6:,.0f} million parameters")
    offers += [f"plan.device: {name}" for name in roomy(work)[:1]]
    return PlanError(
        f"training needs about {processes * least / 1e9:.2f} GB even with one row of {need.longest} tokens "
        f"at a time; {together / 1e9:.2f} GB are allowed",
        where="plan.memory_gb",
        hint=f"any one of these would fit: {'; '.join(offers)}",
    )


def _smaller_rank(need: fit.Work, phase: Any, allowed: float) -> int | None:
    """The largest smaller rank of the same method that would fit."""
    rank = getattr(phase.method.params, "r", 1)

    def fits(less: int) -> bool:
        stacks = tuple(
            replace(stack, adapters=tuple((each * less // rank, out) for each, out in stack.adapters))
            for stack in need.shape.stacks
        )
        shape = replace(need.shape, stacks=stacks, trainable=need.shape.trainable * less // rank)
        return replace(need, shape=shape).forecast(need.longest).total <= allowed

    return fit.most(fits, 1, rank - 1)
