"""Stage 3, plan: know what training takes before it takes it, and refuse what cannot fit.

Decisions (processes, threads of each, number type, tokens in a micro-batch, what is computed again) go to
`plan.json`; they follow from the recipe, the rows, the base and the kind of machine, so they are the same
each time and may key the training. Predictions (bytes by kind, minutes, money, energy) come from closed forms
(`forecast.footprint`, `forecast.flops`) over the micro-batches that will really come, and from a few of them
on the real model (`stages._trial`); with all that was measured they go to `observed/`.

Training on this machine will not start from a plan for a device of the table (`stages._elsewhere`). It does
not know what else will run meanwhile.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from luthier import artifacts, template
from luthier.devices import DEVICES, Device
from luthier.engine import base as bases
from luthier.engine import batch, flash, heap, native
from luthier.errors import DataError, PlanError
from luthier.forecast import fit, flops, footprint, host, layout, pace
from luthier.forecast.footprint import Checkpointing
from luthier.rows import again
from luthier.stages import Event, Inputs, _rollouts, _sampling, _trial
from luthier.stages._elsewhere import DEVICE_TOKENS, Work, elsewhere, elsewhere_s, how, looks
from luthier.stages._offers import Kinds, too_big
from luthier.template import Encoded

MICRO_TOKENS = 2048  # more does not train faster on a CPU: its matrix units are busy long before ...
SHARING_TOKENS = 8192  # ... unless more rows share what they begin with
FREE_SHARE = 0.85  # of free memory, when the recipe sets no budget


def run(section: Any, inputs: Inputs, out: Path) -> dict[str, Any]:
    budget, phase = section.budget, section.phases[0]
    inputs.tell(Event("plan", "measuring this machine"))
    machine, device = host.probe(), DEVICES.get(budget.device or "")
    sampled = _sampling.wanted(phase)
    if sampled:
        _sampling.refuse(section, inputs)
    dtype = _dtype(inputs.artefacts["model"], machine, device)
    work = _work(section, inputs, (dtype, device))
    allowed = _allowed(budget, machine, device)
    processes, kind = budget.processes, _placement(budget, work, allowed)
    work = _shared(work, kind, processes)
    most = DEVICE_TOKENS if device else _micro_tokens(work, processes)
    kinds, other_kinds = _kinds(budget, kind)
    chosen = fit.choose(work.need, allowed / processes, most, kinds)
    if chosen is None:
        raise too_big(work, phase, (allowed, processes), (kinds, other_kinds))
    threads = max(1, min(budget.threads or machine.cores, machine.cores) // processes)
    torch.set_num_threads(threads)
    decisions = _decisions(phase, work, chosen) | {
        "processes": processes, "placement": kind,
        "threads": threads, "dtype": dtype, "compiled": work.need.how.compiled, "device": budget.device,
        "warnings": _warnings(phase, work),
    } | (_sampling.decisions(phase, inputs) if sampled else {})  # fmt: skip
    total, foreseen = _operations(work, chosen), chosen.forecast
    if device is None:
        timing, foreseen = _tried(phase, inputs, work, chosen)
        minutes = timing.pop("minutes") / processes  # as if none were in another's way
        if sampled:
            timing["sampling_minutes"] = round(_sampling.minutes(phase, inputs, work), 6)
            minutes += timing["sampling_minutes"]
    else:
        timing, minutes = {}, elsewhere_s(device, phase, work, chosen) / 60
    _refuse_if_slow(budget, work, minutes)
    if processes * foreseen.total > allowed:
        said = f"{processes * foreseen.total / 1e9:.2f} GB after a trial; {allowed / 1e9:.2f} are allowed"
        inputs.tell(Event("plan", f"memory may not suffice: {said}"))
    artifacts.write_json(out / "plan.json", decisions)
    predicted = {
        "peak_gb": round(processes * foreseen.total / 1e9, 3),
        "closed_peak_gb": round(processes * chosen.forecast.total / 1e9, 3),  # what the choice was made by
        "minutes": round(minutes, 6),
        **_cost(budget, device, minutes),
        "bytes": {name: processes * size for name, size in foreseen.as_dict().items()},
        "bits_per_parameter": foreseen.bits(work.need.shape.parameters),
        "operations": total,
        "tokens_per_s": round(work.tokens / (60 * minutes), 1) if minutes else 0.0,
        **({"sampling_bytes": work.need.how.sampling_bytes} if sampled else {}),
    } | timing
    others = [] if device else [elsewhere(other, section, work) for other in DEVICES.values()]
    seen = {"budget_gb": round(allowed / 1e9, 3), "elsewhere": others, "host": machine.as_dict()}
    (out / "observed").mkdir(exist_ok=True)
    artifacts.write_json(out / "observed" / "prediction.json", predicted | seen)
    return decisions | predicted | {"budget_gb": seen["budget_gb"], "elsewhere": others}


def _dtype(model: Path, machine: host.Host, device: Device | None) -> str:
    """bf16 where the base is bf16 and this machine is not slower in it; float32 else."""
    stored = str(artifacts.read_json(model / "base.json")["dtype"])
    return stored if stored != "bfloat16" or device else machine.dtype


def _allowed(budget: Any, machine: host.Host, device: Device | None) -> float:
    if budget.memory_gb:
        return float(1e9 * budget.memory_gb)
    return device.memory_bytes if device else FREE_SHARE * machine.memory_free_bytes


def _work(section: Any, inputs: Inputs, target: tuple[str, Device | None]) -> Work:
    inputs.tell(Event("plan", "counting tokens"))
    budget, phase = section.budget, section.phases[0]
    dtype, device = target
    folder = inputs.artefacts["model"] / "base"
    tokenizer = template.load_tokenizer(folder)
    train, validation = (
        _encoded(split, (budget.max_length, phase.objective), inputs, tokenizer)
        for split in ("train", "validation")
    )
    if not train:
        raise DataError("the dataset has no training row", where="data")
    ids = tuple(row[0].id for row in train)
    held = getattr(phase.objective.params, "iterations", 1)  # steps on the same rows, one after the other
    count = phase.steps or held * math.ceil(phase.epochs * len(ids) / phase.batch)
    read = batch.Loader.needed(ids, phase.batch, inputs.seed, math.ceil(count / held))
    steps = tuple(
        tuple(batch.flat(train[row] for row in batch.rows_of(ids, phase.batch, inputs.seed, at)))
        for at in (math.ceil(step / held) for step in range(1, count + 1))
    )
    outline = bases.outline(folder)
    shape = footprint.shape(
        outline, phase.method.module.ranks(outline, phase.method.params), 2 if dtype == "bfloat16" else 4,
        mapped=device is None and bases.stored(folder) == {dtype},
    )  # fmt: skip
    way = how(device, native.can_compile())
    if way.here:
        way = replace(way, heap=heap.hold())
    if way.here and way.compiled:
        way = replace(way, flash=flash.knows(getattr(torch, dtype), shape.head_width))
    if _sampling.wanted(phase):
        longest = max(len(one.ids) for one in batch.flat(train))
        way, validation = replace(way, sampling_bytes=_sampling.held_bytes(shape, phase, longest)), []
    looked = batch.order(tuple(row[0].id for row in validation), inputs.seed, "validation")
    need = fit.Work(
        shape, steps, tuple(batch.flat(validation[row] for row in looked[: phase.validation.rows])),
        way, 0 if device else sum(len(one.ids) for one in batch.flat(train)),
        tuple(batch.flat(train[row] for row in read)) if "reference" in phase.objective.module.NEEDS else (),
    )  # fmt: skip
    return Work(batch.Loader(ids, dict(enumerate(train)), phase.batch, MICRO_TOKENS, inputs.seed), need)


def _placement(budget: Any, work: Work, allowed: float) -> str:
    """A copy of the model in each process, unless that takes more than half of what each may use."""
    if budget.placement != "auto" or budget.processes == 1:
        return "one" if budget.processes == 1 else str(budget.placement)
    weights = footprint.weights_bytes(work.need.shape)
    return "ddp" if 2 * weights * budget.processes <= allowed else "fsdp"


def _shared(work: Work, kind: str, processes: int) -> Work:
    """The work of one process: of what is shared it holds a part, though a layer is whole for a moment.

    Layers that are shared are torch's own, with its attention and its products.
    """
    if kind != "fsdp":
        return work
    shape = replace(work.need.shape, parameters=math.ceil(work.need.shape.parameters / processes))
    way = work.need.how
    way = replace(way, flash=way.flash and not way.here)
    return replace(work, need=replace(work.need, shape=shape, how=way))


def _micro_tokens(work: Work, processes: int) -> int:
    """Micro-batches large enough that rows share what they begin with; where there are several processes,
    small enough that every one has some in a usual step."""

    def computed(budget: int) -> int:
        return sum(at.tokens for at in work.need.layouts(budget))

    if processes > 1:
        usual = math.ceil(computed(MICRO_TOKENS) / work.steps / processes)
        return max(work.need.longest, min(MICRO_TOKENS, usual))
    shares = computed(MICRO_TOKENS) < work.tokens
    return fit.enough(computed, MICRO_TOKENS, SHARING_TOKENS) if shares else MICRO_TOKENS


def _encoded(split: str, how: tuple[int, Any], inputs: Inputs, tokenizer: Any) -> list[tuple[Encoded, ...]]:
    """The documents of each row; of a prompt, answers as long as they may become."""
    longest, objective = how
    records = artifacts.read_jsonl(inputs.artefacts["data"] / "rows" / f"{split}.jsonl")
    read = [again(record) for record in records]
    if "rollouts" in objective.module.NEEDS:
        rows = _rollouts.outlines(tokenizer, read, objective.params)
    else:
        rows = template.encode_rows(tokenizer, read)
    for row, source in zip(rows, read, strict=True):
        if (tokens := max(len(one.ids) for one in row)) > longest:
            most = max(len(one.ids) for one in batch.flat(rows))
            raise PlanError(
                f"this row has {tokens} tokens; plan.max_length is {longest}",
                where=f"{source.where} (row {source.id})",
                hint=f"plan.max_length: {most} would take every {split} row",
            )
    return rows


def _kinds(budget: Any, placement: str) -> tuple[Kinds, Kinds]:
    """What may be computed again, and what else a recipe could ask for."""
    asked = budget.checkpointing and Checkpointing(budget.checkpointing)
    if placement == "fsdp":  # fused layers do it, and sharded ones are not fused
        if asked not in (None, Checkpointing.NONE):
            raise PlanError(
                f"`checkpointing: {asked.value}` does not go with sharded layers",
                where="plan.checkpointing",
                hint="leave it out, or `plan.placement: ddp`",
            )
        return (Checkpointing.NONE,), ()
    every = tuple(Checkpointing)
    return ((asked,), tuple(kind for kind in every if kind is not asked)) if asked else (every, ())


def _refuse_if_slow(budget: Any, work: Work, minutes: float) -> None:
    if budget.minutes is None or minutes <= budget.minutes:
        return
    raise PlanError(
        f"training would take about {minutes:.1f} minutes; the budget is {budget.minutes:g}",
        where="plan.minutes",
        hint=f"steps: {max(1, int(work.steps * budget.minutes / minutes))} would fit, "
        f"or plan.minutes: {math.ceil(minutes)}",
    )


def _cost(budget: Any, device: Device | None, minutes: float) -> dict[str, float]:
    """Energy where the draw is known, money where a price is."""
    watts = budget.watts or (device.watts if device else None)
    energy_kwh = None if watts is None else watts * minutes / 60 / 1000
    found = {} if energy_kwh is None else {"energy_kwh": round(energy_kwh, 9)}
    if budget.price_per_hour is not None or (budget.price_per_kwh is not None and energy_kwh is not None):
        power = (energy_kwh or 0.0) * (budget.price_per_kwh or 0.0)
        money = (budget.price_per_hour or 0.0) * minutes / 60 + power
        found["money"] = round(money, 9)
    return found


def _operations(work: Work, chosen: fit.Choice) -> dict[str, int]:
    shape = work.need.shape
    return flops.summed(flops.training(shape, at, chosen.checkpointing) for at in chosen.layouts).as_dict()


def _tried(
    phase: Any, inputs: Inputs, work: Work, chosen: fit.Choice
) -> tuple[dict[str, Any], footprint.Forecast]:
    """Minutes and bytes on this machine, from a few real micro-batches; how far packing is from plain."""
    inputs.tell(Event("plan", "trying a few real micro-batches"))
    shape, kind = work.need.shape, chosen.checkpointing
    training = [flops.training(shape, at, kind).total for at in chosen.layouts]
    held_out, asked = (
        [flops.validation(shape, at).total for at in layout.step(rows, chosen.micro_tokens)]
        for rows in (work.need.validation, work.need.reference)
    )
    trial = _trial.run(phase, inputs, work, chosen)
    descent, look = pace.fit(trial.timed), pace.fit([trial.looked])
    seconds = descent.seconds(training) + looks(work, phase) * look.seconds(held_out)
    if asked:  # a reference is, once of every row, held-out ones as well
        seconds += look.seconds([*asked, *held_out])
    return {
        "minutes": seconds / 60,
        "packing_gap": trial.gap,
        "trial": trial.as_dict(),
        "pace": {
            "micro_batch_s": round(descent.call_s, 5),
            "operations_per_s": round(1 / descent.operation_s),
        },
        "timed": [{"operations": count, "seconds": round(each, 5)} for count, each in trial.timed],
    }, trial.settled(work, chosen)


def _warnings(phase: Any, work: Work) -> list[str]:
    """What is allowed and yet unusual."""
    shape = work.need.shape
    share = shape.trainable / (shape.parameters + shape.trainable)
    low, high = getattr(phase.method.module, "USUAL_SHARE", (0.0, 1.0))
    usual = f"{100 * low:g} to {100 * high:g} %"
    said = [f"{100 * share:.2g} % of the weights train; usual for {phase.method.name} is {usual}"]
    found = [] if low <= share <= high else said
    if _sampling.wanted(phase):
        found.append(
            "tokens, memory and minutes are for answers as long as they may become; minutes on a device "
            "of the table are of learning alone: what sampling takes there is unknown"
        )
    return found


def _decisions(phase: Any, work: Work, chosen: fit.Choice) -> dict[str, Any]:
    rows, shape = work.loader.rows.values(), work.need.shape
    lengths = [len(one.ids) for one in batch.flat(rows)]
    return {
        "steps": work.steps,
        "batch": phase.batch,
        "epochs": round(
            work.steps * phase.batch / len(rows) / getattr(phase.objective.params, "iterations", 1), 4
        ),
        "tokens": work.tokens,
        "computed_tokens": sum(at.tokens for at in chosen.layouts),
        "loss_tokens": sum(at.loss_tokens for at in chosen.layouts),
        "tokens_per_epoch": sum(lengths),
        "longest_row": max(lengths),
        "validation_rows": len(batch.bonds(work.need.validation)),
        "trainable_parameters": shape.trainable,
        "trainable_share": round(shape.trainable / (shape.parameters + shape.trainable), 6),
        "micro_tokens": chosen.micro_tokens,
        "largest_micro_batch": max(at.tokens for at in chosen.layouts),
        "micro_batches": len(chosen.layouts),
        "checkpointing": chosen.checkpointing.value,
    }
