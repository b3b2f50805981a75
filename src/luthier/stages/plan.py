"""Stage 3, plan: know what training takes before it takes it, and refuse what cannot fit.

Decisions (processes, threads of each, number type, tokens in a micro-batch) go to `plan.json`; they follow
from the recipe, the rows, the base and the kind of machine, so they are the same each time and may key the
training.
Predictions (peak memory, minutes) come from closed forms (`engine.memory`) and from a few real micro-batches
on the real model; with all that was measured they go to `observed/`.

It does not know GPUs, money or energy, nor what else will run on this machine meanwhile.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from luthier import artifacts, template
from luthier.engine import base as bases
from luthier.engine import batch, fused, head, host, memory, native
from luthier.errors import DataError, PlanError
from luthier.objectives import Batch
from luthier.rows import Chat, chat
from luthier.stages import Event, Inputs
from luthier.template import Encoded

MICRO_TOKENS = 2048  # more does not train faster on a CPU: its matrix units are busy long before
FREE_SHARE = 0.85  # of free memory, when the recipe sets no budget


@dataclass(frozen=True)
class Work:
    """What the phase will read and move, known before anything runs."""

    loader: batch.Loader
    validation: tuple[Encoded, ...]
    shape: memory.Shape
    trainable: int
    steps: int


def run(section: Any, inputs: Inputs, out: Path) -> dict[str, Any]:
    budget, phase = section.budget, section.phases[0]
    inputs.tell(Event("plan", "measuring this machine"))
    machine = host.probe()
    dtype = _dtype(inputs.artefacts["model"], machine)
    work = _work(budget, phase, inputs, dtype)
    allowed = (
        round(1e9 * budget.memory_gb) if budget.memory_gb else round(FREE_SHARE * machine.memory_free_bytes)
    )
    processes, kind = budget.processes, _placement(budget, work, allowed)
    micro_tokens, largest, forecast = _fit(work, allowed, (kind, processes))
    work = replace(work, loader=replace(work.loader, micro_tokens=micro_tokens))
    threads = max(1, min(budget.threads or machine.cores, machine.cores) // processes)
    torch.set_num_threads(threads)
    inputs.tell(Event("plan", "timing a few real micro-batches"))
    tokens = sum(len(row.ids) for step in _steps(work) for row in step)
    compiled = native.can_compile()
    pace, gap = _pace(phase, inputs, work, (dtype, compiled))
    memory.release()
    computed = sum(sum(batch.sizes(step, micro_tokens)) for step in _steps(work))
    minutes = _minutes(phase, work, computed, pace) / processes  # as if none were in another's way
    if budget.minutes is not None and minutes > budget.minutes:
        raise PlanError(
            f"training would take about {minutes:.1f} minutes; the budget is {budget.minutes:g}",
            where="plan.minutes",
            hint=f"steps: {max(1, int(work.steps * budget.minutes / minutes))} would fit, "
            f"or plan.minutes: {math.ceil(minutes)}",
        )
    decisions = _decisions(phase, work, tokens) | {
        "computed_tokens": computed,
        "processes": processes, "placement": kind,
        "threads": threads, "dtype": dtype, "compiled": compiled,
        "micro_tokens": micro_tokens, "largest_micro_batch": largest,
    }  # fmt: skip
    artifacts.write_json(out / "plan.json", decisions)
    predicted = {"peak_gb": round(forecast.total / 1e9, 3), "minutes": round(minutes, 4)}
    seen = {
        "bytes": forecast.as_dict(), "budget_gb": round(allowed / 1e9, 3), "packing_gap": gap,
        "tokens_per_s": round(pace[0] * tokens / computed, 1), "validation_tokens_per_s": round(pace[1], 1),
        "host": machine.as_dict(),
    }  # fmt: skip
    (out / "observed").mkdir(exist_ok=True)
    artifacts.write_json(out / "observed" / "prediction.json", predicted | seen)
    return decisions | predicted | {"tokens_per_s": seen["tokens_per_s"]}


def _dtype(model: Path, machine: host.Host) -> str:
    """bf16 where the base is bf16 and this machine is not slower in it; float32 else."""
    stored = str(artifacts.read_json(model / "base.json")["dtype"])
    if stored == "bfloat16" and not machine.native_bf16 and machine.bf16_flops < machine.fp32_flops:
        return "float32"
    return stored


def _work(budget: Any, phase: Any, inputs: Inputs, dtype: str) -> Work:
    inputs.tell(Event("plan", "counting tokens"))
    tokenizer = template.load_tokenizer(inputs.artefacts["model"] / "base")
    train, validation = (
        _encoded(split, budget.max_length, inputs, tokenizer) for split in ("train", "validation")
    )
    if not train:
        raise DataError("the dataset has no training row", where="data")
    ids = tuple(row.id for row in train)
    steps = phase.steps or math.ceil(phase.epochs * len(ids) / phase.batch)
    looked = batch.order(tuple(row.id for row in validation), inputs.seed, "validation")
    outline = bases.outline(inputs.artefacts["model"] / "base")
    trainable = phase.method.module.trainable(outline, phase.method.params)
    parameters = sum(weight.numel() for weight in outline.parameters())
    return Work(
        loader=batch.Loader(ids, dict(enumerate(train)), phase.batch, MICRO_TOKENS, inputs.seed),
        validation=tuple(validation[row] for row in looked[: phase.validation.rows]),
        shape=memory.Shape.of(outline.config, parameters, 2 if dtype == "bfloat16" else 4),
        trainable=trainable,
        steps=steps,
    )


def _encoded(split: str, longest: int, inputs: Inputs, tokenizer: Any) -> list[Encoded]:
    records = artifacts.read_jsonl(inputs.artefacts["data"] / "rows" / f"{split}.jsonl")
    chats: list[Chat] = [chat(record["messages"], record["where"]) for record in records]
    rows = template.encode_all(tokenizer, chats)
    for row, source in zip(rows, chats, strict=True):
        if len(row.ids) > longest:
            raise PlanError(
                f"this row has {len(row.ids)} tokens; plan.max_length is {longest}",
                where=f"{source.where} (row {row.id})",
                hint=f"plan.max_length: {max(len(row.ids) for row in rows)} would take every {split} row",
            )
    return rows


def _steps(work: Work) -> list[list[Encoded]]:
    loader = work.loader
    return [
        [loader.rows[row] for row in batch.rows_of(loader.ids, loader.batch, loader.seed, step)]
        for step in range(1, work.steps + 1)
    ]


def _even(work: Work, processes: int) -> int:
    """Micro-batches small enough that every process has one in a usual step."""
    steps = _steps(work)
    usual = math.ceil(sum(sum(batch.sizes(step, MICRO_TOKENS)) for step in steps) / len(steps) / processes)
    return min(MICRO_TOKENS, usual)


def _placement(budget: Any, work: Work, allowed: int) -> str:
    """A copy of the model in each process, unless that takes more than half of what each may use."""
    if budget.placement != "auto" or budget.processes == 1:
        return "one" if budget.processes == 1 else str(budget.placement)
    weights = work.shape.parameters * work.shape.weight_bytes
    return "ddp" if 2 * weights * budget.processes <= allowed else "fsdp"


def _fit(work: Work, allowed: int, among: tuple[str, int]) -> tuple[int, int, memory.Forecast]:
    """The token budget of a micro-batch within the memory allowed, the largest that comes, its forecast.

    `among`: the placement and its processes. What is shared among them is forecast as a share of the weights,
    though a layer is whole for a moment and layers are not fused.
    """
    kind, processes = among
    held = math.ceil(work.shape.parameters / (processes if kind == "fsdp" else 1))
    shape = replace(work.shape, parameters=held)
    steps = _steps(work)
    longest = max(len(row.ids) for step in steps for row in step)

    def largest(budget: int) -> int:
        return max(size for step in steps for size in batch.sizes(step, budget))

    def forecast(tokens: int) -> memory.Forecast:
        sizes = (tokens, min(longest, tokens))
        each = memory.forecast(shape, work.trainable, sizes, min(head.TILE, tokens))
        return memory.Forecast(**{name: processes * size for name, size in asdict(each).items()})

    budget = MICRO_TOKENS if processes == 1 else max(longest, _even(work, processes))
    while True:
        tokens = largest(budget)
        predicted = forecast(tokens)
        if predicted.total <= allowed:
            return budget, tokens, predicted
        if budget <= longest:
            raise _too_big(work, allowed, forecast)
        budget = max(longest, budget // 2)


def _too_big(work: Work, allowed: int, forecast: Any) -> PlanError:
    longest = max(len(row.ids) for row in work.loader.rows.values())
    need, floor = forecast(longest).total, forecast(8).total
    per_token = (need - floor) / max(1, longest - 8)
    fitting = 8 + int((allowed - floor) / per_token) if per_token > 0 and allowed > floor else 0
    shorter = f"; or rows of at most {fitting} tokens" if fitting >= 8 else ""
    return PlanError(
        f"training needs about {need / 1e9:.2f} GB even with one row of {longest} tokens at a time; "
        f"{allowed / 1e9:.2f} GB are allowed",
        where="plan.memory_gb",
        hint=f"plan.memory_gb: {math.ceil(need / 1e8) / 10} would fit{shorter}; or a smaller base model",
    )


def _pace(
    phase: Any, inputs: Inputs, work: Work, numerics: tuple[str, bool]
) -> tuple[tuple[float, float], float]:
    """(tokens/s of training, tokens/s of validation) on the real model, and how far packing is from plain."""
    dtype, compiled = numerics
    formulas = native.kernels(compiled)
    memory.hold()
    model = bases.load(inputs.artefacts["model"] / "base", dtype)
    first = _steps(replace(work, steps=1))[0]
    gap = bases.prove(model, sorted(first, key=lambda row: len(row.ids))[:: max(1, len(first) - 1)][:2])
    model = phase.method.module.attach(model, phase.method.params, inputs.seed)
    fused.fuse(model, formulas)
    micros = work.loader(1)
    params = phase.objective.params

    def descend(micro: Batch) -> None:
        loss = phase.objective.module.loss(
            head.batch_logps(model, micro, head.TILE, formulas), None, micro, params
        )
        loss.total.backward()

    model.train()
    descend(micros[-1])  # warms caches up and makes the gradients' memory; the smallest micro-batch will do
    train = _rate(micros[:2], descend)
    model.eval()
    with torch.no_grad():
        validate = _rate(micros[:1], lambda micro: head.batch_logps(model, micro, head.TILE, formulas))
    return (train, validate), gap


def _rate(micros: Sequence[Batch], work: Any) -> float:
    began = time.perf_counter()
    for micro in micros:
        work(micro)
    return sum(len(micro.ids_T) for micro in micros) / (time.perf_counter() - began)


def _minutes(phase: Any, work: Work, computed: int, pace: tuple[float, float]) -> float:
    looks = (1 + math.ceil(work.steps / phase.validation.every)) if work.validation else 0
    looked_at = looks * sum(batch.sizes(work.validation, work.loader.micro_tokens))
    return (computed / pace[0] + looked_at / pace[1]) / 60


def _decisions(phase: Any, work: Work, tokens: int) -> dict[str, Any]:
    rows = work.loader.rows.values()
    return {
        "steps": work.steps,
        "batch": phase.batch,
        "epochs": round(work.steps * phase.batch / len(rows), 4),
        "tokens": tokens,
        "loss_tokens": sum(sum(row.mask[1:]) for step in _steps(work) for row in step),
        "tokens_per_epoch": sum(len(row.ids) for row in rows),
        "longest_row": max(len(row.ids) for row in rows),
        "validation_rows": len(work.validation),
        "trainable_parameters": work.trainable,
        "trainable_share": round(work.trainable / (work.shape.parameters + work.trainable), 6),
        "checkpointing": False,
    }
