"""Stage 4, train: the plan is carried out, and a crash at any moment costs minutes, never the result.

Killed and started again, it leaves the bytes that an uninterrupted run leaves: `stages._descent` is all that
happens between two steps, and goes on from its last checkpoint in `scratch`.

Where the plan says so, several processes train together (`engine.placement`): each runs `carry_out`, the
first of them saves, speaks and leaves the artefact. A checkpoint does not tell how many there were.

The adapter it leaves is the one with the best held-out loss (the last one where there are no validation
rows). It does not know what the loss is, which weights move, or how good the answers are.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier import artifacts, template
from luthier.engine import base as bases
from luthier.engine import batch, fused, heap, launch, loop, memory, native, placement
from luthier.engine.placement import Placement
from luthier.engine.saver import Saver
from luthier.errors import Interrupted, TrainError
from luthier.objectives import Batch
from luthier.rows import again
from luthier.stages import Event, Inputs, _kept, _reference, _rollouts
from luthier.stages._descent import (
    CURVE,
    JOURNALS,
    KEPT,
    SAVES,
    TIMINGS,
    VALIDATION,
    Progress,
    Work,
    descend,
    resume,
)  # fmt: skip
from luthier.template import Encoded

EDGE = 5  # `loss_first` and `loss_last` are means over this many steps
RANK = "luthier.stages._rank"  # what each of several processes runs


def run(section: Any, inputs: Inputs, out: Path) -> dict[str, Any]:
    plan = artifacts.read_json(inputs.artefacts["plan"] / "plan.json")
    if plan["device"]:
        raise TrainError(
            f"the plan is for {plan['device']}, which is not here", where="plan.device",
            hint="leave plan.device out to train on this machine",
        )  # fmt: skip
    if plan["processes"] == 1:
        return carry_out(section, inputs, out, placement.alone())
    phase = section[0].model_dump(mode="json", by_alias=True)
    job = {"phase": phase, "placement": plan["placement"], "out": str(out), "inputs": inputs.as_dict()}
    job["timeout_s"] = placement.LONGEST_S
    crew = launch.Crew(plan["processes"], plan["threads"], inputs.scratch)
    facts: dict[str, Any] = launch.launch(
        RANK, job, crew, lambda said: inputs.tell(Event(**said)), inputs.stopping
    )
    return facts


def carry_out(section: Any, inputs: Inputs, out: Path, place: Placement) -> dict[str, Any]:
    """The plan in this process: all of the training, or one rank's part. The first rank has the facts."""
    plan = artifacts.read_json(inputs.artefacts["plan"] / "plan.json")
    torch.set_num_threads(plan["threads"])
    heap.release()
    heap.hold()
    memory.forget_peak()
    work = _prepare(section[0], plan, inputs, place)
    if "rollouts" in section[0].objective.module.NEEDS:
        work = _rollouts.ready(work, plan, inputs)
    began = time.monotonic()
    if "reference" in section[0].objective.module.NEEDS:
        work = _reference.ready(work, plan, inputs)
    asked_s = time.monotonic() - began
    progress = resume(work)
    progress.seconds += asked_s  # as the plan counts it
    with Saver(work.folder) as saver:
        descend(work, progress, saver)
    if progress.best_weights:
        whole = {name: placement.whole(weight) for name, weight in progress.best_weights.items()}
        loop.put_weights(work.model, whole)
    placement.unshard(work.model)
    progress.peak_rss_bytes = int(sum(place.each(progress.peak_rss_bytes)))
    return _leave(work, progress, plan, inputs, out) if place.leads else {}


def _prepare(phase: Any, plan: Any, inputs: Inputs, place: Placement) -> Work:
    objective, method = phase.objective, phase.method
    if lacking := objective.module.NEEDS - {"rollouts", "reference"}:
        raise TrainError(f"{objective.name} needs {', '.join(sorted(lacking))}", where="train")
    inputs.tell(Event("train", "loading the base model", 0, plan["steps"]))
    base = inputs.artefacts["model"] / "base"
    tokenizer = template.load_tokenizer(base)
    rows, held_out = (artifacts.read_jsonl(_rows(inputs, split)) for split in ("train", "validation"))
    ids = tuple(record["id"] for record in rows)
    needed = batch.Loader.needed(ids, phase.batch, inputs.seed, plan["steps"])
    looked = batch.order(tuple(record["id"] for record in held_out), inputs.seed, "validation")
    looked = looked[: phase.validation.rows]
    encoded = _encode(tokenizer, [rows[row] for row in needed])
    if place.any(inputs.stopping()):
        raise Interrupted("training stopped before it began", hint="run the same command again")
    model = method.module.attach(bases.load(base, plan["dtype"]), method.params, inputs.seed)
    here = place.device == placement.CPU
    formulas = native.kernels(plan["compiled"] and here)
    if here and not place.in_step:  # fused layers hold on to whole weights
        fused.fuse(model, formulas, plan["checkpointing"])
    place.settle(model)
    settings = loop.Settings(
        steps=plan["steps"], lr=phase.lr, seed=inputs.seed, warmup=phase.warmup, schedule=phase.schedule,
        weight_decay=phase.weight_decay, clip=phase.clip, on_sick=phase.on_sick, spike=phase.spike,
        metrics=getattr(objective.module, "METRICS", ()), formulas=formulas, place=place,
    )  # fmt: skip
    micro_tokens = plan["micro_tokens"]

    def stopping() -> bool:
        """What all ranks agree on; so all must ask at the same time."""
        return place.any(inputs.stopping())

    return Work(
        model=model,
        adam=loop.optimiser(model, settings),
        loader=batch.Loader(
            ids, dict(zip(needed, encoded, strict=True)), phase.batch, micro_tokens, inputs.seed
        ),
        held_out=batch.micro_batches(
            batch.flat(_encode(tokenizer, [held_out[row] for row in looked])), micro_tokens
        ),
        objective=_interruptible(objective, stopping if place.in_step else inputs.stopping),
        settings=settings,
        tokens=plan["computed_tokens"],
        phase=phase,
        place=place,
        folder=inputs.scratch / "checkpoints",
        kept=_kept.due(phase, len(ids), plan["steps"]),
        looks=_kept.looks(phase, len(ids), plan["steps"]),
        identity=artifacts.digest_of(
            {
                "inputs": {name: inputs.digests[name] for name in ("data", "model")},
                "seed": inputs.seed,
                "phase": phase.model_dump(mode="json"),
                "plan": {name: plan[name] for name in ("steps", "dtype")},
            }
        ),
        stopping=stopping,
        tell=inputs.tell,
    )


def _interruptible(objective: Any, stopping: Callable[[], bool]) -> loop.Objective:
    """The loss, unless someone asked to stop: a step of many micro-batches may take longer than they wait."""

    def loss(policy: Tensor, reference: Tensor | None, micro: Batch) -> Any:
        if stopping():
            raise loop.Asked
        reference = micro.reference_N if reference is None else reference
        return objective.module.loss(policy, reference, micro, objective.params)

    return loss


def _rows(inputs: Inputs, split: str) -> Path:
    return inputs.artefacts["data"] / "rows" / f"{split}.jsonl"


def _encode(tokenizer: Any, records: Sequence[Any]) -> list[tuple[Encoded, ...]]:
    return template.encode_rows(tokenizer, [again(record) for record in records])


def _leave(work: Work, progress: Progress, plan: Any, inputs: Inputs, out: Path) -> dict[str, Any]:
    """Write the artefact: adapter, records and facts."""
    about = artifacts.read_json(inputs.artefacts["model"] / "base.json")
    method = work.phase.method.module
    base_name = f"luthier-base:{about['digest'][:12]}"
    method.save(work.model, out / "adapter", base_name)
    _save_kept(work, progress, out, base_name)
    (out / "observed").mkdir(exist_ok=True)
    for name in JOURNALS:
        place = out / "observed" / name if name in (TIMINGS, SAVES) else out / name
        artifacts.write_bytes(place, bytes(progress.journals[name]))
    curve, timings, saves = (progress.noted(name) for name in (CURVE, TIMINGS, SAVES))
    kept = progress.best if progress.best is not None else progress.step
    outcome = {
        "steps": progress.step,
        "skipped_steps": progress.skipped,
        "stopped_early": progress.step < work.settings.steps,
        "best_step": kept,
        "validation_loss": progress.best_loss,
        "loss_first": _mean([row["loss"] for row in curve[:EDGE]]),
        "loss_last": _mean([row["loss"] for row in curve[-EDGE:]]),
        "useful_tokens": sum(row["tokens"] for row in curve),
        "computed_tokens": sum(row["computed_tokens"] for row in curve),
        "loss_tokens": sum(row["loss_tokens"] for row in curve),
        **method.report(work.model),
        "checkpoints": _checkpoints(progress),
    }
    phase = work.phase.model_dump(mode="json")
    asked = {"seed": inputs.seed, "phase": phase, "base": about["digest"]}
    artifacts.write_json(out / "phase.json", outcome | asked)
    step_seconds = sum(row["seconds"] for row in timings)
    observed = {
        "train_seconds": round(progress.seconds, 2),
        "step_seconds": round(step_seconds, 2),
        "tokens_per_s": round(outcome["useful_tokens"] / step_seconds, 1) if step_seconds else 0.0,
        "peak_rss_bytes": progress.peak_rss_bytes,
        "peak_gb": round(progress.peak_rss_bytes / 1e9, 3),
        "minutes": round(progress.seconds / 60, 4),
        "longest_stall_s": max((row["stall_s"] for row in saves), default=0.0),
    }
    machine = {"torch": torch.__version__, "python": platform.python_version()}
    machine |= {name: plan[name] for name in ("threads", "processes", "placement")}
    artifacts.write_json(out / "observed" / "host.json", machine | observed)
    return outcome | observed


def _save_kept(work: Work, progress: Progress, out: Path, base_name: str) -> None:
    """The adapters of the way, each as plain files of its own. The model's weights are theirs afterwards."""
    for step, digest in progress.kept:
        loop.put_weights(work.model, _kept.read(work.folder / KEPT, step, digest))
        work.phase.method.module.save(work.model, out / "checkpoints" / f"step-{step}" / "adapter", base_name)


def _checkpoints(progress: Progress) -> list[dict[str, Any]]:
    """Of each kept step, what training and held-out rows said of it."""
    curve = {row["step"]: row for row in progress.noted(CURVE)}
    looks = {row["step"]: row for row in progress.noted(VALIDATION)}
    return [
        {
            "step": step,
            **{name: curve.get(step, {}).get(name) for name in ("loss", "accuracy")},
            **{f"validation_{name}": looks.get(step, {}).get(name) for name in ("loss", "accuracy")},
        }
        for step, _ in progress.kept
    ]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
